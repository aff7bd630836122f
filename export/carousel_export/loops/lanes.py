"""Which frame of which sequence a tensor is, found by asking a call on numbered elements what it takes.

A lane is one frame's part of a sequence: `x[:, t]`, an entry of `x.unbind(1)`, of `x.flip(1).split(1, 1)`, and so on.
Calls that only move elements are run again on a tensor whose elements are numbered; the numbers say which element came
from where, however the call was spelt, and no chance likeness of values can mislead.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from carousel_export.loops.trace import Call, Value, written

_MOVERS = frozenset(
    getattr(owner, name)
    for name in (
        *("chunk", "flip", "flatten", "index_select", "movedim", "moveaxis", "narrow", "permute", "reshape", "select"),
        *(
            "split",
            "squeeze",
            "swapaxes",
            "swapdims",
            "t",
            "tensor_split",
            "transpose",
            "unbind",
            "unsqueeze",
            "unflatten",
        ),
        *("view", "contiguous", "clone", "flipud", "fliplr", "__getitem__", "__reversed__", "split_with_sizes"),
    )
    for owner in (torch, Tensor)
    if hasattr(owner, name)
)
_TURNS = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT"))
_STACKS = (torch.stack,)
_CATS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Part:
    """A tensor that went into another, and the numbers of the elements there that it became."""

    value: Value
    numbers: Tensor


@dataclass(frozen=True)
class Lanes:
    """The tensors that a sequence was put together of along `axis`; `kept`: each has that axis, with one entry."""

    values: tuple[Value, ...]
    axis: int
    kept: bool


@dataclass(frozen=True)
class Source:
    """Frames taken from a sequence along `axis`; `order` 1: first to last, −1: last to first."""

    base: Value
    axis: int
    kept: bool
    order: int


class Numbering:
    """Answers for one trace; every answer is computed once."""

    def __init__(self) -> None:
        self._bases: dict[Value, list[Part]] = {}
        self._canonical: dict[Value, Value] = {}

    def canonical(self, value: Value) -> Value:
        """The tensor itself where `value` is that one taken out again of a stack or concatenation, or moved back."""
        if value not in self._canonical:
            found = value
            for base in self.bases(value):
                if _equal(base.numbers, _numbered(base.value.result)):
                    found = self.canonical(base.value)
                    break
                same = [part.value for part in parts(base.value) if _equal(part.numbers, base.numbers)]
                if same:
                    found = self.canonical(same[0])
                    break
            self._canonical[value] = found
        return self._canonical[value]

    def lanes(self, value: Value, frames: int) -> Lanes | None:
        """The tensors that `value` is the stack of, along an axis of `frames`; None where it is none."""
        for base in (Part(value, _numbered(value.result)), *self.bases(value)):
            found = {_key(part.numbers): part.value for part in parts(base.value)}
            for axis, kept in _along(base.numbers, frames) if len(found) >= frames else ():
                taken = [found.get(_key(lane)) for lane in _cut(base.numbers, axis, kept=kept)]
                values = [each for each in taken if each is not None]
                if len(values) == frames:
                    return Lanes(tuple(values), axis, kept)
        return None

    def source(self, values: Sequence[Value]) -> Source | None:
        """The sequence that these are the frames of, each once and in order; None where they are not."""
        common = [base.value for base in self.bases(values[0])]
        for base in common:
            taken = [next((b.numbers for b in self.bases(value) if b.value == base), None) for value in values]
            numbers = _numbered(base.result)
            for axis, kept in _along(numbers, len(values)):
                lanes = _cut(numbers, axis, kept=kept)
                for order in (1, -1):
                    if all(
                        got is not None and _equal(got, lane) for got, lane in zip(taken, lanes[::order], strict=True)
                    ):
                        return Source(base, axis, kept, order)
        return None

    def bases(self, value: Value) -> list[Part]:
        """The tensors that `value` only moved elements of, the first in the model first, and which elements."""
        if value not in self._bases:
            found: list[Part] = []
            if (base := _moved(value.call)) is not None:
                numbers = _moved_numbers(value, base)
                found = [Part(part.value, part.numbers.flatten()[numbers]) for part in self.bases(base)]
                found.append(Part(base, numbers))
            self._bases[value] = found
        return self._bases[value]


def parts(value: Value) -> list[Part]:
    """What a stack, a concatenation or a tensor that was written into was put together of."""
    call = value.call
    if call.target is written:
        base, index, put = call.args
        if not isinstance(put, Value):
            return []
        taken = _numbered(base.result)[pytree.tree_map(_tensor, index)]
        if taken.shape != put.result.shape:
            return []
        covered = set(taken.flatten().tolist())
        before = [part for part in parts(base) if covered.isdisjoint(part.numbers.flatten().tolist())]
        return [*before, Part(put, taken)]
    stacked = call.target in _STACKS
    if not stacked and call.target not in _CATS:
        return []
    tensors = call.args[0] if call.args else call.kwargs.get("tensors", ())
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis", 0))
    numbers = _numbered(value.result)
    if stacked:
        return [Part(each, lane) for each, lane in zip(tensors, numbers.unbind(dim), strict=True)]
    sizes = [each.result.shape[dim] if each.result.dim() == numbers.dim() else 0 for each in tensors]
    return [Part(each, piece) for each, piece in zip(tensors, torch.split(numbers, sizes, dim), strict=True)]


def _moved(call: Call) -> Value | None:
    """The one tensor that the call moves elements of."""
    known = call.target in _MOVERS or any(call.target == turn for turn in _TURNS)
    return call.args[0] if known and call.args and isinstance(call.args[0], Value) and call.wrote is None else None


def _moved_numbers(value: Value, base: Value) -> Tensor:
    call = value.call
    assert callable(call.target), "only functions move elements"
    args, kwargs = pytree.tree_map(_tensor, (call.args[1:], call.kwargs))
    numbers: Tensor = pytree.tree_leaves(call.target(_numbered(base.result), *args, **kwargs))[value.leaf]
    return numbers


def _tensor(leaf: Any) -> Any:
    return leaf.result if isinstance(leaf, Value) else leaf


def _numbered(x: Tensor) -> Tensor:
    return torch.arange(math.prod(x.shape)).reshape(x.shape)


def _along(numbers: Tensor, frames: int) -> Iterator[tuple[int, bool]]:
    for axis, size in enumerate(numbers.shape):
        if size == frames:
            yield from ((axis, False), (axis, True))


def _cut(numbers: Tensor, axis: int, *, kept: bool) -> Sequence[Tensor]:
    return torch.split(numbers, 1, axis) if kept else numbers.unbind(axis)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _key(numbers: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(numbers.shape), tuple(numbers.flatten().tolist())
