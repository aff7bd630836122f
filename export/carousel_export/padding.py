"""Zero padding of time: what stands before a sequence's first frame and after its last one for a convolution.

In a stream, frames stand there. Those before a block are lifted like h and c: the last ones that entered the padding
are a state, zero at the stream's start. So a convolution with padding on the left alone streams exactly, and one that
is padded on both sides as soon as enough frames ahead are there.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from carousel_export.culprits import track
from carousel_export.intercept import Intercept

# By function, over how many axes it goes, the last ones.
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Padding:
    """One call that pads time with zeros: `left` and `right` frames of `size` numbers in a row."""

    call: str
    # The module that made the call, in words.
    where: str
    # Of the tensor that is padded, as a batch goes through the model.
    time: int
    batch: int
    left: int
    right: int
    size: int

    @property
    def alone(self) -> int:
        """The axis of time in a tensor of one sequence, without a batch."""
        return self.time - (self.batch < self.time)


# The letter of the state that keeps the frames before.
FRAMES = "frames"

# For each call that pads with zeros, in their order: how it pads time, None where it does not.
Plan = tuple[Padding | None, ...]
# Of the tensor that is to be padded, the one that is; None: leave the call as it is.
Pad = Callable[[Padding, Tensor], Tensor | None]


class PadTime(Intercept):
    """Within, the calls of the plan get their tensor with time padded by `pad`, and leave time alone."""

    def __init__(self, plan: Plan, pad: Pad, axis: Callable[[Padding], int]) -> None:
        super().__init__()
        self._calls = iter(plan)
        self._pad = pad
        self._axis = axis

    def answer(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the function, but for the padding of time."""
        sides = zero_padding(func, *args, **kwargs)
        padding = next(self._calls, None) if sides else None
        if not sides or padding is None:
            return func(*args, **kwargs)
        if (padded := self._pad(padding, args[0])) is None:
            return func(*args, **kwargs)
        sides[self._axis(padding)] = (0, 0)
        return _call(func, sides, padded, *args[1:], **kwargs)


def find_paddings(module: nn.Module, run: Callable[[], object], batch: int, frames: int) -> Plan:
    """The calls of a run on a batch, with sizes of batch and time that no other axis has."""
    finder = _Finder(batch, frames)
    with track(module) as finder.modules, finder:
        run()
    return tuple(finder.found)


class _Finder(Intercept):
    """Notes each call that pads with zeros."""

    def __init__(self, batch: int, frames: int) -> None:
        super().__init__()
        self.modules: list[tuple[str, nn.Module]] = []
        self.found: list[Padding | None] = []
        self._sizes = {"batch": batch, "time": frames}
        self._names: Counter[str] = Counter()

    def answer(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The function as it is."""
        if sides := zero_padding(func, *args, **kwargs):
            self.found.append(self._read(func, sides, *args, **kwargs))
        return func(*args, **kwargs)

    def _read(
        self, func: Callable[..., Any], sides: Sequence[tuple[int, int]], x: Tensor, *args: Any, **kwargs: Any
    ) -> Padding | None:
        axes = {role: [i for i, n in enumerate(x.shape) if n == size] for role, size in self._sizes.items()}
        if any(len(found) != 1 for found in axes.values()):
            return None
        (batch,), (time,) = axes["batch"], axes["time"]
        left, right = sides[time]
        if min(left, right) < 0 or max(left, right) == 0 or _stride(func, x, time, *args, **kwargs) != 1:
            return None
        path, module = self.modules[-1]
        name = path or func.__name__
        count = self._names[name]
        self._names[name] += 1
        return Padding(
            call=f"{name}.call{count}" if count else name,
            where=f"{path or 'the model itself'} ({type(module).__name__})",
            time=time,
            batch=batch,
            left=left,
            right=right,
            size=math.prod(n for i, n in enumerate(x.shape) if i not in (batch, time)),
        )


def zero_padding(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> list[tuple[int, int]] | None:
    """The zeros that a call puts before and after each axis of `x`; None for one that puts none."""
    name = getattr(func, "__name__", "")
    if name == "pad":
        given = kwargs.get("pad", args[0] if args else ())
        mode = kwargs.get("mode", args[1] if len(args) > 1 else "constant")
        if mode != "constant" or kwargs.get("value", args[2] if len(args) > 2 else None):
            return None
        pairs = [(int(given[i]), int(given[i + 1])) for i in range(0, len(given), 2)]
        sides = [(0, 0)] * (x.dim() - len(pairs)) + pairs[::-1]
    elif name in _CONVOLUTIONS:
        axes = _CONVOLUTIONS[name]
        sides = [(0, 0)] * (x.dim() - axes) + _padding_of(axes, _arguments(*args, **kwargs))
    else:
        return None
    return sides if any(side != (0, 0) for side in sides) else None


def _arguments(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    """A convolution's arguments by name."""
    return {
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def _padding_of(axes: int, given: dict[str, Any]) -> list[tuple[int, int]]:
    if given["padding"] == "same":
        kernel = given["weight"].shape[-axes:]
        totals = [d * (k - 1) for d, k in zip(_each(given["dilation"], axes), kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _each(0 if given["padding"] == "valid" else given["padding"], axes)]


def _stride(func: Callable[..., Any], x: Tensor, axis: int, *args: Any, **kwargs: Any) -> int:
    axes = _CONVOLUTIONS.get(func.__name__, 0)
    at = axis - x.dim() + axes
    return _each(_arguments(*args, **kwargs)["stride"], axes)[at] if axes and at >= 0 else 1


def _each(value: Any, axes: int) -> list[int]:
    values = [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]
    return values * axes if len(values) == 1 else values


def _call(func: Callable[..., Any], sides: Sequence[tuple[int, int]], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The call with other zeros: `F.pad` puts all of them, so that a convolution needs none of its own."""
    if any(side != (0, 0) for side in sides):
        x = nn.functional.pad(x, [zeros for side in reversed(sides) for zeros in side])
    return x if func.__name__ == "pad" else func(x, **{**_arguments(*args, **kwargs), "padding": 0})
