"""How a model is called: which arguments and results are recurrent state, or lengths; found by experiment."""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from carousel_export.errors import ExampleError
from carousel_export.packing import Given
from carousel_export.recurrent import States
from carousel_export.signature import BATCH, LENGTHS, TIME, Port, State


@dataclass(frozen=True)
class Lengths:
    """Where a model wants its rows' lengths: the axes that they follow of one of its inputs, and the dtype."""

    batch_axis: int
    time_axis: int
    dtype: torch.dtype = torch.int64
    source: int = 0


@dataclass(frozen=True)
class Passed:
    """A recurrent call's state among the arguments: the call, which of its states, and zeros as the example has it."""

    call: str
    place: int
    zeros: Tensor


@dataclass(frozen=True)
class Calling:
    """The forward of a model as a function of its inputs alone.

    `layout` has its arguments: the index of an input, `Lengths`, or `Passed` in the place of a state, whose value no
    recurrent layer sees; None: the inputs as they are. `described` says the same by names, and is the manifest's.
    """

    layout: tuple[Any, ...] | None = None
    described: tuple[str, ...] = ()
    # The recurrent calls whose state is an argument.
    passed: frozenset[str] = frozenset()
    # The results, flattened, that are nothing but the state of those calls.
    dropped: frozenset[int] = frozenset()
    # What other calls start from, [layers × directions, size] each, where that is not zero.
    starts: Mapping[str, States] = field(default_factory=dict)
    # Those whose start is computed from the input, and so is none of the session's.
    computed: frozenset[str] = frozenset()

    @property
    def states(self) -> list[Passed]:
        """The states among the arguments."""
        return [leaf for leaf in pytree.tree_leaves(list(self.layout or ())) if isinstance(leaf, Passed)]

    def arguments(
        self, inputs: Sequence[Tensor], lengths: Tensor | None, states: Mapping[str, States] | None = None
    ) -> list[Any]:
        """What forward is to be called with; without `lengths`, every row is whole, without `states` they are zero.

        `states` are by call, `[layers × directions, batch, size]`: of use where other code than the calls sees them.
        """
        if self.layout is None:
            return list(inputs)

        def place(leaf: Any) -> Any:
            if isinstance(leaf, Lengths):
                timed = inputs[leaf.source]
                whole = torch.full((timed.shape[leaf.batch_axis],), timed.shape[leaf.time_axis])
                return (whole if lengths is None else lengths).to(leaf.dtype)
            if isinstance(leaf, Passed):
                return leaf.zeros if states is None else states[leaf.call][leaf.place]
            return inputs[leaf] if isinstance(leaf, int) else leaf

        return [pytree.tree_map(place, argument) for argument in self.layout]

    @property
    def takes_lengths(self) -> bool:
        """Whether forward is given its rows' lengths."""
        return any(isinstance(leaf, Lengths) for leaf in pytree.tree_leaves(list(self.layout or ())))

    def for_rows(self, rows: int) -> "Calling":
        """The same with states for so many rows."""

        def fit(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            axis = leaf.dim() - 2
            return leaf.narrow(axis, 0, 1).repeat_interleave(rows, axis)

        layout = None if self.layout is None else tuple(pytree.tree_map(fit, part) for part in self.layout)
        return replace(self, layout=layout)

    def results(self, tree: Any) -> Any:
        """Forward's results without the states."""
        if not self.dropped:
            return tree
        leaves, spec = pytree.tree_flatten(tree)
        marked = pytree.tree_unflatten([_DROP if i in self.dropped else leaf for i, leaf in enumerate(leaves)], spec)
        kept = _prune(marked)
        return kept[0] if isinstance(kept, tuple | list) and len(kept) == 1 else kept


_DROP = object()


def _prune(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {key: _prune(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value is not _DROP} or _DROP
    if isinstance(tree, tuple | list):
        return tuple(value for value in map(_prune, tree) if value is not _DROP) or _DROP
    return tree


@dataclass(frozen=True)
class Seen:
    """A recurrent call in an experiment: the state that it was given, if any, and that it returned."""

    call: str
    hx: States | None
    ended: States


@dataclass(frozen=True)
class Trace:
    """One run in an experiment: recurrent calls, lengths that it packed with, and its flattened results."""

    calls: tuple[Seen, ...]
    packed: tuple[Given, ...]
    results: tuple[object, ...]


def as_tensors(argument: object) -> Any:
    """An argument of the example, on the CPU; a list of whole numbers, as lengths may be, becomes a tensor.

    Raises `ExampleError` for what is neither a tensor nor tensors in tuples, lists and dicts.
    """
    if isinstance(argument, list | tuple) and argument and all(type(item) is int for item in argument):
        return torch.tensor(argument)
    for leaf in pytree.tree_leaves(argument):
        if not isinstance(leaf, Tensor):
            raise ExampleError(
                f"example_inputs has a {type(leaf).__name__} in it; give a tensor for each argument of forward"
            )
    return pytree.tree_map(lambda leaf: leaf.detach().cpu(), argument)


def draws(arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The arguments with random floats, and once more with others, and with whole numbers in another order."""

    def first(leaf: Any) -> Any:
        return torch.rand_like(leaf) * 2 - 1 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def second(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and not leaf.is_floating_point():
            return leaf.flip(list(range(leaf.dim())))
        return first(leaf)

    return pytree.tree_map(first, list(arguments)), pytree.tree_map(second, list(arguments))


def find_calling(
    arguments: Sequence[Any], names: Sequence[str], drawn: Sequence[Any], runs: Sequence[Trace]
) -> Calling:
    """What the arguments are, from runs on the two `draws` of them.

    Raises `ExampleError` for an argument that is none of input, state and lengths.
    """
    known = {id(leaf): leaf for leaf in pytree.tree_leaves(drawn) if isinstance(leaf, Tensor)}
    roles: dict[int, str] = {}
    passed, starts, computed = set(), {}, set()
    for seen, again in zip(runs[0].calls, runs[1].calls, strict=True):
        if seen.hx is None:
            continue
        found = [next((key for key, leaf in known.items() if _is_state(leaf, state)), None) for state in seen.hx]
        if None not in found:
            passed.add(seen.call)
            roles |= {key: f"{seen.call}.{letter}_0" for key, letter in zip(found, "hc", strict=False) if key}
        elif any(bool(state.any()) for state in (*seen.hx, *(again.hx or ()))):
            if (constant := _constant(seen, again)) is None:
                computed.add(seen.call)
            else:
                starts[seen.call] = constant
    for key, leaf in known.items():
        if not leaf.is_floating_point() and leaf.dim() == 1 and any(_equal(leaf, g.lengths) for g in runs[0].packed):
            roles[key] = LENGTHS
    placed = _places(arguments, names, drawn, roles)
    if not roles:
        return Calling(starts=starts, computed=frozenset(computed))
    inputs = [argument for argument, place in zip(arguments, placed, strict=True) if place is None]
    zeros: dict[str, Any] = {
        roles[key]: _passed(roles[key], torch.zeros_like(leaf)) for key, leaf in known.items() if key in roles
    }
    if LENGTHS in zeros:
        zeros[LENGTHS] = _find_lengths(inputs[0], runs[0].packed[0], zeros[LENGTHS].zeros.dtype)
    described = tuple(name if place is None else _text(place) for name, place in zip(names, placed, strict=True))
    calling = Calling(_fill(placed, zeros), described, frozenset(passed), starts=starts, computed=frozenset(computed))
    return replace(calling, dropped=find_dropped(calling, runs[0]))


def restore(described: Sequence[str], inputs: Sequence[Port], states: Sequence[State]) -> Calling:
    """What a bundle says of its model's arguments; the results that are states are still to be found."""
    starts: dict[str, States] = {}
    for state in states:
        if state.initial is not None:
            starts[state.call] = (*starts.get(state.call, ()), state.initial)
    names = {port.name for port in inputs}
    if names.issuperset(described):
        return Calling(starts=starts)
    dims = inputs[0].eager_dims
    places = [None if text in names else _parse(text) for text in described]
    fill: dict[str, Any] = {
        state.input: _passed(state.input, torch.zeros(state.shape).unsqueeze(1)) for state in states
    }
    if LENGTHS in described:
        source = [text for text in described if text in names].index(inputs[0].name)
        fill[LENGTHS] = Lengths(dims.index(BATCH), dims.index(TIME), source=source)
    used = {leaf for leaf in pytree.tree_leaves(places) if leaf is not None}
    passed = frozenset(state.call for state in states if state.input in used)
    return Calling(_fill(places, fill), tuple(described), passed, starts=starts)


def find_dropped(calling: Calling, run: Trace) -> frozenset[int]:
    """The results, by their place among all, that are the states which calls returned whose state is an argument."""
    ended = [state for seen in run.calls if seen.call in calling.passed for state in seen.ended]
    return frozenset(
        i
        for i, result in enumerate(run.results)
        if isinstance(result, Tensor) and any(_is_state(result, state) for state in ended)
    )


def _passed(name: str, zeros: Tensor) -> Passed:
    """What a state's name, as `rnn.h_0`, stands for."""
    call, _, letter = name.rpartition(".")
    return Passed(call, 1 if letter == "c_0" else 0, zeros)


def _constant(seen: Seen, again: Seen) -> States | None:
    """What a call starts from where that is the same for every row and input; else None."""
    rows = tuple(state.select(1, 0) if state.dim() == 3 else state for state in seen.hx or ())
    same = again.hx is not None and all(
        _equal(state, other) and (state.dim() == 2 or bool((state == state[:, :1]).all()))
        for state, other in zip(seen.hx or (), again.hx, strict=True)
    )
    return tuple(row.clone() for row in rows) if same else None


def _places(
    arguments: Sequence[Any], names: Sequence[str], drawn: Sequence[Any], roles: Mapping[int, str]
) -> list[Any]:
    """For each argument None where it is an input, else the names of what stands there."""
    places: list[Any] = []
    for name, argument, value in zip(names, arguments, drawn, strict=True):
        if isinstance(argument, Tensor) and id(value) not in roles:
            places.append(None)
            continue
        leaves, spec = pytree.tree_flatten(value)
        found = [roles.get(id(leaf)) for leaf in leaves]
        if not leaves or None in found:
            raise ExampleError(
                f"example input {name!r} has a {type(argument).__name__} in it that is no state of a recurrent layer; "
                "give a tensor for each argument of forward"
            )
        places.append(pytree.tree_unflatten(found, spec))
    return places


def _fill(places: Sequence[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    indices = iter(range(len(places)))
    return tuple(
        next(indices) if place is None else pytree.tree_map(lambda name: values[name], place) for place in places
    )


def _find_lengths(first: Tensor, packed: Given, dtype: torch.dtype) -> Lengths:
    order = (0, 1) if packed.batch_first else (1, 0)
    pairs = [order, *((b, t) for b in range(first.dim()) for t in range(first.dim()) if b != t)]
    for batch, time in pairs:
        if first.dim() > max(batch, time) and (first.shape[batch], first.shape[time]) == (packed.batch, packed.frames):
            return Lengths(batch, time, dtype)
    raise ExampleError(
        f"the first input is {list(first.shape)}, and forward packs {packed.batch} rows of {packed.frames} frames; "
        "pack the input's own batch and time"
    )


def _text(places: Any) -> str:
    return re.sub(r"'([\w.]+)'", r"\1", repr(places))


def _parse(text: str) -> Any:
    return ast.literal_eval(re.sub(r"[\w.]+", lambda found: repr(found[0]), text))


def _is_state(x: Tensor, state: Tensor) -> bool:
    """Whether a tensor is a layer's state; a cell's has no axis for its one row of layers and directions."""
    return _equal(x, state) or (len(state) == 1 and _equal(x, state.squeeze(0)))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)
