"""Rows of different length in one batch: what a model takes over all frames, taken over each row's own frames.

Within `RaggedTime` the functions below see a row's valid frames only, whatever stands after them: reductions and
softmax over time, the last frames, a reversal, contractions over time. An axis is time, or batch, by its size, so both
have to be unlike any other size of the model. What it leaves wrong shows in the experiments, and the model is then run
in batches of equal length.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from carousel_export.intercept import Intercept

# What a frame beyond a row's end is to a reduction: its neutral element.
_NEUTRAL = {
    **dict.fromkeys(("max", "amax", "argmax", "softmax", "log_softmax", "logsumexp", "topk", "sort"), -math.inf),
    **dict.fromkeys(("min", "amin", "argmin", "softmin"), math.inf),
    **dict.fromkeys(("sum", "nansum", "norm", "vector_norm", "count_nonzero", "any"), 0),
    **dict.fromkeys(("prod", "all"), 1),
}


class RaggedTime(Intercept):
    """Within, `[batch, …]` tensors with `frames` entries along time are taken to be valid up to `lengths` `[batch]`."""

    def __init__(self, lengths: Tensor, batch: Any, frames: Any) -> None:
        super().__init__()
        self.lengths = lengths.to(torch.int64)
        self.batch = batch
        self.frames = frames

    def answer(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function says of each row's own frames."""
        handler = _HANDLERS.get(getattr(func, "__name__", ""))
        return func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)

    def _reduction(self, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        time = self._time_among(x, _axes(x, args, kwargs))
        return func(x if time is None else self._filled(x, time, _NEUTRAL[func.__name__]), *args, **kwargs)

    def _product(self, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A product contracts the last axis of its first factor: if that is time, with zeros after each row's end."""
        time = self._time_among(x, [x.dim() - 1])
        return func(x if time is None else self._filled(x, time, 0), *args, **kwargs)

    def _getitem(self, func: Callable[..., Any], x: Tensor, index: Any) -> Any:
        return func(*self._at_the_end(x, index))

    def _select(self, func: Callable[..., Any], x: Tensor, dim: int, index: Any) -> Any:
        time, back = self._time_among(x, [dim % x.dim()]), self._from_end(index)
        if time is None or back is None:
            return func(x, dim, index)
        return func(self._last(x, time, back, 1), dim, 0)

    def _flip(self, func: Callable[..., Any], x: Tensor, *dims: Any, **kwargs: Any) -> Any:
        named = kwargs.get("dims", dims[0] if len(dims) == 1 else dims)
        axes = [dim % x.dim() for dim in ([named] if isinstance(named, int) else named)]
        time = self._time_among(x, axes)
        if time is None:
            return func(x, *dims, **kwargs)
        backwards = self.lengths.unsqueeze(1) - 1 - torch.arange(self.frames, device=x.device)
        x = self._gathered(x, time, backwards.clamp(min=0))
        rest = [axis for axis in axes if axis != time]
        return x.flip(rest) if rest else x

    def _pool(self, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pooling of all frames to one is a reduction."""
        adaptive = func.__name__.startswith("adaptive")
        size = args[0] if args else kwargs.get("output_size" if adaptive else "kernel_size")
        size = size[0] if isinstance(size, Sequence) else size
        time = self._time_among(x, [x.dim() - 1])
        if time is None or not _same_size(size, 1 if adaptive else self.frames):
            return func(x, *args, **kwargs)
        if "max" in func.__name__:
            return self._filled(x, time, -math.inf).amax(time, keepdim=True)
        return self._mean(x, time, [time])

    def _moment(self, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mean, variance or deviation over time and, if named too, other axes."""
        axes = _axes(x, args, kwargs)
        time = self._time_among(x, axes)
        if time is None or axes is None:
            return func(x, *args, **kwargs)
        flags = [*args[1:], None, None]
        moment = self._mean(x, time, axes)
        if func.__name__ == "mean":
            keep = kwargs.get("keepdim", flags[0])
        else:
            keep = kwargs.get("keepdim", flags[1])
            unbiased = kwargs.get("correction", kwargs.get("unbiased", flags[0]))
            moment = self._mean((x - moment).square(), time, axes, 1 if unbiased is None else int(unbiased))
        if func.__name__ == "std":
            moment = moment.sqrt()
        return moment if keep else moment.squeeze(tuple(axes))

    def _viterbi(self, func: Callable[..., Any], *tensors: Tensor, lengths: Tensor | None = None) -> Any:
        time = self._time_among(tensors[0], [1])
        if time is not None:
            lengths = self.lengths if lengths is None else torch.minimum(self.lengths, lengths.to(torch.int64))
        return func(*tensors, lengths=lengths)

    def _mean(self, x: Tensor, time: int, axes: Sequence[int], correction: int = 0) -> Tensor:
        batch = self._batch_axis(x, time)
        count = self.lengths.reshape([-1 if axis == batch else 1 for axis in range(x.dim())])
        for axis in axes:
            count = count * (1 if axis == time else x.shape[axis])
        return self._filled(x, time, 0).sum(list(axes), keepdim=True) / (count - correction)

    def _at_the_end(self, x: Tensor, index: Any) -> tuple[Tensor, Any]:
        """`x[:, -1]` and `x[:, -3:]` count from each row's own end."""
        items = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(item, list | bool) or (isinstance(item, Tensor) and item.dim()) for item in items):
            return x, index
        if Ellipsis in items:
            at = items.index(Ellipsis)
            taken = sum(item is not None for item in items) - 1
            items[at : at + 1] = [slice(None)] * (x.dim() - taken)
        axis = -1
        for i, item in enumerate(items):
            axis += item is not None
            if item is None or self._time_among(x, [axis]) is None:
                continue
            if isinstance(item, slice):
                if item.stop is None and item.step is None and isinstance(item.start, int) and item.start < 0:
                    x, items[i] = self._last(x, axis, -item.start, -item.start), slice(None)
            elif (back := self._from_end(item)) is not None:
                x, items[i] = self._last(x, axis, back, 1), 0
        return x, tuple(items)

    def _from_end(self, index: Any) -> int | None:
        """How many frames before the end an index is; None for one that counts from the start."""
        if isinstance(index, int) and index < 0:
            return -index
        return 1 if _same_size(index, self.frames - 1) else None

    def _last(self, x: Tensor, time: int, back: int, count: int) -> Tensor:
        """`count` frames from the one `back` before each row's end on."""
        at = self.lengths.unsqueeze(1) - back + torch.arange(count, device=x.device)
        return self._gathered(x, time, at.clamp(min=0))

    def _filled(self, x: Tensor, time: int, value: float) -> Tensor:
        """`x` with `value` after each row's end."""
        valid = torch.arange(self.frames, device=x.device) < self.lengths.unsqueeze(1)
        if x.dtype == torch.bool:
            # No runtime's masked_fill takes a bool.
            beside = self._beside(x, time, valid)
            return x | ~beside if value else x & beside
        if not x.is_floating_point() and math.isinf(value):
            value = torch.iinfo(x.dtype).max if value > 0 else torch.iinfo(x.dtype).min
        return x.masked_fill(self._beside(x, time, ~valid), value)

    def _gathered(self, x: Tensor, time: int, at: Tensor) -> Tensor:
        """The frames `at` `[batch, count]` of each row."""
        sizes = [at.shape[1] if axis == time else x.shape[axis] for axis in range(x.dim())]
        return x.gather(time, self._beside(x, time, at).expand(sizes))

    def _beside(self, x: Tensor, time: int, rows: Tensor) -> Tensor:
        """`rows` `[batch, count]` with its axes where `x` has batch and time."""
        batch = self._batch_axis(x, time)
        assert batch is not None, "asked only of tensors with a batch"
        rows = rows if batch < time else rows.mT
        sizes = dict(zip(sorted((batch, time)), rows.shape, strict=True))
        return rows.reshape([sizes.get(axis, 1) for axis in range(x.dim())])

    def _time_among(self, x: Tensor, axes: Sequence[int] | None) -> int | None:
        """The axis among `axes` that is time, in a tensor that has a batch."""
        times = [axis for axis in axes or () if _same_size(x.shape[axis], self.frames)]
        return times[0] if times and self._batch_axis(x, times[0]) is not None else None

    def _batch_axis(self, x: Tensor, time: int) -> int | None:
        return next((i for i in range(x.dim()) if i != time and _same_size(x.shape[i], self.batch)), None)


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_NEUTRAL, RaggedTime._reduction),  # noqa: SLF001 - its own table
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), RaggedTime._product),  # noqa: SLF001
    **dict.fromkeys(("mean", "var", "std"), RaggedTime._moment),  # noqa: SLF001
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_max_pool1d", "avg_pool1d", "max_pool1d"),
        RaggedTime._pool,  # noqa: SLF001
    ),
    "__getitem__": RaggedTime._getitem,  # noqa: SLF001
    "select": RaggedTime._select,  # noqa: SLF001
    "viterbi_decode": RaggedTime._viterbi,  # noqa: SLF001
    "flip": RaggedTime._flip,  # noqa: SLF001
}


def _axes(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int] | None:
    """The axes that a function is given as `dim`; None where it is given none."""
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    dims = [dim] if isinstance(dim, int) else dim
    if not x.dim() or not isinstance(dims, list | tuple) or not dims or not all(type(each) is int for each in dims):
        return None
    return [each % x.dim() for each in dims]


def _same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, without a guard on those that an exporter keeps symbolic."""
    symbols = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (a, b)]
    if any(isinstance(size, torch.SymInt) for size in (a, b)):
        return bool(symbols[0] == symbols[1])
    # A tracer's sizes are tensors.
    return isinstance(a, int | Tensor) and isinstance(b, int | Tensor) and int(a) == int(b)
