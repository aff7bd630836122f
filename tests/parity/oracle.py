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
def looked_ahead(net: Net, x: Tensor, state: State, block: int, ahead: int) -> tuple[Tensor, State]:
    """Latency-controlled: each layer an `nn.LSTM` of its own, run over block and ahead, then over the block alone.

    Forward starts from what is carried, backward from zero, so one bidirectional run over both parts has both answers.
    """
    lstm = net.lstm
    directions = 2 if lstm.bidirectional else 1
    layers = [_layer(lstm, i) for i in range(lstm.num_layers)]
    h, c = (s.clone() for s in state)
    outputs = []
    for start in range(0, len(x), block):
        n = len(x[start : start + block])
        part = x[start : start + block + ahead]
        for i, layer in enumerate(layers):
            rows = slice(i * directions, (i + 1) * directions)
            before = (h[rows].clone(), c[rows].clone())
            for s in before:
                s[1:] = 0
            y, _ = layer(part, before)
            _, (h[rows], c[rows]) = layer(part[:n], before)
            h[rows][1:], c[rows][1:] = 0, 0
            part = y
        outputs.append(net.fc(part[:n]))
    return torch.cat(outputs), (h, c)


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
