"""Which axes are batch and time, found by experiment: grow one, and see what the recurrent layers and outputs do."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from carousel_export.eager import Eager
from carousel_export.errors import ExampleError, ModelError
from carousel_export.following import Following, find_following, find_reduced, misnamed, several
from carousel_export.given import Axes, given_axes, given_sources
from carousel_export.names import input_names_of, output_names_of
from carousel_export.recurrent import sides_of, states_of
from carousel_export.runs import Run, grow, grow_all, grown_runs, run_on
from carousel_export.signature import BATCH, SOURCE, TIME, Dims, Port, Signature, State


def find_signature(
    eager: Eager,
    example: tuple[Tensor, ...],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Signature:
    """The model's signature, from running it on the example inputs and on grown ones.

    `dims` names the axes of inputs, by input name and in the eager model's order, and is believed; where it is absent
    the axes are found. An input without time is a context, whose other axes are named where the model takes any size of
    them. Sizes of the example may coincide. Raises `ExampleError` where no axis is batch or time, where an output
    follows neither, or for an example that the model does not run on; `ModelError`, naming the layer, where a recurrent
    layer does not run over the model's own time.
    """
    names = input_names_of(eager, example, input_names)
    tree = eager.run_tree(example)
    base = run_on(eager, example)
    assert base is not None, "the example ran a moment ago"
    if not base.calls:
        raise ModelError(f"{eager.name} did not call any of its recurrent layers ({', '.join(eager.recurrent)})")
    given = given_axes(names, example, dims)
    time_axes = given[TIME] if given else _search(eager, example, base, TIME) or find_reduced(eager, example, base)
    if time_axes is None:
        raise _lost(eager, example, base, names)
    batch_axes = given[BATCH] if given else _search(eager, example, base, BATCH)
    roles: list[tuple[str, Axes]] = [(TIME, time_axes), *([] if batch_axes is None else [(BATCH, batch_axes)])]
    if None in time_axes:
        _check_contexts(names, time_axes, batch_axes)
        roles += given_sources(names, dims) if dims else _find_sources(eager, example, base, roles)
    eager_dims = [
        _dims(x, {axis: role for role, axes in roles if (axis := axes[i]) is not None}) for i, x in enumerate(example)
    ]
    named_outputs = output_names_of(tree, output_names)
    following = find_following(eager, example, base, time_axes, named_outputs, given=bool(given))
    outputs = _output_dims(eager, example, base, roles[1:], named_outputs, following)
    if batch_axes is None:
        whole = tuple(axis for axis in time_axes if axis is not None)
        fed_inputs, fed_outputs = _find_fed(eager, example, whole, eager_dims, outputs)
    else:
        fed_inputs, fed_outputs = eager_dims, list(outputs.values())
    ports = [
        Port(name, x.dtype, named, fed)
        for name, x, named, fed in zip(names, example, eager_dims, fed_inputs, strict=True)
    ]
    return Signature(
        inputs=tuple(port for port in ports if port.timed),
        contexts=tuple(port for port in ports if not port.timed),
        arguments=names,
        outputs=tuple(
            Port(name, y.dtype, named, fed)
            for (name, named), y, fed in zip(outputs.items(), base.outputs, fed_outputs, strict=True)
        ),
        states=tuple(
            State.of(call.name, kind.letter, kind.rows, kind.size, initial=initial)
            for call in base.calls
            if call.name not in eager.calling.computed
            for kind, initial in zip(
                states_of(call.module), eager.calling.starts.get(call.name, itertools.repeat(None)), strict=False
            )
        ),
        bidirectional=any("reverse" in sides_of(call.module) for call in base.calls),
        extents=following.extents,
        stride=following.stride,
    )


class Search:
    """Experiments on an example: which axes have a role, and which axes of the outputs follow them."""

    def __init__(self, eager: Eager, example: tuple[Tensor, ...]) -> None:
        self._eager = eager
        self._example = example
        base = run_on(eager, example)
        assert base is not None, "the example ran a moment ago"
        self.base = base

    def find(self, role: str) -> Axes | None:
        """For each input its axis that is batch, or time; None where none is."""
        return _search(self._eager, self._example, self.base, role)

    def find_sources(self, roles: Sequence[tuple[str, Axes]]) -> list[tuple[str, Axes]]:
        """The axes of inputs without time that are their own, named."""
        return _find_sources(self._eager, self._example, self.base, roles)

    def name_outputs(self, roles: Sequence[tuple[str, Axes]], names: Sequence[str]) -> dict[str, Dims]:
        """The outputs' axes."""
        return _output_dims(self._eager, self._example, self.base, roles, names)


def _search(eager: Eager, example: tuple[Tensor, ...], base: Run, role: str) -> Axes | None:
    """For each input its axis that is `role`: growing them together grows that of each recurrent call, no other."""
    for axes, run in grown_runs(eager, example):
        if not _strayed(base, run, role):
            return axes
    return None


def _check_contexts(names: Sequence[str], time_axes: Axes, batch_axes: Axes | None) -> None:
    """A context has a batch, as every input beside it."""
    for i, name in enumerate(names):
        if batch_axes is None or batch_axes[i] is None:
            what = "neither time nor batch" if time_axes[i] is None else "no batch"
            raise ExampleError(
                f"{name!r} has {what} among its axes; write forward for [batch, time, …] inputs, and [batch, …] for "
                "what holds for a whole session"
            )


