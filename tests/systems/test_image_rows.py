"""Row-by-row image classifiers: an image's rows are the frames, and the answer is one for the image."""

from collections.abc import Iterator

import pytest
import torch
from tests.support.models import make
from tests.support.served import LENGTHS, assert_near, infer_together, served, stream_together
from torch import Tensor, nn

import carousel_client as cc
from carousel_protos.v1.manifest_pb2 import POLICY_KIND_CAUSAL

pytestmark = pytest.mark.system("7", "row-by-row image classifier: running answer, ragged batches")


class LastFrame(nn.Module):
    """Images `[batch, rows, 28]` → class scores `[batch, 10]`, from the last frame."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 128, num_layers=2, batch_first=True)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.fc(out[:, -1])


class LastState(LastFrame):
    """The same from the last layer's h_n."""

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x)
        return self.fc(h[-1])


class Score(LastFrame):
    """One number for an image, `[batch]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


MODELS = {"frame": LastFrame, "state": LastState, "score": Score}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: make(kind) for name, kind in MODELS.items()}
    with served(tmp_path_factory.mktemp("rows"), models, torch.rand(2, 28, 28)) as connected:
        yield connected


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_runs_along(client: cc.Client, name: str) -> None:
    """Under causal every chunk is answered with the class scores so far, and the last one with the image's."""
    assert client.model(name).manifest.default_policy.kind == POLICY_KIND_CAUSAL
    model = make(MODELS[name])
    images = [torch.rand(length, 28) for length in LENGTHS]
    for image, answers in zip(images, stream_together(client, name, images, 4), strict=True):
        with torch.no_grad():
            for chunk, answer in enumerate(answers[:-1]):
                assert_near(answer, model(image[None, : 4 * (chunk + 1)])[0])
            assert_near(answers[-1], model(image[None])[0])


@pytest.mark.parametrize("name", MODELS)
def test_images_of_different_height_share_a_batch(client: cc.Client, name: str) -> None:
    """The bundle is ragged, and an image beside taller ones is answered as it is alone."""
    assert client.model(name).manifest.ragged
    model = make(MODELS[name])
    images = [torch.rand(length, 28) for length in LENGTHS]
    with torch.no_grad():
        for image, answer in zip(images, infer_together(client, name, images), strict=True):
            assert_near(answer["output"], model(image[None])[0])
