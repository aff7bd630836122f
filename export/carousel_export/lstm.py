"""The LSTM of the exported graphs: one operator, with a translation to ONNX and a body for TorchScript.

Gate order: PyTorch has i, f, g, o; ONNX has i, o, f, c (the ONNX operator specification, LSTM, version 14).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor

OPSET = 20
_TO_ONNX = (0, 3, 1, 2)
_TO_TORCH = (0, 2, 3, 1)


def ragged_lstm(
    x: Tensor,
    lengths: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    biased: bool,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over rows of different length, with the semantics of the ONNX operator. It can be scripted.

    `x` `[time, batch, size]`, `lengths` int `[batch]`, from 0 to time; `h_0` and `c_0` `[directions, batch, hidden]`,
    zero if absent; `weights` as `nn.LSTM` has them for one layer, direction after direction. Returns y
    `[time, batch, directions × hidden]`, zero after each row's length, and h_n and c_n, which are zero for a row of
    length 0. A reverse direction starts at each row's own end.
    """
    directions = 2 if direction == "bidirectional" else 1
    hidden = weights[1].size(1)
    time, batch = x.size(0), x.size(1)
    h = torch.zeros(directions, batch, hidden, dtype=x.dtype, device=x.device) if h_0 is None else h_0
    c = torch.zeros(directions, batch, hidden, dtype=x.dtype, device=x.device) if c_0 is None else c_0
    if time == 0:
        return torch.zeros(0, batch, directions * hidden, dtype=x.dtype, device=x.device), h * 0.0, c * 0.0
    steps = torch.arange(time, device=x.device).unsqueeze(1)
    valid = steps < lengths.unsqueeze(0)
    # Each row's valid frames backwards; beyond them whatever, no row reads it.
    backwards = (lengths.to(torch.int64).unsqueeze(0) - 1 - steps).clamp(min=0).unsqueeze(2)
    if direction == "reverse":
        x = x.gather(0, backwards.expand(time, batch, x.size(2)))
    # A packed row has at least one frame: rows of length 0 run over padding and are blanked below.
    ordered, order = lengths.to(torch.int64).clamp(min=1).sort(descending=True)
    data, sizes = torch._pack_padded_sequence(x.index_select(1, order), ordered.cpu(), False)  # noqa: SLF001
    states = [h.index_select(1, order).contiguous(), c.index_select(1, order).contiguous()]
    packed, h_n, c_n = torch.lstm(data, sizes, states, weights, biased, 1, 0.0, False, directions == 2)
    y, _ = torch._pad_packed_sequence(packed, sizes, False, 0.0, time)  # noqa: SLF001
    back = order.argsort()
    y = y.index_select(1, back)
    if direction == "reverse":
        y = y.gather(0, backwards.expand(time, batch, hidden))
    zero = torch.zeros(1, dtype=x.dtype, device=x.device)
    empty = (lengths == 0).unsqueeze(0).unsqueeze(2)
    h_n = torch.where(empty, zero, h_n.index_select(1, back))
    c_n = torch.where(empty, zero, c_n.index_select(1, back))
    return torch.where(valid.unsqueeze(2), y, zero), h_n, c_n


def pack_gates(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor `[4 × hidden, …]` per direction, in PyTorch's gate order → `[directions, 4 × hidden, …]` in ONNX's."""
    return torch.stack([_reorder(tensor, _TO_ONNX) for tensor in tensors])


def pack_biases(tensors: Sequence[Tensor]) -> Tensor:
    """bias_ih and bias_hh of each direction in turn → ONNX's B, `[directions, 8 × hidden]`."""
    return torch.cat([pack_gates(tensors[0::2]), pack_gates(tensors[1::2])], dim=1)


@torch.library.custom_op("carousel::lstm", mutates_args=())
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ragged_lstm` with its weights as ONNX has them: W, R and B of the LSTM operator."""
    weights = []
    for i in range(r.shape[0]):
        weights += [_reorder(w[i], _TO_TORCH), _reorder(r[i], _TO_TORCH)]
        if b is not None:
            weights += [_reorder(side, _TO_TORCH) for side in b[i].chunk(2)]
    return ragged_lstm(x, lengths, h_0, c_0, weights, b is not None, direction)


@lstm.register_fake
def _(
    x: Tensor,
    w: Tensor,  # noqa: ARG001 - the operator's signature
    r: Tensor,
    b: Tensor | None,  # noqa: ARG001
    lengths: Tensor,  # noqa: ARG001
    h_0: Tensor | None,  # noqa: ARG001
    c_0: Tensor | None,  # noqa: ARG001
    direction: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    time, batch, _ = x.shape
    directions, _, hidden = r.shape
    states = x.new_empty(directions, batch, hidden)
    return x.new_empty(time, batch, directions * hidden), states, torch.empty_like(states)


def onnx_lstm(x: Any, w: Any, r: Any, b: Any, lengths: Any, h_0: Any, c_0: Any, direction: str) -> Any:
    """The operator as ONNX nodes: a fused LSTM, and its Y `[time, directions, batch, hidden]` laid out as PyTorch's."""
    directions, _, hidden = (int(size) for size in r.shape)
    y, h_n, c_n = op.LSTM(x, w, r, b, lengths, h_0, c_0, hidden_size=hidden, direction=direction)
    # Zeros keep a dimension as it is: time may be 0, where -1 could not be inferred.
    shape: Any = op.Constant(value_ints=[0, 0, directions * hidden])
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), shape), h_n, c_n


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.carousel.lstm.default: onnx_lstm}


def _reorder(tensor: Tensor, order: Sequence[int]) -> Tensor:
    gates = tensor.chunk(4)
    return torch.cat([gates[gate] for gate in order])
