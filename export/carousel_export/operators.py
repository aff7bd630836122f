"""The recurrent operators of the exported graphs, one for each kind: a translation to ONNX and a body for TorchScript.

A kind is what `nn.RNNBase.mode` says, "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", and "LSTM_PROJECTED" besides. PyTorch's
gate order is i, f, g, o and r, z, n; ONNX's is i, o, f, c and z, r, h (the ONNX operator specification, LSTM, GRU and
RNN, version 14).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor

from carousel_export.projected import projected_lstm

OPSET = 20

Translation = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """What sets one recurrent operator apart from another."""

    mode: str
    # The states' letters, in the order in which PyTorch takes and returns them.
    letters: str
    # PyTorch's gates in ONNX's order.
    gates: tuple[int, ...]
    # It in ONNX: (x, w, r, b, p, lengths, *states, direction) → Y [time, directions, batch, size], *states.
    node: Translation

    @property
    def name(self) -> str:
        """The kind as the manifest names it: "LSTM", "GRU", "RNN"."""
        return self.mode.partition("_")[0]

    @property
    def operator(self) -> Callable[..., tuple[Tensor, ...]]:
        """The custom operator (x, w, r, b or None, p or None, lengths, *states or None, direction) → (y, *states)."""
        found: Callable[..., tuple[Tensor, ...]] = getattr(torch.ops.carousel, self.mode.lower()).default
        return found

    def pack_gates(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor `[gates × hidden, …]` a direction, as PyTorch orders it → `[directions, …]` as ONNX orders it."""
        return torch.stack([_reorder(tensor, self.gates) for tensor in tensors])

    def pack_biases(self, tensors: Sequence[Tensor]) -> Tensor:
        """bias_ih and bias_hh of each direction in turn → ONNX's B, `[directions, 2 × gates × hidden]`."""
        return torch.cat([self.pack_gates(tensors[0::2]), self.pack_gates(tensors[1::2])], dim=1)

    def unpack(self, packed: Tensor) -> Tensor:
        """One direction's gates back in PyTorch's order."""
        return _reorder(packed, [self.gates.index(gate) for gate in range(len(self.gates))])


def _fused(name: str, **attributes: Any) -> Translation:
    """ONNX's own operator of that name."""

    def node(x: Any, w: Any, r: Any, b: Any, _p: Any, lengths: Any, *rest: Any) -> Any:
        *states, direction = rest
        extra = {key: value(direction) if callable(value) else value for key, value in attributes.items()}
        return getattr(op, name)(x, w, r, b, lengths, *states, hidden_size=r.shape[2], direction=direction, **extra)

    return node


def _activations(name: str) -> Callable[[str], list[str]]:
    return lambda direction: [name] * (2 if direction == "bidirectional" else 1)


KINDS = {
    kind.mode: kind
    for kind in (
        Kind("LSTM", "hc", (0, 3, 1, 2), _fused("LSTM")),
        Kind("LSTM_PROJECTED", "hc", (0, 3, 1, 2), projected_lstm),
        # PyTorch applies the reset gate after the recurrent product.
        Kind("GRU", "h", (1, 0, 2), _fused("GRU", linear_before_reset=1)),
        Kind("RNN_TANH", "h", (0,), _fused("RNN", activations=_activations("Tanh"))),
        Kind("RNN_RELU", "h", (0,), _fused("RNN", activations=_activations("Relu"))),
    )
}