def _find_sources(
    eager: Eager, example: tuple[Tensor, ...], base: Run, roles: Sequence[tuple[str, Axes]]
) -> list[tuple[str, Axes]]:
    """The axes of contexts in which sessions may differ: growing them leaves every recurrent call as it is."""
    taken = [{axes[i] for _, axes in roles} for i in range(len(example))]
    is_context = [axis is None for axis in dict(roles)[TIME]]
    free = [
        {axis for axis in range(x.dim()) if axis not in used and x.shape[axis] > 1} if context else set()
        for x, used, context in zip(example, taken, is_context, strict=True)
    ]
    found: list[tuple[str, Axes]] = []
    while axes := next((axes for axes, run in grown_runs(eager, example, free) if run.calls == base.calls), None):
        found.append((SOURCE if not found else f"{SOURCE}_{len(found) + 1}", axes))
        for unnamed, axis in zip(free, axes, strict=True):
            unnamed.discard(-1 if axis is None else axis)
    return found


def _strayed(base: Run, run: Run, role: str) -> list[str]:
    """The recurrent calls that do not have exactly one more along `role`, and all else as before."""
    if [call.name for call in base.calls] != [call.name for call in run.calls]:
        return [call.name for call in base.calls]
    return [
        was.name
        for was, now in zip(base.calls, run.calls, strict=True)
        if now.sizes != {**was.sizes, role: was.sizes.get(role, 0) + 1}
    ]


def _lost(eager: Eager, example: tuple[Tensor, ...], base: Run, names: Sequence[str]) -> Exception:
    """Why no axis is time: the recurrent call that does not follow the best candidate."""
    for axes, run in grown_runs(eager, example):
        pairs = zip(names, axes, strict=True)
        where = ", ".join(f"axis {axis} of {name!r}" for name, axis in pairs if axis is not None)
        if len(run.calls) != len(base.calls):
            calls = sorted({call.name.partition(".call")[0] for call in run.calls})
            return ModelError(
                f"{calls[0]} is called once for each entry of {where}; call it once on the whole sequence"
            )
        strayed = _strayed(base, run, TIME)
        if len(strayed) < len(base.calls):
            return ModelError(
                f"{strayed[0]} does not run over the model's time ({where}): it sees "
                f"{dict(next(call.sizes for call in base.calls if call.name == strayed[0]))}; "
                "only layers that take one step a frame can be exported"
            )
    if all(call.sizes[TIME] == 1 for call in base.calls):
        return ExampleError(
            f"{eager.name} takes one frame at a time: {base.calls[0].name} takes one step, and no more when an axis of "
            f"the inputs ({', '.join(names)}) grows; write forward for any number of frames, or take the state as an "
            "argument and return it: then it is run frame by frame"
        )
    return ExampleError(
        f"no axis of the inputs ({', '.join(names)}) is time: growing none by one gives {base.calls[0].name} one more "
        "step and leaves its batch alone; name the axes with dims, and give the inputs a value for each frame"
    )


def _output_dims(
    eager: Eager,
    example: tuple[Tensor, ...],
    base: Run,
    roles: Sequence[tuple[str, Axes]],
    names: Sequence[str],
    following: Following | None = None,
) -> dict[str, Dims]:
    """The outputs' axes: those that follow time, as found, and those that follow the other roles."""
    named: list[dict[int, str]] = [{} for _ in base.outputs] if following is None else list(map(dict, following.axes))
    for role, axes in roles:
        grown = run_on(eager, grow_all(example, axes))
        if grown is None or (role == BATCH and _strayed(base, grown, role)):
            raise misnamed(eager, role, fails=grown is None)
        for name, was, now, found in zip(names, base.outputs, grown.outputs, named, strict=True):
            axes_grown = [axis for axis in range(was.dim()) if now.shape[axis] != was.shape[axis]]
            if len(axes_grown) > 1 or (role == BATCH and not axes_grown):
                raise several(name, was, role, len(axes_grown))
            found.update(dict.fromkeys(axes_grown, role))
    return {name: _dims(y, found) for name, y, found in zip(names, base.outputs, named, strict=True)}


def _find_fed(
    eager: Eager,
    example: tuple[Tensor, ...],
    time_axes: tuple[int, ...],
    input_dims: Sequence[Dims],
    outputs: Mapping[str, Dims],
) -> tuple[list[Dims], list[Dims]]:
    """Where a model that takes one sequence at a time can take a batch without any sequence's answer changing."""
    longer = [grow(x, axis, max(5, x.shape[axis])) for x, axis in zip(example, time_axes, strict=True)]
    rows = [[x.roll(shift, axis) for x, axis in zip(longer, time_axes, strict=True)] for shift in range(3)]
    alone = [eager.run(row) for row in rows]
    for place in range(min(x.dim() for x in example) + 1):
        together = eager.try_run([torch.stack(x, place) for x in zip(*rows, strict=True)])
        if together is None:
            continue
        axes = [
            next((axis for axis in range(y.dim()) if _is_stack(y, [row[i] for row in alone], axis)), None)
            for i, y in enumerate(together)
        ]
        if len(together) == len(outputs) and None not in axes:
            fed = [(*named[:place], BATCH, *named[place:]) for named in input_dims]
            pairs = zip(outputs.values(), axes, strict=True)
            return fed, [(*named[:axis], BATCH, *named[axis:]) for named, axis in pairs]
    raise ModelError(
        f"{eager.name} takes one sequence at a time and answers differently, or not at all, when it is given a batch; "
        "write its forward for [batch, time, …] inputs"
    )


def _is_stack(together: Tensor, alone: Sequence[Tensor], axis: int) -> bool:
    if together.shape[axis] != len(alone) or together.select(axis, 0).shape != alone[0].shape:
        return False
    pairs = zip(together.unbind(axis), alone, strict=True)
    return all(torch.allclose(row.double(), y.double(), rtol=0, atol=1e-5) for row, y in pairs)


def _dims(x: Tensor, named: Mapping[int, str]) -> Dims:
    return tuple(named.get(axis, str(size)) for axis, size in enumerate(x.shape))
