"""The shortest sequence that a model can be run on, found by running it on short ones."""

import warnings
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from carousel_export.culprits import Recorder, track
from carousel_export.draw import Draw
from carousel_export.eager import Eager
from carousel_export.errors import ExampleError, ModelError

# Lengths after the shortest that are tried, where there is one.
_MORE = 12


def find_shortest(eager: Eager, draw: Draw) -> tuple[Draw, str]:
    """The draw with the least frames that the model can be run on, and in words what needs more than one.

    A model is not defined where it fails or answers with a NaN. Raises `ModelError` for one that is not defined for
    some number of frames after that, `ExampleError` where the caller's own sequences are shorter.
    """
    trial = replace(draw, generator=torch.Generator().manual_seed(22), turns=count())
    longest = max(sample.frames for sample in draw.samples)
    if draw.signature.stepwise or _fails(eager, trial, longest):
        # Of a model that answers the example with a NaN nothing can be told so; the gate says more.
        return draw, ""
    where, least = "", 1
    while least < longest and (culprit := _fails(eager, trial, least)):
        where, least = culprit, least + 1
    if not where:
        return draw, ""
    for frames in range(least + 1, least + _MORE):
        if culprit := _fails(eager, trial, frames):
            raise ModelError(
                f"{eager.name} runs on {least} frames and not on {frames} ({culprit}); pad in forward, so that it "
                "takes any number of frames from some least one on"
            )
    if short := next((stream.frames for stream in draw.given if stream.frames < least), None):
        raise ExampleError(
            f"data has a sequence of {short} frames, and {where} needs at least {least}; give longer ones"
        )
    return replace(draw, signature=replace(draw.signature, least_frames=least)), where


def _fails(eager: Eager, draw: Draw, frames: int) -> str:
    """What fails on a sequence of so many frames, or answers with a NaN, in words; empty where nothing does."""
    arguments = draw.arguments(draw.stream(frames))
    with warnings.catch_warnings(), Recorder(eager.module) as recorder, track(eager.module) as modules:
        # PyTorch warns of a deviation of one value, which is what is looked for.
        warnings.simplefilter("ignore")
        try:
            outputs = eager.run(arguments)
        except ExampleError:
            path, module = modules[-1]
            return f"{path} ({type(module).__name__})" if path else f"the code of {eager.name}.forward"
    if not any(map(_has_nan, outputs)):
        return ""
    first = next((r for r in recorder.records if _has_nan(r.returned) and not _has_nan(r.given)), None)
    return first.name if first and first.path else f"the code of {eager.name}.forward"


def _has_nan(x: Tensor) -> bool:
    return x.is_floating_point() and bool(torch.isnan(x).any())
