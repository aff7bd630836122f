"""The legacy exporter as an oracle: another program's graph of the same module, run on the same whole sequences."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tests.parity.oracle import Net, assert_close, export, int32
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Attends(Net):
    """A softmax over time, and its mean."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return self.fc((y.sum(-1, keepdim=True).softmax(1) * y).sum(1))


class Convolves(Net):
    """A centred convolution before the layer."""

    def __init__(self) -> None:
        super().__init__(bidirectional=True, batch_first=True)
        self.conv = nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x.transpose(1, 2)).relu().transpose(1, 2))


class Packs(Net):
    """Packs and pads."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.fc(y)


class Scores(Net):
    """A CRF's emissions and transitions, whose best path is left to the decoder."""

    def __init__(self) -> None:
        super().__init__(bidirectional=True, batch_first=True)
        self.transitions = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(-1) + self.transitions


NETS = {
    "LSTM no bias, both directions": Net(nn.LSTM, num_layers=2, bias=False, bidirectional=True, batch_first=True),
    "GRU both directions, no bias": Net(nn.GRU, bias=False, bidirectional=True, batch_first=True),
    "RNN relu, no bias": Net(nn.RNN, num_layers=2, bias=False, nonlinearity="relu", batch_first=True),
    "attention": Attends(bidirectional=True, batch_first=True),
    "convolution": Convolves(),
    "CRF's scores": Scores(),
    "packed": Packs(bidirectional=True, batch_first=True),
    "LSTM": Net(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM no bias": Net(nn.LSTM, bias=False, batch_first=True),
    "GRU": Net(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
    "GRU no bias": Net(nn.GRU, num_layers=3, bias=False, batch_first=True),
    "RNN tanh": Net(nn.RNN, num_layers=2, bidirectional=True, batch_first=True),
    "RNN relu": Net(nn.RNN, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("name", NETS)
def test_legacy_exporter_agrees(tmp_path: Path, name: str) -> None:
    """At a batch and time that neither exporter has seen, both graphs answer the same."""
    net = NETS[name].eval()
    path = tmp_path / "legacy.onnx"
    # Those of a model that packs.
    given = (torch.tensor([4, 3, 1]),) if isinstance(net, Packs) else ()
    with warnings.catch_warnings():
        # It is deprecated, warns of batches that are fixed, which these are not, and of what it folds.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(3, 4, 5), *given),
            path,
            dynamo=False,
            input_names=["x", "lengths"][: 1 + len(given)],
            dynamic_axes={"x": {0: "batch", 1: "time"}, **({"lengths": {0: "batch"}} if given else {})},
        )
    legacy = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exported = export(net.eval(), (torch.randn(3, 4, 5), *given), tmp_path)
    x = torch.randn(5, 13, 5)
    states = [torch.zeros_like(state) for state in exported.states(5)]
    lengths = [13, 13, 9, 4, 1] if given else [13] * 5
    (wanted,) = legacy.run(None, {"x": np.asarray(x), **({"lengths": np.array(lengths)} if given else {})})
    for found in exported.run("model.onnx", x, int32(*lengths), *states):
        assert_close(found["output"], torch.from_numpy(wanted))
