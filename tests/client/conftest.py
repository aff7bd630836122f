"""Server processes, and a model with several tensors for them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.client.process import ServerProcess, serving
from tests.support.models import make
from tests.support.shared import make_once
from torch import nn

import carousel_client as cc
import carousel_export as cx


class Mixer(nn.Module):
    """Time-major `x` `[time, batch, 4]` and `ids` `[time, batch]` → `[time, batch, 3]` and a last `[batch, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.rnn = nn.LSTM(9, 8)
        self.frames = nn.Linear(8, 3)
        self.summary = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = self.rnn(torch.cat([x, self.embedding(ids)], dim=-1))
        return self.frames(y), self.summary(y[-1])


@pytest.fixture(scope="session")
def mixed_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models` and a time-major model with two inputs and two outputs, one of which has one value a sequence."""

    def make_models(folder: Path) -> None:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        example = (torch.randn(6, 3, 4), torch.randint(0, 6, (6, 3)))
        names = {"input_names": ["x", "ids"], "output_names": ["frames", "summary"]}
        cx.export(make(Mixer), example, name="mixer", out=folder, **names)

    return make_once(tmp_path_factory, "mixed", make_models)


@pytest.fixture(scope="session")
def shared_address(mixed_models: Path) -> Iterator[str]:
    with serving(mixed_models) as server:
        yield server.address


@pytest.fixture
def own_server(mixed_models: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server for one test; `@pytest.mark.settings(max_sessions=2)` changes its settings."""
    marker = request.node.get_closest_marker("settings")
    with serving(mixed_models, **(marker.kwargs if marker else {})) as server:
        yield server


@pytest.fixture
def client(shared_address: str) -> Iterator[cc.Client]:
    with cc.connect(shared_address) as connected:
        yield connected
