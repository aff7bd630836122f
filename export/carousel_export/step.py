"""Models that take one frame a call, since their code sees the state beside the recurrent layers: found, run once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.axes import Search
from carousel_export.calling import Passed
from carousel_export.eager import Eager, run_layer
from carousel_export.errors import ExampleError, ModelError
from carousel_export.given import Axes, given_axes, given_sources
from carousel_export.lift import LiftedModel
from carousel_export.names import input_names_of, output_names_of
from carousel_export.recurrent import Layer, States, states_of
from carousel_export.signature import BATCH, TIME, Dims, Port, Signature, State


@dataclass(frozen=True)
class _Seen:
    """A run in which every recurrent call answers the same, whatever its state: what else was computed."""

    # The frames that each call saw.
    frames: Mapping[str, int]
    values: Sequence[Tensor]


def takes_one_frame(eager: Eager, example: Sequence[Tensor]) -> bool:
    """Whether the model is a step: it is called on one frame, and its code uses the state beside the recurrent layers,
    or runs on no more than one.

    Raises `ExampleError` for a model that uses its state so and is called on several frames, `ModelError` for a step
    with a state that is not passed in or not returned.
    """
    passed = eager.calling.states
    if not passed or eager.written is not None:
        return False
    runs = [_run(eager, example, passed) for _ in range(2)]
    used = not all(_same(a, b) for a, b in zip(runs[0].values, runs[1].values, strict=True))
    frames = max(runs[0].frames.values())
    if not used and (frames > 1 or Search(eager, tuple(example)).find(TIME)):
        return False
    if frames > 1:
        raise ExampleError(
            f"{eager.name} uses the state of {passed[0].call} outside of it, so that its answer depends on how a "
            "stream is cut; give an example of one frame, and it is run frame by frame"
        )
    calls = {leaf.call for leaf in passed}
    if alone := [call for call in runs[0].frames if call not in calls]:
        raise ModelError(
            f"{eager.name} takes one frame at a time, and {alone[0]} starts each from its own state; take that as an "
            "argument of forward, and return it"
        )
    if len(eager.calling.dropped) < len(passed):
        raise ModelError(
            f"{eager.name} takes one frame at a time and the state of {passed[0].call}; return every state that it "
            "takes"
        )
    return True


def find_step(
    eager: Eager,
    example: tuple[Tensor, ...],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Signature:
    """The signature of a model that takes one frame a call, with time where its one frame is.

    An input with an axis of size 1 beside its batch has a value for each frame; any other is a context. `dims` are
    believed. Raises `ExampleError` where no axis is batch, or an input or output has none of one frame.
    """
    names = input_names_of(eager, example, input_names)
    outputs = output_names_of(eager.run_tree(example), output_names)
    passed = eager.calling.states
    calling = eager.calling
    places = {id(leaf): len(example) + i for i, leaf in enumerate(passed)}
    # The states grow with the batch as inputs do.
    together = (*example, *(leaf.zeros for leaf in passed))
    given = given_axes(names, example, dims)
    try:
        eager.calling = replace(
            calling,
            layout=pytree.tree_map(lambda leaf: places.get(id(leaf), leaf), calling.layout),
        )
        search = Search(eager, together)
        batch: Axes | None = (*(given[BATCH] or ()), *[1] * len(passed)) if given else search.find(BATCH)
        if batch is None or None in batch[: len(example)] or len(batch) != len(together):
            raise ExampleError(
                f"{eager.name} takes one frame at a time, and no axis of its inputs ({', '.join(names)}) is batch; "
                "write forward for [batch, 1, …] inputs, and name the axes with dims"
            )
        time = given[TIME] if given else tuple(_frame_axis(x, axis) for x, axis in zip(example, batch, strict=False))
        assert time is not None, "dims name time"
        if set(time) == {None}:
            raise ExampleError(
                f"{eager.name} takes one frame at a time, and no input ({', '.join(names)}) has an axis of that one "
                "frame; write forward for [batch, 1, …] inputs"
            )
        roles: list[tuple[str, Axes]] = [(BATCH, batch)]
        frames = (*time, *[0] * len(passed))
        states = [None] * len(passed)
        roles += (
            [(name, (*axes, *states)) for name, axes in given_sources(names, dims)]
            if dims
            else search.find_sources([*roles, (TIME, frames)])
        )
        found = search.name_outputs(roles, outputs)
        calls, results = search.base.calls, search.base.outputs
    finally:
        eager.calling = calling
    ports = []
    for i, (name, x) in enumerate(zip(names, example, strict=True)):
        named = {axis: role for role, axes in [*roles, (TIME, frames)] if (axis := axes[i]) is not None}
        axes = tuple(named.get(axis, str(size)) for axis, size in enumerate(x.shape))
        ports.append(Port(name, x.dtype, axes, axes))
    answered = [(name, y.dtype, _with_time(name, axes)) for (name, axes), y in zip(found.items(), results, strict=True)]
    return Signature(
        inputs=tuple(port for port in ports if port.timed),
        contexts=tuple(port for port in ports if not port.timed),
        arguments=names,
        outputs=tuple(Port(name, dtype, axes, axes) for name, dtype, axes in answered),
        states=tuple(
            State.of(call.name, kind.letter, kind.rows, kind.size) for call in calls for kind in states_of(call.module)
        ),
        bidirectional=False,
        stepwise=True,
    )


class Step(nn.Module):
    """A lifted model on one frame: its inputs `[batch, …]`, contexts and states → outputs `[batch, …]` and states."""

    def __init__(self, lifted: LiftedModel) -> None:
        super().__init__()
        self.lifted = lifted

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        signature = self.lifted.signature
        count = len(signature.inputs)
        lengths = torch.ones_like(tensors[-1][:, 0, 0], dtype=torch.int32)
        results = self.lifted(*(x.unsqueeze(1) for x in tensors[:count]), lengths, *tensors[count:])
        outputs = len(signature.outputs)
        return (*(y.select(1, 0) for y in results[:outputs]), *results[outputs:])


def frame_dims(dims: Mapping[str, Dims], signature: Signature) -> dict[str, Dims]:
    """What a step takes of what its repetition takes: no lengths, and inputs without time."""
    names = {port.name for port in (*signature.inputs, *signature.contexts)} | {s.input for s in signature.states}
    return {name: tuple(dim for dim in axes if dim != TIME) for name, axes in dims.items() if name in names}


def frame_of(tensors: Sequence[Tensor], signature: Signature) -> list[Tensor]:
    """The first frame of the contract's inputs, as a step takes it."""
    count = len(signature.inputs)
    return [*(x[:, 0] for x in tensors[:count]), *tensors[count + 1 :]]


