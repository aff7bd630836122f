"""Recurrent layers that start from what forward computes of its input: whole sequences, under full."""

from collections.abc import Iterator

import pytest
import torch
from tests.support.served import LENGTHS, assert_near, infer_together, served, stream_together
from torch import Tensor, nn

import carousel_client as cc
from carousel_protos.v1 import manifest_pb2 as pb

pytestmark = pytest.mark.system("1", "a start that forward computes, of an encoder or a mean, under full")


class Recoded(nn.Module):
    """`[batch, time, 5]` → `[batch, time, 3]`: a decoder that starts from the final state of an encoder, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 4, num_layers=2, batch_first=True)
        self.decoder = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=False)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(x)
        return self.linear(self.decoder(x.flip(1), state)[0])


class Primed(nn.Module):
    """`[batch, time, 5]` → `[batch, time, 8]`: a bidirectional GRU that starts from a layer on the input's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(5, 8)
        self.gru = nn.GRU(5, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        h_0 = self.start(x.mean(dim=1)).tanh().unflatten(1, (2, 4)).transpose(0, 1).contiguous()
        return self.gru(x, h_0)[0]


def make(name: str) -> nn.Module:
    torch.manual_seed(2)
    return {"recoded": Recoded, "primed": Primed}[name]().eval()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: make(name) for name in ("recoded", "primed")}
    with served(tmp_path_factory.mktemp("computed"), models, torch.randn(3, 7, 5)) as connected:
        yield connected


@pytest.mark.parametrize(
    ("name", "layer", "states"),
    [("recoded", "decoder", ["encoder.h_0", "encoder.c_0"]), ("primed", "gru", [])],
)
def test_a_computed_start(client: cc.Client, name: str, layer: str, states: list[str]) -> None:
    """The layer is named and keeps no state; sessions and rows of a ragged batch are answered as eager answers."""
    manifest = client.model(name).manifest
    assert [policy.kind for policy in manifest.policies] == [pb.POLICY_KIND_FULL]
    assert manifest.notes[0].startswith(f"{layer} starts from a state that forward makes of its input")
    assert [state.input for state in manifest.states] == states
    assert layer in [found.name for found in manifest.layers]
    rows = [torch.randn(length, 5) for length in LENGTHS]
    with torch.no_grad():
        wanted = [make(name)(row[None])[0] for row in rows]
    for answer, each in zip(infer_together(client, name, rows), wanted, strict=True):
        assert_near(answer["output"], each)
    for answers, each in zip(stream_together(client, name, rows, 4), wanted, strict=True):
        assert_near(answers[-1], each)
