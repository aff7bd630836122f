"""Re-rolling: from a model's calls over a few frames to the same model over whole sequences, without loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.errors import ModelError
from carousel_export.loops.chains import Chain, feeds_back, find_chains, input_of
from carousel_export.loops.lanes import Lanes, Numbering
from carousel_export.loops.program import Batched, Framed, Program, Register, Step, run_framewise
from carousel_export.loops.trace import Call, Trace, Value

_CATS = (torch.cat, torch.concat, torch.concatenate)
_ZEROS = (torch.zeros, torch.zeros_like, Tensor.new_zeros)
# A frame-wise call does the same sums over whole sequences, in another order at most.
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Whole:
    """A register `[time, batch, …]`, a lane a frame; `order` 1: the first lane stands first, −1: last, 0: all alike."""

    register: Register
    order: int


@dataclass(frozen=True)
class Layer:
    """A chain as a recurrent layer: the step that runs it, and whether it runs from the last frame to the first."""

    chain: Chain
    step: int
    reverse: bool


class NoSequenceError(Exception):
    """These lanes are no sequence; says why."""


class Roller:
    """Builds the program of one trace. Raises `ModelError`, naming the cell, for a loop that cannot be re-rolled."""

    def __init__(self, model: nn.Module, trace: Trace, frames: int, batch: int) -> None:
        self.model, self.frames, self.batch = model, frames, batch
        self.numbering = Numbering()
        self.chains = find_chains(trace, self.numbering, frames)
        self._places = {call: (chain, i) for chain in self.chains for i, call in enumerate(chain.calls)}
        self.steps: list[Step] = []
        self.layers: dict[Chain, Layer] = {}
        self._emitted: dict[Call, int] = {}
        self._registers: dict[Value, Register] = {}
        self._sequences: dict[tuple[Value, ...], Whole] = {}
        self._sources: dict[tuple[Value, int, bool], Register] = {}
        self._framed: dict[tuple[Call, ...], Whole] = {}
        self._why = ""
        self.outputs = pytree.tree_map_only(Value, self.emit, trace.outputs)

    def program(self) -> Program:
        """The whole model."""
        return Program(tuple(self.steps), self.outputs)

    def emit(self, value: Value) -> Register:
        """A tensor outside of loops."""
        value = self.numbering.canonical(value)
        if value not in self._registers:
            self._registers[value] = self._emit(value)
        return self._registers[value]

    def _emit(self, value: Value) -> Register:
        call = value.call
        if call in self._places:
            return self._final(value, *self._places[call])
        if isinstance(call.path, int):
            return Register(-1, call.path)
        if call.target is None:
            return self._step(Step(None, constant=call.path or value.result))
        if (whole := self._whole(value)) is not None:
            return whole
        if call not in self._emitted:
            args, kwargs = pytree.tree_map_only(Value, self.emit, (call.args, call.kwargs))
            self._emitted[call] = self._step(Step(call.target, args, kwargs, copies=call.wrote is not None)).step
        return Register(self._emitted[call], value.leaf)

    def _whole(self, value: Value) -> Register | None:
        """A sequence that was put together of lanes."""
        try:
            if lanes := self.numbering.lanes(value, self.frames):
                return self._place(self.roll(lanes.values), lanes)
            call = value.call
            if call.target in _CATS and len(call.values) == self.frames:
                # Frame after frame along an axis that has something else as well: [time × batch, …].
                dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
                dim %= value.result.dim()
                rolled = self._ascending(self.roll([self.numbering.canonical(v) for v in call.values]))
                moved = self._function(torch.movedim, rolled, 0, dim)
                return self._function(torch.flatten, moved, dim, dim + 1)
        except NoSequenceError as error:
            self._why = self._why or str(error)
        return None

    def _place(self, sequence: Whole, lanes: Lanes) -> Register:
        register = self._ascending(sequence)
        if lanes.axis:
            register = self._function(torch.movedim, register, 0, lanes.axis)
        # A lane that kept the axis has it, of one entry, behind the frames.
        return self._function(torch.squeeze, register, lanes.axis + 1) if lanes.kept else register

    def _ascending(self, sequence: Whole) -> Register:
        if sequence.order == 0:
            raise NoSequenceError("the same tensor in every frame")
        return sequence.register if sequence.order > 0 else self._function(torch.flip, sequence.register, [0])

    def roll(self, values: Sequence[Value]) -> Whole:
        """The sequence whose lanes these are, in whatever order. Raises `NoSequenceError` where they are none."""
        values = tuple(self.numbering.canonical(value) for value in values)
        for key, turn in ((values, 1), (values[::-1], -1)):
            if key in self._sequences:
                known = self._sequences[key]
                return Whole(known.register, known.order * turn)
        if len(values) != self.frames:
            raise NoSequenceError(f"{len(values)} tensors over {self.frames} frames")
        found = self._roll(values)
        self._sequences[values] = found
        return found

    def _roll(self, values: tuple[Value, ...]) -> Whole:
        if all(value == values[0] for value in values):
            return Whole(self.emit(values[0]), 0)
        calls = [value.call for value in values]
        if any(call in self._places for call in calls):
            return self._answers(values)
        if source := self.numbering.source(values):
            key = (source.base, source.axis, source.kept)
            if key not in self._sources:
                register = self._function(torch.movedim, self.emit(source.base), source.axis, 0)
                self._sources[key] = (
                    self._function(torch.unsqueeze, register, source.axis + 1) if source.kept else register
                )
            return Whole(self._sources[key], source.order)
        return self._framewise(values)

    def _answers(self, values: tuple[Value, ...]) -> Whole:
        """What a cell answered in each frame."""
        chain, _ = self._places.get(values[0].call, (None, 0))
        places = [place for value in values if (place := self._places.get(value.call, (None, 0))[1]) is not None]
        if chain is None or {value.call for value in values} != set(chain.calls) or len({v.leaf for v in values}) > 1:
            raise NoSequenceError("frames that take a cell's answers to other frames than their own")
        if values[0].leaf:
            raise NoSequenceError(f"the cell state c of {chain.where()} in every frame, where a layer gives h alone")
        order = {tuple(range(self.frames)): 1, tuple(range(self.frames))[::-1]: -1}.get(tuple(places))
        if order is None:
            raise NoSequenceError(f"the answers of {chain.where()} in another order than that of the frames")
        layer = self.layer(chain)
        return Whole(Register(layer.step), order * (-1 if layer.reverse else 1))

    def layer(self, chain: Chain) -> Layer:
        """The layer that a chain becomes."""
        if chain not in self.layers:
            try:
                frames = self.roll([input_of(call) for call in chain.calls])
            except NoSequenceError as error:
                raise ModelError(self._unrollable(chain, error)) from None
            x: Register = frames.register
            if frames.order == 0:
                x = self._function(_repeated, x, self.frames)
            zero = all(value.call.target in _ZEROS for value in chain.initial)
            initial = [] if zero else [self.emit(value) for value in chain.initial]
            hx = [self._function(torch.unsqueeze, register, 0) for register in initial]
            args = (x,) if not hx else (x, hx[0] if len(hx) == 1 else tuple(hx))
            step = self._step(Step(chain.path, args)).step
            self.layers[chain] = Layer(chain, step, frames.order < 0)
        return self.layers[chain]

    def _unrollable(self, chain: Chain, error: NoSequenceError) -> str:
        if feeds_back(chain):
            return (
                f"{chain.where()} is given, frame by frame, what was computed from its answer to the frame before; "
                "export the step alone and feed its answer back where you call it"
            )
        return (
            f"{chain.where()} cannot be exported for any number of frames: its inputs are {error}; do the same in each "
            "frame, in the order of time"
        )

    def _final(self, value: Value, chain: Chain, place: int) -> Register:
        """A cell's answer outside of the loop: the last one is the layer's own final state, in rows of any length."""
        layer = self.layer(chain)
        if place == self.frames - 1:
            return self._function(torch.squeeze, Register(layer.step, 1 + value.leaf), 0)
        if place == 0 and value.leaf == 0:
            return self._function(torch.select, Register(layer.step), 0, -1 if layer.reverse else 0)
        why = self._why or "its answer to one frame in the middle is used alone"
        raise ModelError(
            f"the loop over {chain.where()} cannot be exported for any number of frames: {why}; do the same in each "
            "frame, and stack the answers in the order of time"
        )

    def _framewise(self, values: tuple[Value, ...]) -> Whole:
        """A call that is made alike in each frame, on lanes and on what all frames share."""
        calls = tuple(value.call for value in values)
        first = calls[0]
        flat = [pytree.tree_flatten((call.args, call.kwargs)) for call in calls]
        name = first.target if isinstance(first.target, str) else getattr(first.target, "__name__", "a constant")
        if (
            any(call.target is None or call.target != first.target for call in calls)
            or any(spec != flat[0][1] for _, spec in flat)
            or len({value.leaf for value in values}) > 1
        ):
            raise NoSequenceError(f"not the same in each frame: {name} in one, something else in another")
        if calls not in self._framed:
            columns = [self._column(column, str(name)) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
            self._framed[calls] = self._over_frames(calls, columns, flat[0][1], str(name))
        known = self._framed[calls]
        return Whole(Register(known.register.step, values[0].leaf), known.order)

    def _column(self, column: tuple[Any, ...], name: str) -> Any:
        """One argument of a call in every frame."""
        if all(isinstance(leaf, Value) for leaf in column):
            return self.roll(column)
        if any(type(leaf) is not type(column[0]) or leaf != column[0] for leaf in column):
            raise NoSequenceError(
                f"not the same in each frame: {name} has {column[0]!r:.40} in one, {column[1]!r:.40} in another"
            )
        return column[0]

    def _over_frames(self, calls: tuple[Call, ...], columns: list[Any], spec: pytree.TreeSpec, name: str) -> Whole:
        rolled = [column for column in columns if isinstance(column, Whole) and column.order]
        if not rolled:
            return Whole(self.emit(Value(calls[0])), 0)
        order = rolled[0].order if all(each.order == rolled[0].order for each in rolled) else 1
        given = [pytree.tree_leaves((call.args, call.kwargs)) for call in calls]
        tensors: list[Any] = []
        registers: list[Any] = []
        for i, column in enumerate(columns):
            if not isinstance(column, Whole):
                tensors.append(column)
                registers.append(column)
            elif column.order:
                register = (
                    column.register if column.order == order else self._function(torch.flip, column.register, [0])
                )
                tensors.append(Framed(torch.stack([leaves[i].result for leaves in given])))
                registers.append(Framed(register))
            else:
                x = given[0][i].result
                batched = x.dim() and x.shape[0] == self.batch
                tensors.append(Batched(x) if batched else x)
                registers.append(Batched(column.register) if batched else column.register)
        first = calls[0]
        target = self.model.get_submodule(first.target) if isinstance(first.target, str) else first.target
        assert target is not None, "constants are no calls"
        wanted = [
            torch.stack(column) if isinstance(column[0], Tensor) else column[0]
            for column in zip(*(call.results for call in calls), strict=True)
        ]
        for manner, last in (("direct", False), ("direct", True), ("folded", False)):
            leaves, places = (_from_last(each, first) if last else each for each in (tensors, registers))
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            if _agrees(target, args, kwargs, wanted, copies=first.wrote is not None, folded=manner == "folded"):
                args, kwargs = pytree.tree_unflatten(places, spec)
                return Whole(
                    self._step(Step(first.target, args, kwargs, framewise=manner, copies=first.wrote is not None)),
                    order,
                )
        raise NoSequenceError(f"{name}, which does not answer frame by frame when it is given all frames")

    def _function(self, target: Any, *args: Any) -> Register:
        return self._step(Step(target, args))

    def _step(self, step: Step) -> Register:
        self.steps.append(step)
        return Register(len(self.steps) - 1)


def _repeated(x: Tensor, frames: int) -> Tensor:
    """What every frame is given, for each frame."""
    return x.expand(frames, *x.shape)


def _from_last(leaves: list[Any], call: Call) -> list[Any]:
    """The arguments of a concatenation with its axis counted from the last one, which time in front does not move."""
    if call.target not in _CATS:
        return leaves
    dim = call.results[0].dim()
    return [leaf - dim if type(leaf) is int and leaf >= 0 else leaf for leaf in leaves]


def _agrees(target: Any, args: Any, kwargs: Any, wanted: list[Any], *, copies: bool, folded: bool) -> bool:
    """Whether the call on all frames answers what the calls on each frame did."""
    try:
        with torch.no_grad():
            got = pytree.tree_leaves(run_framewise(target, args, kwargs, copies=copies, folded=folded))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return len(got) == len(wanted) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), equal_nan=True, **_CLOSE)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and a == b
        for a, b in zip(got, wanted, strict=True)
    )
