"""What eager PyTorch says, by calling `nn.LSTM` itself, and what a bundle's files say; no code of the exporter's."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import carousel_export as cx
from carousel_protos.bundle import Bundle

torch.set_num_threads(1)

TOLERANCE = 1e-5
# h alone, or h and c.
State = tuple[Tensor, ...]


class Net(nn.Module):
    """A recurrent layer and a linear one; `sizes`: input, hidden, classes."""

    def __init__(
        self, kind: type[nn.RNNBase] = nn.LSTM, *, sizes: tuple[int, int, int] = (5, 7, 3), **options: bool | int | str
    ) -> None:
        super().__init__()
        self.rnn = kind(sizes[0], sizes[1], **options)
        self.fc = nn.Linear((self.rnn.proj_size or sizes[1]) * (2 if self.rnn.bidirectional else 1), sizes[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


def call(rnn: nn.RNNBase, x: Tensor, state: State) -> tuple[Tensor, State]:
    """The module called with a state, which a GRU or RNN takes and returns without a tuple around it."""
    y, ended = rnn(x, state if len(state) == 2 else state[0])
    return y, ended if len(state) == 2 else (ended,)


def oriented(x: Tensor, rnn: nn.RNNBase) -> Tensor:
    """`[time, features]` as a batch of one."""
    return x.unsqueeze(0 if rnn.batch_first else 1)


@torch.no_grad()
def carried(net: Net, x: Tensor, state: State, sizes: Sequence[int]) -> tuple[Tensor, State]:
    """The net called block by block with its own state: x `[time, features]`, states `[layers × directions, size]`."""
    held = tuple(s.unsqueeze(1) for s in state)
    outputs = []
    for block in torch.split(x, list(sizes)):
        y, held = call(net.rnn, oriented(block, net.rnn), held)
        outputs.append(net.fc(y).reshape(len(block), -1))
    return torch.cat(outputs), tuple(s.squeeze(1) for s in held)


@torch.no_grad()
def looked_ahead(net: Net, block: Tensor, ahead: Tensor, state: State) -> tuple[Tensor, State]:
    """One latency-controlled block: each layer a module of its own, run over block and ahead, then the block alone.

    Forward starts from what is carried and backward from zero, so one bidirectional run over both parts has both
    answers, and the run over the block has the forward state that is carried on.
    """
    directions = 2 if net.rnn.bidirectional else 1
    ended = tuple(torch.zeros_like(s) for s in state)
    part = torch.cat([block, ahead])
    for i in range(net.rnn.num_layers):
        layer = _layer(net.rnn, i)
        before = tuple(s[i * directions : (i + 1) * directions].clone() for s in state)
        for s in before:
            s[1:] = 0
        _, after = call(layer, part[: len(block)], before)
        part, _ = call(layer, part, before)
        for end, s in zip(ended, after, strict=True):
            end[i * directions] = s[0]
    return net.fc(part[: len(block)]), ended


def looked_ahead_stream(net: Net, x: Tensor, state: State, block: int, ahead: int) -> Tensor:
    """A stream `[time, features]`, block after block."""
    outputs = []
    for at in range(0, len(x), block):
        y, state = looked_ahead(net, x[at : at + block], x[at + block : at + block + ahead], state)
        outputs.append(y)
    return torch.cat(outputs)


def _layer(rnn: nn.RNNBase, i: int) -> nn.RNNBase:
    directions = 2 if rnn.bidirectional else 1
    size = (rnn.proj_size or rnn.hidden_size) * directions if i else rnn.input_size
    options = {"proj_size": rnn.proj_size} if rnn.mode == "LSTM" else {}
    options |= {} if rnn.mode in {"LSTM", "GRU"} else {"nonlinearity": rnn.nonlinearity}
    layer = type(rnn)(size, rnn.hidden_size, bias=rnn.bias, bidirectional=rnn.bidirectional, **options)
    weights = {name.replace(f"_l{i}", "_l0"): w for name, w in rnn.named_parameters() if f"_l{i}" in name}
    layer.load_state_dict(weights)
    return layer


class Exported:
    """A bundle's graphs, run by name."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._onnx = {graph.file: _session(bundle.file(graph.file)) for graph in bundle.manifest.graphs}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
            self._torchscript = torch.jit.load(bundle.file(bundle.manifest.torchscript))

    def run(self, file: str, *feeds: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs by name from onnxruntime, and from TorchScript."""
        session = self._onnx[file]
        names = [value.name for value in session.get_outputs()]
        arrays = session.run(None, {v.name: np.asarray(x) for v, x in zip(session.get_inputs(), feeds, strict=True)})
        method = self._torchscript.lookahead if file == "lookahead.onnx" else self._torchscript.forward
        with torch.no_grad():
            scripted = method(*feeds)
        onnx = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        return onnx, dict(zip(names, scripted, strict=True))

    def states(self, batch: int) -> list[Tensor]:
        """Random non-zero states in the manifest's order."""
        return [torch.rand(batch, *(int(dim) for dim in s.dims[1:])) * 2 - 1 for s in self.bundle.manifest.states]


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def int32(*values: int) -> Tensor:
    """Lengths."""
    return torch.tensor(values, dtype=torch.int32)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Within the promise's 1e-5, absolute."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def export(model: nn.Module, example: Tensor | tuple[Tensor, ...], folder: Path, **options: object) -> Exported:
    """The bundle of a model, opened from disk."""
    return Exported(Bundle.open(cx.export(model.eval(), example, name="model", out=folder, **options).path))
