"""Recurrent layers from cells: same weights, same formulas, whole sequences; one direction, also the backward one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Cell = nn.LSTMCell | nn.GRUCell | nn.RNNCell
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class _Backward(nn.RNNBase):
    """A layer that runs from the last frame to the first; its answers stand at their frames."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        """As the layer, on `[time, batch, size]`."""
        y, ended = super().forward(input.flip(0), hx)
        return y.flip(0), ended


class BackwardLSTM(_Backward, nn.LSTM):  # type: ignore[misc]  # it returns what nn.LSTM returns
    """`nn.LSTM` from the last frame to the first."""


class BackwardGRU(_Backward, nn.GRU):  # type: ignore[misc]
    """`nn.GRU` from the last frame to the first."""


class BackwardRNN(_Backward, nn.RNN):  # type: ignore[misc]
    """`nn.RNN` from the last frame to the first."""


BACKWARD = (BackwardLSTM, BackwardGRU, BackwardRNN)
_FORWARD = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}
_REVERSE = {nn.LSTMCell: BackwardLSTM, nn.GRUCell: BackwardGRU, nn.RNNCell: BackwardRNN}


def layer_of(cell: Cell, *, reverse: bool) -> nn.RNNBase:
    """A layer of one direction that shares the cell's weights."""
    return _with_weights((_REVERSE if reverse else _FORWARD)[type(cell)], [cell])


def layer_of_both(forward: Cell, backward: Cell) -> nn.RNNBase:
    """A bidirectional layer that shares the weights of two cells alike."""
    return _with_weights(_FORWARD[type(forward)], [forward, backward])


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two cells can be the directions of one layer."""
    names = ("input_size", "hidden_size", "bias", "nonlinearity")
    return type(a) is type(b) and all(getattr(a, name, None) == getattr(b, name, None) for name in names)


def _with_weights(kind: Callable[..., nn.RNNBase], cells: list[Cell]) -> nn.RNNBase:
    options = {"nonlinearity": cells[0].nonlinearity} if isinstance(cells[0], nn.RNNCell) else {}
    first = cells[0]
    layer = kind(first.input_size, first.hidden_size, bias=first.bias, bidirectional=len(cells) == 2, **options)
    for cell, suffix in zip(cells, ("", "_reverse"), strict=False):
        for name, weight in cell.named_parameters():
            setattr(layer, f"{name}_l0{suffix}", weight)
    return layer.eval()
