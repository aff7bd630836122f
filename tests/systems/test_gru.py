"""`nn.GRU` with every argument of its constructor."""

from collections.abc import Iterator

import pytest
from tests.parity.oracle import Net
from tests.support.layers import check_layer, served_layers
from torch import nn

import carousel_client as cc

NETS = {
    "three-layers": Net(nn.GRU, num_layers=3, bias=False),
    "bidirectional": Net(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
    "bidirectional-no-bias": Net(nn.GRU, bias=False, bidirectional=True),
    "one-layer": Net(nn.GRU, batch_first=True),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    with served_layers(tmp_path_factory.mktemp("gru"), NETS) as connected:
        yield connected


@pytest.mark.system("2", "nn.GRU: layers, directions, bias, batch_first, non-zero h_0")
@pytest.mark.parametrize("name", NETS)
def test_gru(client: cc.Client, name: str) -> None:
    """Whatever its arguments, the served layer answers as the eager one, whole, block by block and with look-ahead."""
    check_layer(client, name, NETS[name].eval())
