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
State = tuple[Tensor, Tensor]


class Net(nn.Module):
    """An LSTM and a linear layer; `sizes`: input, hidden, classes."""

    def __init__(self, *, sizes: tuple[int, int, int] = (5, 7, 3), **lstm: bool | int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(sizes[0], sizes[1], **lstm)
        self.fc = nn.Linear(sizes[1] * (2 if self.lstm.bidirectional else 1), sizes[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


def oriented(x: Tensor, lstm: nn.LSTM) -> Tensor:
    """`[time, features]` as a batch of one."""
    return x.unsqueeze(0 if lstm.batch_first else 1)


@torch.no_grad()
def carried(net: Net, x: Tensor, state: State, sizes: Sequence[int]) -> tuple[Tensor, State]:
    """The net called block by block with its own (h, c): x `[time, features]`, states `[layers × directions, size]`."""
    held = tuple(s.unsqueeze(1) for s in state)
    outputs = []
    for block in torch.split(x, list(sizes)):
        y, held = net.lstm(oriented(block, net.lstm), held)
        outputs.append(net.fc(y).reshape(len(block), -1))
    return torch.cat(outputs), (held[0].squeeze(1), held[1].squeeze(1))


@torch.no_grad()
def looked_ahead(net: Net, block: Tensor, ahead: Tensor, state: State) -> tuple[Tensor, State]:
    """One latency-controlled block: each layer an `nn.LSTM` of its own, run over block and ahead, then the block alone.

    Forward starts from what is carried and backward from zero, so one bidirectional run over both parts has both
    answers, and the run over the block has the forward state that is carried on.
    """
    directions = 2 if net.lstm.bidirectional else 1
    h, c = (torch.zeros_like(s) for s in state)
    part = torch.cat([block, ahead])
    for i in range(net.lstm.num_layers):
        layer = _layer(net.lstm, i)
        before = tuple(s[i * directions : (i + 1) * directions].clone() for s in state)
        for s in before:
            s[1:] = 0
        _, after = layer(part[: len(block)], before)
        part, _ = layer(part, before)
        h[i * directions], c[i * directions] = after[0][0], after[1][0]
    return net.fc(part[: len(block)]), (h, c)


def looked_ahead_stream(net: Net, x: Tensor, state: State, block: int, ahead: int) -> Tensor:
    """A stream `[time, features]`, block after block."""
    outputs = []
    for at in range(0, len(x), block):
        y, state = looked_ahead(net, x[at : at + block], x[at + block : at + block + ahead], state)
        outputs.append(y)
    return torch.cat(outputs)


def _layer(lstm: nn.LSTM, i: int) -> nn.LSTM:
    directions = 2 if lstm.bidirectional else 1
    size = lstm.hidden_size * directions if i else lstm.input_size
    layer = nn.LSTM(size, lstm.hidden_size, bias=lstm.bias, bidirectional=lstm.bidirectional)
    weights = {name.replace(f"_l{i}", "_l0"): w for name, w in lstm.named_parameters() if f"_l{i}" in name}
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
    return Exported(Bundle.open(cx.export(model, example, name="model", out=folder, **options).path))
