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
        handler = _HANDLERS.get(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {})) if handler is None else handler(func, *args, **(kwargs or {}))


def _max_pool1d(
    func: Callable[..., Any],
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As pooling in two dimensions, the first of them of one entry."""
    if return_indices:
        return func(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    pooled = torch.nn.functional.max_pool2d(
        x.unsqueeze(-2),
        (1, _single(kernel_size)),
        stride=(1, _single(stride or kernel_size)),
        padding=(0, _single(padding)),
        dilation=(1, _single(dilation)),
        ceil_mode=ceil_mode,
    )
    return pooled.squeeze(-2)


def _linspace(
    _func: Callable[..., Any], start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """From both ends to the middle, as PyTorch computes it."""
    places = torch.arange(steps, **options)
    last = steps - 1 - places
    step = (end - start) / (places[-1:].clamp(min=1)).to(torch.get_default_dtype())
    rising = torch.where(places < steps // 2, start + step * places, end - step * last)
    spaced = torch.where(places + last > 0, rising, torch.zeros_like(rising) + start)
    return spaced if dtype is None else spaced.to(dtype)


def _single(size: Any) -> Any:
    return size[0] if isinstance(size, Sequence) else size


_HANDLERS: dict[str, Callable[..., Any]] = {"max_pool1d": _max_pool1d, "linspace": _linspace}
