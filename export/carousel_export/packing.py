"""Packed sequences with lengths that come from outside: what `pack_padded_sequence` packs stays padded.

A model holds `torch.nn.utils.rnn`'s functions under names of its own, so within `Packing` it is their code that is
another; the functions themselves are left in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from carousel_export.errors import ModelError
from carousel_export.intercept import Intercept


class Packed:
    """Stands for a `PackedSequence`: its frames padded, `[time, batch, …]`. Recurrent layers and padding take it."""

    def __init__(self, padded: Tensor, of: str = "pack_padded_sequence") -> None:
        self.padded = padded
        self._of = of

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, _: object) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError(
            f"forward reads the data of the packed sequence of {self._of}; give it to pad_packed_sequence first"
        )


def unpack(module: nn.RNNBase, given: Tensor | Packed) -> Tensor:
    """What a recurrent module was given as a tensor, with its own order of axes."""
    if not isinstance(given, Packed):
        return given
    return given.padded.transpose(0, 1) if module.batch_first else given.padded


def repack(module: nn.RNNBase, call: str, given: Tensor | Packed, y: Tensor) -> Tensor | Packed:
    """A call's answer, packed where it was given something packed."""
    if not isinstance(given, Packed):
        return y
    return Packed(y.transpose(0, 1) if module.batch_first else y, call)


@dataclass(frozen=True)
class Given:
    """One call of `pack_padded_sequence`: the lengths that it was given, and the axes of what it packed."""

    by: Any
    batch: int
    frames: int
    batch_first: bool

    @property
    def lengths(self) -> Tensor:
        """The lengths `[batch]`."""
        return torch.as_tensor(self.by)

    @property
    def listed(self) -> bool:
        """Whether they are numbers in a list, and no tensor."""
        return not isinstance(self.by, Tensor)


class Packing:
    """Within, packing and padding go by `lengths` `[batch]`; None: every row is whole.

    With `split`, frames from there on are a second part, of `lengths_ahead`. `given` is what the model packed with.
    """

    def __init__(self, lengths: Tensor | None = None, split: Any = None, lengths_ahead: Tensor | None = None) -> None:
        self.lengths = lengths
        self.split = split
        self.lengths_ahead = lengths_ahead
        self.given: list[Given] = []

    def pack(self, x: Tensor, lengths: object, *, batch_first: bool) -> Packed:
        """What `pack_padded_sequence` answers; the order of the rows stays, whether it is asked to be sorted or not."""
        padded = x.transpose(0, 1) if batch_first else x
        self.given.append(Given(lengths, padded.shape[1], padded.shape[0], batch_first))
        return Packed(padded)

    def pad(self, packed: object, padding: float, total: int | None, *, batch_first: bool) -> tuple[Tensor, Tensor]:
        """What `pad_packed_sequence` answers: as many frames as were packed, and the lengths."""
        if not isinstance(packed, Packed):
            raise ModelError("pad_packed_sequence is given what pack_padded_sequence did not pack; pack it first")
        x = packed.padded
        frames, batch = x.shape[0], x.shape[1]
        if total is not None and self.lengths is None and int(total) != frames:
            raise ModelError(
                f"pad_packed_sequence has total_length={total} where {frames} frames were packed; give it the input's "
                "own, or leave it out"
            )
        if self.lengths is None:
            lengths = torch.full((batch,), frames)
        else:
            lengths = self.lengths.to(torch.int64)
            valid = _before(lengths, frames if self.split is None else self.split)
            if self.split is not None:
                assert self.lengths_ahead is not None, "what is split has lengths for both parts"
                valid = torch.cat([valid, _before(self.lengths_ahead, frames - self.split)])
            x = torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 2)), x, torch.tensor(padding, dtype=x.dtype))
        return (x.transpose(0, 1) if batch_first else x), lengths

    def __enter__(self) -> Self:
        _ACTIVE.append(self)
        rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__ = _pack.__code__, _pad.__code__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _ACTIVE.pop()
        if not _ACTIVE:
            rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__ = _ORIGINAL


class _Listed(Intercept):
    """Within, a whole number for each row, which an exporter lists by taking it apart, is 1."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self._rows = _hint(rows)

    def answer(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Ones for `unbind` of such a tensor: no other axis has as many entries as the batch."""
        x = args[0]
        if getattr(func, "__name__", "") != "unbind" or x.dim() != 1 or x.is_floating_point():
            return func(*args, **kwargs)
        return (torch.tensor(1),) * self._rows if _hint(x.shape[0]) == self._rows else func(*args, **kwargs)


def _hint(size: Any) -> int:
    """The example's size, where it is a symbol."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


@contextmanager
def listing(rows: Any) -> Iterator[None]:
    """Within, a batch whose size is a symbol of an exporter's may be listed, as in `[x.shape[1]] * x.shape[0]`.

    A list has some number of entries, to which the symbol would be fixed. It has the example's here, and nobody looks
    at them: those lengths were found to be the rows' own. So it is with `lengths.tolist()`.
    """
    fixed: Callable[[torch.SymInt], int] = torch.SymInt.__index__

    def index(size: torch.SymInt) -> int:
        if isinstance(rows, torch.SymInt) and size.node.expr == rows.node.expr:
            return int(size.node.hint)
        return fixed(size)

    torch.SymInt.__index__ = index  # type: ignore[method-assign]
    try:
        with _Listed(rows):
            yield
    finally:
        torch.SymInt.__index__ = fixed  # type: ignore[method-assign]


_ACTIVE: list[Packing] = []
_ORIGINAL = (rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__)


# These two run with the globals of torch.nn.utils.rnn, and so import what they need.
def _pack(input, lengths, batch_first=False, enforce_sorted=True):  # type: ignore[no-untyped-def]  # noqa: A002, ARG001
    from carousel_export.packing import active  # noqa: PLC0415

    return active().pack(input, lengths, batch_first=batch_first)


def _pad(sequence, batch_first=False, padding_value=0.0, total_length=None):  # type: ignore[no-untyped-def]
    from carousel_export.packing import active  # noqa: PLC0415

    return active().pad(sequence, padding_value, total_length, batch_first=batch_first)


def active() -> Packing:
    """The packing in progress."""
    return _ACTIVE[-1]


def _before(lengths: Tensor, frames: Any) -> Tensor:
    """`[frames, batch]`: whether a frame lies before its row's length."""
    return torch.arange(frames).unsqueeze(1) < lengths.unsqueeze(0)
