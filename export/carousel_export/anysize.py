"""Functions that the exporter ties to the example's size, said by others that it does not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from carousel_export.intercept import Intercept


class AnySize(Intercept):
    """Within, pooling for the largest and evenly spaced numbers are computed by functions that take any size."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _HANDLERS:
            return _HANDLERS[func.__name__](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _max_pool1d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As pooling in two dimensions, the first of them of one entry."""
    sizes = {"stride": stride or kernel_size, "padding": padding, "dilation": dilation}
    blank = {"stride": 1, "padding": 0, "dilation": 1}
    pairs = {name: (blank[name], _single(size)) for name, size in sizes.items()}
    pooled = torch.nn.functional.max_pool2d(
        x.unsqueeze(-2), (1, _single(kernel_size)), ceil_mode=ceil_mode, return_indices=return_indices, **pairs
    )
    return tuple(y.squeeze(-2) for y in pooled) if return_indices else pooled.squeeze(-2)


def _linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """From both ends to the middle, as PyTorch computes it."""
    places = torch.arange(steps, **options)
    last = steps - 1 - places
    step = (end - start) / (places[-1:].clamp(min=1)).to(torch.get_default_dtype())
    rising = torch.where(places < steps // 2, start + step * places, end - step * last)
    spaced = torch.where(places + last > 0, rising, start + 0.0 * places)
    return spaced if dtype is None else spaced.to(dtype)


def _single(size: Any) -> Any:
    return size[0] if isinstance(size, Sequence) else size


_HANDLERS: dict[str, Callable[..., Any]] = {
    "max_pool1d": _max_pool1d,
    "max_pool1d_with_indices": _max_pool1d,
    "linspace": _linspace,
}
