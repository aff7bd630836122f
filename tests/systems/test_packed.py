"""Models that pack their sequences: the lengths are those of the session, whatever the example's were."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.served import LENGTHS, assert_near, infer_together
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import carousel_client as cc
import carousel_export as cx

pytestmark = pytest.mark.system("13", "pack_padded_sequence and pad_packed_sequence, lengths given")


class Tagger(nn.Module):
    """Packs by the lengths that it is given, and pads with a value that its linear layer would show."""

    def __init__(self, *, batch_first: bool, enforce_sorted: bool, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
        self.fc = nn.Linear(12 if bidirectional else 6, 3)
        self.options = {"batch_first": batch_first, "enforce_sorted": enforce_sorted}

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        batch_first = self.options["batch_first"]
        packed = pack_padded_sequence(x, lengths.cpu(), **self.options)
        total = x.shape[1 if batch_first else 0]
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=batch_first, padding_value=-2.0, total_length=total)
        return self.fc(y)


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(6)
    return build().eval()


TAGGERS = {
    "time-major": make(lambda: Tagger(batch_first=False, enforce_sorted=True, bidirectional=True)),
    "batch-first": make(lambda: Tagger(batch_first=True, enforce_sorted=False, bidirectional=True)),
    "causal": make(lambda: Tagger(batch_first=True, enforce_sorted=True, bidirectional=False)),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    folder = tmp_path_factory.mktemp("packed")
    for name, model in TAGGERS.items():
        x = torch.randn(3, 4, 5) if model.options["batch_first"] else torch.randn(4, 3, 5)
        cx.export(model.eval(), (x, torch.tensor([4, 2, 1])), name=name, out=folder)
    with serving(folder) as server, cc.connect(server.address) as connected:
        yield connected


def eager(model: nn.Module, row: Tensor) -> Tensor:
    """A sequence alone, with its own length."""
    batch_first = model.options["batch_first"]
    with torch.no_grad():
        y = model(row[None] if batch_first else row[:, None], torch.tensor([len(row)]))
    return y[0] if batch_first else y[:, 0]


@pytest.mark.parametrize("name", TAGGERS)
def test_lengths_are_no_input(client: cc.Client, name: str) -> None:
    """The argument `lengths` is fed from the session's blocks; rows longer and shorter than the example's are right."""
    manifest = client.model(name).manifest
    assert [port.name for port in manifest.inputs] == ["x"]
    assert not manifest.contexts
    assert list(manifest.arguments) == ["x", "lengths"]
    rows = [torch.randn(length, 5) for length in LENGTHS]
    for row, answer in zip(rows, infer_together(client, name, rows), strict=True):
        assert_near(answer["output"], eager(TAGGERS[name], row))


def test_packed_layers_stream(client: cc.Client) -> None:
    """A causal packed model answers chunk by chunk what it answers over the whole."""
    x = torch.randn(30, 5)
    with client.session("causal") as session:
        found = np.concatenate(list(session.stream([chunk.numpy() for chunk in torch.split(x, 7)])))
    assert_near(found, eager(TAGGERS["causal"], x))
