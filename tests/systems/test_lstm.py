"""`nn.LSTM` with every argument of its constructor, and with states of the model's own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parity.oracle import Net
from tests.support.layers import check_layer, served_layers
from tests.support.served import LENGTHS, assert_near, infer_together, served
from torch import Tensor, nn

import carousel_client as cc

NETS = {
    "four-layers": Net(num_layers=4, bias=False, dropout=0.3),
    "bidirectional": Net(num_layers=2, bidirectional=True, batch_first=True),
    "one-layer": Net(batch_first=True),
    "projected": Net(num_layers=2, proj_size=3, bidirectional=True),
    "projected-causal": Net(proj_size=4, bias=False, batch_first=True),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    with served_layers(tmp_path_factory.mktemp("lstm"), NETS) as connected:
        yield connected


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.system("1", "nn.LSTM: layers, directions, bias, batch_first, inactive dropout, proj_size")
@pytest.mark.parametrize("name", NETS)
def test_lstm(client: cc.Client, name: str) -> None:
    """Whatever its arguments, the served layer answers as the eager one, whole, block by block and with look-ahead."""
    check_layer(client, name, NETS[name].eval())


class Started(nn.Module):
    """Starts each sequence from learned rows, the same for every input."""

    def __init__(self, *, bidirectional: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=bidirectional)
        rows = 2 if bidirectional else 1
        self.h_0, self.c_0 = (nn.Parameter(torch.randn(rows, 1, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        return self.lstm(x, (self.h_0.repeat(1, batch, 1), self.c_0.repeat(1, batch, 1)))[0]


@pytest.mark.system("1", "an initial state of the model's own, learned, in sessions and whole sequences")
def test_learned_initial_state(tmp_path: Path) -> None:
    """A state that the model learned is where every session, every row of Infer and every backward direction starts."""
    torch.manual_seed(2)
    models = {"causal": Started(bidirectional=False).eval(), "both": Started(bidirectional=True).eval()}
    rows = [torch.randn(length, 5) for length in LENGTHS]
    with served(tmp_path, models, torch.randn(3, 4, 5), data=[torch.randn(9, 5)]) as client, torch.no_grad():
        for name, model in models.items():
            states = client.model(name).manifest.states
            kept = [torch.frombuffer(bytearray(state.initial), dtype=torch.float32) for state in states]
            assert torch.equal(kept[0], model.h_0.flatten())
            assert torch.equal(kept[1], model.c_0.flatten())
            for row, answer in zip(rows, infer_together(client, name, rows), strict=True):
                assert_near(answer["output"], model(row[None])[0])
        x = rows[-1]
        # Looking ahead to the end from the first block on is the offline answer; the second session reuses a row.
        for name, policy in (("causal", None), ("both", cc.Lookahead(5, 25)), ("causal", None)):
            with client.session(name, policy=policy) as session:
                found = np.concatenate(list(session.stream([chunk.numpy() for chunk in torch.split(x, 4)])))
            assert_near(found, models[name](x[None])[0])
