"""Arguments that are the rows' valid lengths, of models that mask by them and pack nothing: found by experiment."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from carousel_export.axes import Search
from carousel_export.calling import Lengths
from carousel_export.culprits import same
from carousel_export.eager import Eager
from carousel_export.errors import ExampleError, ModelError
from carousel_export.given import Axes, given_axes
from carousel_export.rows import rows_alone
from carousel_export.runs import grow
from carousel_export.signature import BATCH, LENGTHS, TIME

_LENGTHS = (23, 19, 14, 9)
_DTYPES = (torch.int32, torch.int64)


def find_lengths(
    eager: Eager, example: tuple[Tensor, ...], names: tuple[str, ...], dims: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Take the argument that is the rows' lengths out of the model's inputs; returns those that are left, and names.

    It is a whole number a row. Rows beside longer ones, whatever stands after them, are answered as they are alone once
    it is their number of frames; and it is nothing else: with another number they are not, or no frame before both
    numbers changes. One that changes nothing at all is taken for them by its name.
    """
    asked = [i for i, x in enumerate(example) if x.dim() == 1 and x.dtype in _DTYPES]
    if not asked or eager.calling.takes_lengths:
        return example, names
    if computed := next((names[i] for i in asked if _packs_by(eager, example, i)), None):
        raise ModelError(
            f"{eager.name} packs by lengths that it computes from {computed!r}; pack by that argument as it is, which "
            "the session gives, or, behind a stride in time, do not pack: rows share a batch there only if they are "
            "equally long"
        )
    search = Search(eager, example)
    given = given_axes(names, example, dims)
    time, batch = (given[TIME], given[BATCH]) if given else (search.find(TIME), search.find(BATCH))
    if time is None or batch is None:
        return example, names
    rows = next(x.shape[axis] for x, axis in zip(example, batch, strict=True) if axis is not None)
    asked = [i for i in asked if time[i] is None and len(example[i]) == rows]
    # Whether the search saw it or not: a gather, say, runs on more numbers than it has rows.
    batch = tuple(0 if i in asked else axis for i, axis in enumerate(batch))
    for i in asked:
        if _Trial(eager, search, example, names, time, batch, i).is_lengths():
            return _without(eager, example, names, time, batch, i)
    return example, names


def _packs_by(eager: Eager, example: tuple[Tensor, ...], place: int) -> bool:
    """Whether what it packs with follows the argument."""
    ones = [torch.ones_like(x) if i == place else x for i, x in enumerate(example)]
    try:
        given, again = eager.packed(example), eager.packed(ones)
    except ExampleError:
        return False
    return any(not torch.equal(a.lengths, b.lengths) for a, b in zip(given, again, strict=False))


class _Trial:
    """Runs on rows of several lengths, with recurrent layers that know them, and numbers for the argument."""

    def __init__(
        self,
        eager: Eager,
        search: Search,
        example: tuple[Tensor, ...],
        names: tuple[str, ...],
        time: Axes,
        batch: Axes,
        place: int,
    ) -> None:
        self._eager, self._time, self._batch, self._place = eager, time, batch, place
        self._name = names[place]
        count = len(pytree.tree_leaves(search.base.outputs))
        found = search.name_outputs([(TIME, time), (BATCH, batch)], [str(i) for i in range(count)])
        self._dims = list(found.values())
        self._rows = [self._grown(x, i) for i, x in enumerate(example)]

    def is_lengths(self) -> bool:
        """Whether the argument is the rows' lengths."""
        own, whole = list(_LENGTHS), [max(_LENGTHS)] * len(_LENGTHS)
        called = "len" in self._name.lower()
        if not self._as_alone(own, own):
            return False
        plain, other = self._run(whole, whole), self._run(whole, own)
        if plain is None or other is None:
            return False
        if all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)):
            return called
        early = all(
            same(a[:length], b[:length])
            for length, row, again in zip(own, self._each(plain), self._each(other), strict=True)
            for a, b in zip(row, again, strict=True)
        )
        return called or (early and all(TIME in dims for dims in self._dims)) or not self._as_alone(own, whole)

    def _as_alone(self, lengths: Sequence[int], numbers: Sequence[int]) -> bool:
        together = self._run(lengths, numbers)
        if together is None:
            return False
        for row, (length, number, found) in enumerate(zip(lengths, numbers, self._each(together), strict=True)):
            alone = self._run([length], [number], row)
            if alone is None or not all(
                same(a, b[:length] if TIME in dims else b)
                for a, b, dims in zip(next(self._each(alone)), found, self._dims, strict=True)
            ):
                return False
        return True

    def _each(self, outputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Row by row, its outputs, time first."""
        rows = outputs[0].shape[self._dims[0].index(BATCH)]
        for row in range(rows):
            taken = [y.select(dims.index(BATCH), row) for y, dims in zip(outputs, self._dims, strict=True)]
            rest = [[dim for dim in dims if dim != BATCH] for dims in self._dims]
            yield [y.movedim(d.index(TIME), 0) if TIME in d else y for y, d in zip(taken, rest, strict=True)]

    def _run(self, lengths: Sequence[int], numbers: Sequence[int], row: int | None = None) -> list[Tensor] | None:
        inputs = []
        for i, x in enumerate(self._rows):
            batch, time = self._batch[i], self._time[i]
            if row is not None and batch is not None:
                x = x.narrow(batch, row, 1)  # noqa: PLW2901 - axis after axis
            if time is not None:
                x = x.narrow(time, 0, max(lengths))  # noqa: PLW2901
            inputs.append(torch.tensor(numbers, dtype=x.dtype) if i == self._place else x)

        return self._eager.try_run(inputs, rows_alone(lengths))

    def _grown(self, x: Tensor, i: int) -> Tensor:
        for axis, size in ((self._batch[i], len(_LENGTHS)), (self._time[i], max(_LENGTHS))):
            x = x if axis is None else grow(x, axis, size)
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(5)
            return torch.randn(x.shape, generator=generator)
        return x


def _without(
    eager: Eager, example: tuple[Tensor, ...], names: tuple[str, ...], time: Axes, batch: Axes, place: int
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    left = [i for i in range(len(example)) if i != place]
    source = next(i for i in left if time[i] is not None)
    at_batch, at_time = batch[source], time[source]
    if at_batch is None or at_time is None:
        raise ExampleError(f"{names[source]!r} has no batch; write forward for [batch, time, …] inputs")
    lengths = Lengths(at_batch, at_time, example[place].dtype, left.index(source))
    calling = eager.calling

    def fill(leaf: object) -> object:
        return lengths if leaf == place else left.index(leaf) if isinstance(leaf, int) else leaf

    layout = calling.layout or tuple(range(len(example)))
    described = calling.described or names
    eager.calling = replace(
        calling,
        layout=tuple(pytree.tree_map(fill, argument) for argument in layout),
        described=tuple(LENGTHS if name == names[place] else name for name in described),
    )
    return tuple(example[i] for i in left), tuple(names[i] for i in left)
