"""Which module mixes frames: the one that is given the same over the whole and in pieces, and answers otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.policies import Piece
from carousel_export.tolerance import TOLERANCE, largest

# Above the noise of sums in another order, below any real difference that the gate would let pass.
_SAME = 1e-4
# Where all values are small, this share of the largest, but not below the noise of larger ones that cancel out.
_SHARE = 1e-3
_LEAST = 1e-7
# A value that is the same in both and so many times the largest that is not is a constant, as for what is masked: it
# has no noise, and says nothing of how large that of the others is.
_CONSTANT = 100


def same(wanted: Tensor, got: Tensor) -> bool:
    """Whether two answers are one, but for noise."""
    if wanted.shape != got.shape:
        return False
    a, b = wanted.double(), got.double()
    near = min(_SAME, max(_LEAST, _SHARE * largest(a)))
    # Where values are large, what the gate allows. A small one beside them has their noise: it may be their difference.
    near = max(near, TOLERANCE * largest(a[a.abs() <= _CONSTANT * largest(a[a != b])]))
    return torch.allclose(a, b, rtol=0, atol=near, equal_nan=True)


@dataclass(frozen=True)
class Record:
    """One call of a module: what it was given and what it returned; its own calls are the records from `first` on."""

    path: str
    module: nn.Module
    given: Tensor
    returned: Tensor
    first: int

    @property
    def name(self) -> str:
        """The module in words."""
        kind = getattr(self.module, "written_as", type(self.module)).__name__
        return f"{self.path} ({kind})" if self.path else kind


class Recorder:
    """Within, notes the calls of a model's modules, in the order in which they return."""

    def __init__(self, module: nn.Module) -> None:
        self.records: list[Record] = []
        self._modules = list(module.named_modules())
        self._firsts: list[int] = []

    def __enter__(self) -> "Recorder":
        self._handles = []
        for path, module in self._modules:
            self._handles.append(module.register_forward_pre_hook(lambda *_: self._firsts.append(len(self.records))))
            self._handles.append(module.register_forward_hook(self._note(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def note(module: nn.Module, args: tuple[object, ...], result: object) -> None:
            first = self._firsts.pop()
            given, returned = (
                next((each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)), None)
                for value in (args, result)
            )
            if given is not None and returned is not None:
                self.records.append(Record(path, module, given, returned, first))

        return note


def name_culprit(whole: Sequence[Record], cut: Sequence[Record], pieces: Sequence[Piece]) -> str:
    """The innermost module that answers otherwise in pieces, and where in its code if it has modules of its own."""
    # Each piece made the same calls in the same order, unless the last one failed.
    parts = [cut[i :: len(whole)] for i in range(len(whole))]
    given = [_joins(r.given, [p.given for p in part], pieces) for r, part in zip(whole, parts, strict=True)]
    returned = [_joins(r.returned, [p.returned for p in part], pieces) for r, part in zip(whole, parts, strict=True)]
    for i, record in enumerate(whole):
        if not given[i] or returned[i]:
            continue
        own = range(record.first, i)
        if not own:
            return record.name
        code = f"the code of {record.name}.forward" if not record.path else f"the code of {record.name}"
        if before := next((whole[j] for j in own if not given[j]), None):
            return f"{code} before {before.name}"
        return f"{code} after {whole[own[-1]].name}"
    return f"the code of {whole[-1].name}.forward"


def _joins(whole: Tensor, parts: Sequence[Tensor], pieces: Sequence[Piece]) -> bool:
    """Whether the parts, each but for its frames ahead, are the whole, along an axis that has the frames."""
    frames = sum(piece.block for piece in pieces)
    if len(parts) != len(pieces) or any(part.dim() != whole.dim() for part in parts):
        return False
    for axis, size in enumerate(whole.shape):
        # Code that pads may have frames too many, which it cuts off later.
        sizes = [piece.block + piece.ahead + size - frames for piece in pieces]
        if size >= frames and sizes == [part.shape[axis] for part in parts]:
            joined = [part.narrow(axis, 0, piece.block) for part, piece in zip(parts, pieces, strict=True)]
            return same(whole.narrow(axis, 0, frames), torch.cat(joined, axis))
    return False


@contextmanager
def track(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Within, the modules whose calls are in progress, the innermost last."""
    stack: list[tuple[str, nn.Module]] = [("", module)]
    handles = []
    for path, part in module.named_modules():

        def enter(_module: nn.Module, _args: object, path: str = path, part: nn.Module = part) -> None:
            stack.append((path, part))

        def leave(_module: nn.Module, _args: object, _result: object) -> None:
            stack.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def name_reducers(short: Sequence[Record], long: Sequence[Record]) -> list[str]:
    """The innermost modules that answer another number of frames than they are given, from runs of two lengths.

    Empty where there is none: the model's own code does.
    """
    found = []
    for i, (one, two) in enumerate(zip(short, long, strict=True)):
        given, returned = (_growing(getattr(one, what), getattr(two, what)) for what in ("given", "returned"))
        if one.first == i and given and returned and not given & returned:
            found.append(one.name)
    return list(dict.fromkeys(found))


def _growing(one: Tensor, two: Tensor) -> set[tuple[int, int]]:
    """The sizes of an axis in two runs, where they differ."""
    return {(a, b) for a, b in zip(one.shape, two.shape, strict=False) if a != b}