def ragged(
    mode: str,
    x: Tensor,
    lengths: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    biased: bool,
    direction: str,
) -> tuple[Tensor, list[Tensor]]:
    """One recurrent layer over rows of different length, with the semantics of the ONNX operator. It can be scripted.

    `x` `[time, batch, size]`, `lengths` int `[batch]`, from 0 to time; each state `[directions, batch, its size]`;
    `weights` as PyTorch has them for one layer, direction after direction. Returns y
    `[time, batch, directions × size]`, zero after each row's length, and the states at its end, which are zero for a
    row of length 0. A reverse direction starts at each row's own end.
    """
    time, batch, size = x.size(0), x.size(1), states[0].size(2)
    both = direction == "bidirectional"
    if time == 0:
        y = torch.zeros(0, batch, size * states[0].size(0), dtype=x.dtype, device=x.device)
        return y, [state * 0.0 for state in states]
    steps = torch.arange(time, device=x.device).unsqueeze(1)
    valid = steps < lengths.unsqueeze(0)
    # Each row's valid frames backwards; beyond them whatever, no row reads it.
    backwards = (lengths.to(torch.int64).unsqueeze(0) - 1 - steps).clamp(min=0).unsqueeze(2)
    if direction == "reverse":
        x = x.gather(0, backwards.expand(time, batch, x.size(2)))
    # A packed row has at least one frame: rows of length 0 run over padding and are blanked below.
    ordered, order = lengths.to(torch.int64).clamp(min=1).sort(descending=True)
    data, sizes = torch._pack_padded_sequence(x.index_select(1, order), ordered.cpu(), False)  # noqa: SLF001
    starts = [state.index_select(1, order).contiguous() for state in states]
    if len(states) == 2:
        packed, h_n, c_n = torch.lstm(data, sizes, starts, weights, biased, 1, 0.0, False, both)
        ends = [h_n, c_n]
    else:
        if mode == "GRU":
            packed, h_n = torch.gru(data, sizes, starts[0], weights, biased, 1, 0.0, False, both)
        elif mode == "RNN_TANH":
            packed, h_n = torch.rnn_tanh(data, sizes, starts[0], weights, biased, 1, 0.0, False, both)
        else:
            packed, h_n = torch.rnn_relu(data, sizes, starts[0], weights, biased, 1, 0.0, False, both)
        ends = [h_n]
    y, _ = torch._pad_packed_sequence(packed, sizes, False, 0.0, time)  # noqa: SLF001
    back = order.argsort()
    y = y.index_select(1, back)
    if direction == "reverse":
        y = y.gather(0, backwards.expand(time, batch, size))
    zero = torch.zeros(1, dtype=x.dtype, device=x.device)
    empty = (lengths == 0).unsqueeze(0).unsqueeze(2)
    ends = [torch.where(empty, zero, end.index_select(1, back)) for end in ends]
    return torch.where(valid.unsqueeze(2), y, zero), ends


def _define(kind: Kind) -> tuple[Callable[..., Any], Translation]:
    """The custom operator of a kind, with what the exporter makes of it."""
    states = "".join(f"Tensor? {letter}_0, " for letter in kind.letters)
    results = ", ".join(["Tensor"] * (1 + len(kind.letters)))
    weights = "Tensor w, Tensor r, Tensor? b, Tensor? p"
    schema = f"(Tensor x, {weights}, Tensor lengths, {states}str direction) -> ({results})"

    def sizes(w: Any, r: Any) -> list[int]:
        """The width of each state: h is what the recurrent matrix takes, c what a gate gives."""
        widths = {"h": r.shape[2], "c": w.shape[1] // len(kind.gates)}
        return [widths[letter] for letter in kind.letters]

    def body(
        x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, p: Tensor | None, lengths: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        """`ragged` with its weights as ONNX has them, and states that may be absent: zero."""
        *given, direction = rest
        weights = []
        for i in range(r.shape[0]):
            weights += [kind.unpack(w[i]), kind.unpack(r[i])]
            weights += [] if b is None else [kind.unpack(side) for side in b[i].chunk(2)]
            weights += [] if p is None else [p[i]]
        zeros = [x.new_zeros(r.shape[0], x.shape[1], size) for size in sizes(w, r)]
        starts = [zero if state is None else state for state, zero in zip(given, zeros, strict=True)]
        y, ends = ragged(kind.mode, x, lengths, starts, weights, b is not None, direction)
        return y, *ends

    def fake(x: Tensor, w: Tensor, r: Tensor, *_: Any) -> tuple[Tensor, ...]:
        time, batch, directions = x.shape[0], x.shape[1], r.shape[0]
        states = [x.new_empty(directions, batch, size) for size in sizes(w, r)]
        return x.new_empty(time, batch, directions * r.shape[2]), *states

    def translate(x: Any, w: Any, r: Any, *rest: Any) -> Any:
        y, *ends = kind.node(x, w, r, *rest)
        if r.shape[0] == 1:
            alone: Any = op.Constant(value_ints=[1])
            return op.Squeeze(y, alone), *ends
        # Zeros keep a dimension as it is: time may be 0, where -1 could not be inferred.
        shape: Any = op.Constant(value_ints=[0, 0, r.shape[0] * r.shape[2]])
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), shape), *ends

    name = f"carousel::{kind.mode.lower()}"
    torch.library.custom_op(name, body, mutates_args=(), schema=schema).register_fake(fake)
    return kind.operator, translate


def _reorder(tensor: Tensor, order: Sequence[int]) -> Tensor:
    gates = tensor.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])


TRANSLATIONS: dict[Callable[..., Any], Translation] = dict(_define(kind) for kind in KINDS.values())
