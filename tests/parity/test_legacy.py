"""The legacy exporter as an oracle: another program's graph of the same module, run on the same whole sequences."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tests.parity.oracle import Net, assert_close, export, int32
from torch import nn

NETS = {
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
    with warnings.catch_warnings():
        # It is deprecated, warns of batches that are fixed, which these are not, and of what it folds.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(3, 4, 5),),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch", 1: "time"}},
        )
    legacy = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exported = export(net.eval(), torch.randn(3, 4, 5), tmp_path)
    x = torch.randn(5, 13, 5)
    states = [torch.zeros_like(state) for state in exported.states(5)]
    (wanted,) = legacy.run(None, {"x": np.asarray(x)})
    for found in exported.run("model.onnx", x, int32(*[13] * 5), *states):
        assert_close(found["output"], torch.from_numpy(wanted))
