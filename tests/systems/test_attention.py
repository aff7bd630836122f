"""A bidirectional LSTM with attention over time."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tests.support.served import LENGTHS, assert_near, infer_together, served
from torch import Tensor, nn

import carousel_client as cc
from carousel_protos.v1.manifest_pb2 import POLICY_KIND_FULL

pytestmark = pytest.mark.system("9", "BiLSTM with attention over time, its weights as a second output")

# Of scores [batch, time] and hidden states [batch, time, size], the context.
Attend = Callable[[Tensor, Tensor], Tensor]
ATTENDS: dict[str, Attend] = {
    "sum": lambda weights, out: (weights.unsqueeze(-1) * out).sum(dim=1),
    "bmm": lambda weights, out: torch.bmm(weights.unsqueeze(1), out).squeeze(1),
    "einsum": lambda weights, out: torch.einsum("bt,bth->bh", weights, out),
}


class Attention(nn.Module):
    """Tokens `[batch, time]` → class scores `[batch, 3]`, and the weights `[batch, time]`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.score = nn.Linear(12, 1)
        self.fc = nn.Linear(12, 3)
        self.attend = attend

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        out, _ = self.lstm(self.embedding(tokens))
        weights = torch.softmax(self.score(torch.tanh(out)).squeeze(-1), dim=1)
        return {"logits": self.fc(self.attend(weights, out)), "weights": weights}


def attention(name: str) -> Attention:
    torch.manual_seed(0)
    return Attention(ATTENDS[name]).eval()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: attention(name) for name in ATTENDS}
    with served(tmp_path_factory.mktemp("attention"), models, torch.randint(0, 13, (3, 6))) as connected:
        yield connected


@pytest.mark.parametrize("name", ATTENDS)
def test_attention_is_over_a_rows_own_frames(client: cc.Client, name: str) -> None:
    """Texts of different length in one batch have the weights and the answer that each has alone."""
    manifest = client.model(name).manifest
    assert manifest.ragged
    assert [policy.kind for policy in manifest.policies] == [POLICY_KIND_FULL]
    assert [list(output.dims) for output in manifest.outputs] == [["batch", "3"], ["batch", "time"]]
    texts = [torch.randint(0, 13, (length,)) for length in LENGTHS]
    model = attention(name)
    with torch.no_grad():
        for text, answer in zip(texts, infer_together(client, name, texts), strict=True):
            wanted = model(text[None])
            assert_near(answer["logits"], wanted["logits"][0])
            assert_near(answer["weights"], wanted["weights"][0])


def test_weights_are_zero_after_a_row(client: cc.Client) -> None:
    """In a ragged batch a row's weights sum to one, and are zero after its end."""
    tokens = np.zeros((2, 8), np.int64)
    weights = client.infer("sum", tokens, lengths=[8, 3])["weights"]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert not weights[1, 3:].any()


def test_a_session_answers_at_its_end(client: cc.Client) -> None:
    """A session under full has every frame's weight and the class scores with its last answer."""
    text = torch.randint(0, 13, (11,))
    with client.session("bmm") as session:
        answers = list(session.stream([chunk.numpy() for chunk in torch.split(text, 4)]))
    assert all(len(answer["weights"]) == 0 for answer in answers[:-1])
    with torch.no_grad():
        wanted = attention("bmm")(text[None])
    assert_near(answers[-1]["weights"], wanted["weights"][0])
    assert_near(answers[-1]["logits"], wanted["logits"][0])
