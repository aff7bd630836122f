"""Runs of a model on its example and on grown ones: what its recurrent calls see, and what it returns."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carousel_export.eager import Eager, plain
from carousel_export.given import Axes
from carousel_export.recurrent import Layer, States
from carousel_export.signature import BATCH, TIME


@dataclass(frozen=True)
class Call:
    """A recurrent call that was seen: its input's size along time and, where it has one, batch."""

    name: str
    module: Layer
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """One run: its recurrent calls in order, and the model's outputs."""

    calls: tuple[Call, ...]
    outputs: Sequence[Tensor]


def grow(x: Tensor, axis: int, size: int) -> Tensor:
    """`x` with `size` entries along an axis, its own over and over, so that each value stays one the model knows."""
    return x.index_select(axis, torch.arange(size) % x.shape[axis])


def run_on(eager: Eager, inputs: Sequence[Tensor]) -> Run | None:
    """A run on these inputs; None where the model fails on them."""
    calls: list[Call] = []

    def watch(name: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        time, batch = (0, None) if x.dim() == 2 else (1, 0) if module.batch_first else (0, 1)
        sizes = {TIME: x.shape[time], **({} if batch is None else {BATCH: x.shape[batch]})}
        calls.append(Call(name, module, sizes))
        return plain(name, module, x, hx)

    outputs = eager.try_run(inputs, watch)
    return None if outputs is None else Run(tuple(calls), outputs)


def candidates(example: Sequence[Tensor], free: Sequence[Collection[int]] | None = None) -> Iterator[Axes]:
    """Axes of one size, at most one of each input, that may have one role: of `free`, or of all.

    As few as can be first: what does not have to grow with the others is not of their role. But a size of one is taken
    for any other by code that broadcasts, and there as many as can be come first.
    """
    choices = [(None, *axes) for axes in free or [range(x.dim()) for x in example]]
    found = []
    for axes in itertools.product(*choices):
        sizes = {x.shape[axis] for x, axis in zip(example, axes, strict=True) if axis is not None}
        if len(sizes) == 1:
            count = sum(axis is not None for axis in axes)
            found.append((count if sizes != {1} else len(axes) - count, axes))
    return (axes for _, axes in sorted(found, key=lambda entry: entry[0]))


def grown_runs(
    eager: Eager, example: tuple[Tensor, ...], free: Sequence[Collection[int]] | None = None
) -> Iterator[tuple[Axes, Run]]:
    """Runs with candidate axes grown by one together."""
    for axes in candidates(example, free):
        found = run_on(eager, grow_all(example, axes))
        if found is not None:
            yield axes, found


def grow_all(example: tuple[Tensor, ...], axes: Axes, by: int = 1) -> list[Tensor]:
    """The example with these axes grown together."""
    return [x if axis is None else grow(x, axis, x.shape[axis] + by) for x, axis in zip(example, axes, strict=True)]