def _run(eager: Eager, example: Sequence[Tensor], passed: Sequence[Passed]) -> _Seen:
    frames: dict[str, int] = {}
    values: list[Tensor] = []

    def watch(call: str, module: Layer, x: Tensor, _hx: States | None) -> tuple[Tensor, States]:
        frames[call] = x.shape[1 if module.batch_first and x.dim() == 3 else 0]
        values.append(x)
        y, ended = run_layer(module, x, None)
        return torch.ones_like(y), tuple(map(torch.ones_like, ended))

    states: dict[str, States] = {}
    for leaf in passed:
        rows = list(states.get(leaf.call, (leaf.zeros,) * (1 + max(p.place for p in passed if p.call == leaf.call))))
        rows[leaf.place] = torch.rand_like(leaf.zeros) * 2 - 1
        states[leaf.call] = tuple(rows)
    outputs = eager.run(example, watch, states=states)
    return _Seen(frames, [*values, *outputs])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True))


def _frame_axis(x: Tensor, batch: int | None) -> int | None:
    return next((axis for axis in range(x.dim()) if axis != batch and x.shape[axis] == 1), None)


def _with_time(name: str, dims: Dims) -> Dims:
    if "1" not in dims:
        raise ExampleError(
            f"output {name!r} [{', '.join(dims)}] has no axis of the one frame that forward takes; return [batch, 1, …]"
        )
    at = dims.index("1")
    return (*dims[:at], TIME, *dims[at + 1 :])
