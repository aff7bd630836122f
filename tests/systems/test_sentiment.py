"""Sentiment of a whole text: a bidirectional LSTM, pooled over time."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from tests.support.served import LENGTHS, assert_near, infer_together, served, stream_together
from torch import Tensor, nn

import carousel_client as cc
from carousel_protos.v1.manifest_pb2 import POLICY_KIND_FULL

pytestmark = pytest.mark.system("8", "sentiment: BiLSTM pooled by mean, max or the last of both directions")

HIDDEN = 6
Pool = Callable[[Tensor, Tensor], Tensor]
POOLS: dict[str, Pool] = {
    "mean": lambda out, _: out.mean(dim=1),
    "max": lambda out, _: torch.max(out, 1)[0],
    "max_pool": lambda out, _: F.adaptive_max_pool1d(out.transpose(1, 2), 1).squeeze(2),
    "last": lambda out, _: torch.cat([out[:, -1, :HIDDEN], out[:, 0, HIDDEN:]], dim=1),
    "state": lambda _, h: torch.cat([h[-2], h[-1]], dim=1),
}


class Sentiment(nn.Module):
    """Tokens `[batch, time]` → `[batch, 2]`."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 5)
        self.lstm = nn.LSTM(5, HIDDEN, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * HIDDEN, 2)
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        out, (h, _) = self.lstm(self.embedding(tokens))
        return self.fc(self.pool(out, h))


def sentiment(pool: str) -> Sentiment:
    torch.manual_seed(0)
    return Sentiment(POOLS[pool]).eval()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: sentiment(name) for name in POOLS}
    with served(tmp_path_factory.mktemp("sentiment"), models, torch.randint(0, 13, (3, 6))) as connected:
        yield connected


@pytest.mark.parametrize("pool", POOLS)
def test_padding_never_leaks_into_the_pool(client: cc.Client, pool: str) -> None:
    """Texts of different length in one batch are each answered as alone, from one request and from sessions."""
    manifest = client.model(pool).manifest
    assert manifest.ragged
    assert [policy.kind for policy in manifest.policies] == [POLICY_KIND_FULL]
    texts = [torch.randint(0, 13, (length,)) for length in LENGTHS]
    together = infer_together(client, pool, texts)
    streamed = stream_together(client, pool, texts, 4)
    model = sentiment(pool)
    with torch.no_grad():
        for text, answer, answers in zip(texts, together, streamed, strict=True):
            wanted = model(text[None])[0]
            assert_near(answer["output"], wanted)
            assert_near(answers[-1], wanted)
