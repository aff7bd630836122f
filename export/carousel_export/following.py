"""What follows time: the model run at many numbers of frames, to see how its recurrent layers and outputs grow."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from carousel_export.eager import Eager
from carousel_export.errors import ExampleError
from carousel_export.extent import TIME_OUT, Extent, fit
from carousel_export.given import Axes
from carousel_export.runs import Run, candidates, grow_all, run_on
from carousel_export.signature import BATCH, TIME

# So many frames more show a size that follows time with any stride up to half of it; most need the first alone.
_SPANS = (64, 256)


@dataclass(frozen=True)
class Following:
    """For each output its axis that follows time, if one does, and what it is called.

    `stride`: the most frames that one of a recurrent layer or of an output stands for; 0: all have those of the inputs.
    """

    axes: tuple[Mapping[int, str], ...]
    extents: tuple[Extent, ...]
    stride: int


def find_reduced(eager: Eager, example: tuple[Tensor, ...], base: Run) -> Axes | None:
    """For each input its axis that is time, where recurrent layers run over fewer frames than the model is given."""
    for span, axes in itertools.product(_SPANS, candidates(example)):
        far = run_on(eager, grow_all(example, axes, span))
        if far is not None and all(0 < by <= span for by in _growth(base, far)):
            return axes
    return None


def find_following(
    eager: Eager, example: tuple[Tensor, ...], base: Run, axes: Axes, names: Sequence[str], *, given: bool
) -> Following:
    """How the outputs follow time, which is `axes` of the inputs, `given` by the caller or found.

    Raises `ExampleError` for axes that the recurrent calls do not follow, for an output with several such axes or a
    size that is no extent, and for a number of frames that the model fails on.
    """
    (frames,) = {x.shape[axis] for x, axis in zip(example, axes, strict=True) if axis is not None}
    runs = {frames: base}
    for span in _SPANS:
        for by in (1, span, *range(2, span)):
            if by == 2 and _is_exact(runs, frames):
                break
            if frames + by not in runs:
                runs[frames + by] = _longer(eager, example, base, axes, by, given=given)
        sizes = [_sizes(runs, i, y.dim()) for i, y in enumerate(base.outputs)]
        if all(fit(axis) for shape in sizes for axis in shape if len(set(axis.values())) > 1):
            break
    if 0 in _growth(base, runs[max(runs)]):
        raise misnamed(eager, TIME, fails=False)
    extents: list[Extent] = []
    named: list[dict[int, str]] = []
    for name, y, shape in zip(names, base.outputs, sizes, strict=True):
        growing = [axis for axis, entries in enumerate(shape) if len(set(entries.values())) > 1]
        if len(growing) > 1:
            raise several(name, y, TIME, len(growing))
        named.append({axis: _name(name, shape[axis], extents) for axis in growing})
    strides = [extent.stride for extent in extents]
    for i in range(len(base.calls)):
        frames_of = {n: run.calls[i].sizes[TIME] for n, run in runs.items()}
        if any(n != size for n, size in frames_of.items()):
            found = fit(frames_of)
            strides.append(found.stride if found else max(_SPANS))
    return Following(tuple(named), tuple(extents), max(strides, default=0))


def _longer(eager: Eager, example: tuple[Tensor, ...], base: Run, axes: Axes, by: int, *, given: bool) -> Run:
    inputs = grow_all(example, axes, by)
    found = run_on(eager, inputs)
    if found is None:
        if not given:
            # It fails again, and says how.
            eager.run(inputs)
        raise misnamed(eager, TIME, fails=True)
    if not all(0 <= grown <= by for grown in _growth(base, found)):
        raise misnamed(eager, TIME, fails=False)
    return found


def _sizes(runs: Mapping[int, Run], output: int, rank: int) -> list[dict[int, int]]:
    """Of each axis of an output, its size by frames."""
    return [{n: run.outputs[output].shape[axis] for n, run in runs.items()} for axis in range(rank)]


def misnamed(eager: Eager, role: str, *, fails: bool) -> ExampleError:
    """Why named axes cannot be `role`."""
    where = f"{eager.name} cannot run with one more along {role}; dims may" if fails else "dims do"
    return ExampleError(f"{where} not name the axis that is {role} of every recurrent layer; correct them")


def several(name: str, y: Tensor, role: str, count: int) -> ExampleError:
    """Why an output's axes are none to tell apart."""
    return ExampleError(
        f"output {name!r} {list(y.shape)} has {count} axes that follow {role}, which has to be one; return a value for "
        "each frame, or one for each sequence"
    )


def _growth(base: Run, run: Run) -> Iterable[int]:
    """By how many frames each recurrent call has grown; −1 where it has changed otherwise."""
    if [call.name for call in base.calls] != [call.name for call in run.calls]:
        return [-1]
    return [
        now.sizes[TIME] - was.sizes[TIME] if now.sizes.get(BATCH) == was.sizes.get(BATCH) else -1
        for was, now in zip(base.calls, run.calls, strict=True)
    ]


def _is_exact(runs: Mapping[int, Run], frames: int) -> bool:
    """Whether all that grew has grown as time has."""
    base = runs[frames]
    return all(
        set(_growth(base, run)) == {n - frames}
        and all(
            a == b or (a == frames and b == n)
            for was, now in zip(base.outputs, run.outputs, strict=True)
            for a, b in zip(was.shape, now.shape, strict=True)
        )
        for n, run in runs.items()
        if n != frames
    )


def _name(output: str, sizes: Mapping[int, int], extents: list[Extent]) -> str:
    """What an axis with these sizes by frames is called; an extent not among the known ones is added to them."""
    if all(size == frames for frames, size in sizes.items()):
        return TIME
    found = fit(sizes)
    if found is None:
        (a, b), (frames, more) = list(sizes.values())[:2], list(sizes)[:2]
        raise ExampleError(
            f"output {output!r} has {a} entries for {frames} frames and {b} for {more}; return a value for each frame, "
            "for each few of them (frames / a stride), or one for the sequence"
        )
    named = next((each for each in extents if (each.stride, each.offset) == (found.stride, found.offset)), None)
    if named is None:
        named = replace(found, name=f"{TIME_OUT}_{len(extents) + 1}" if extents else TIME_OUT)
        extents.append(named)
    return named.name
