"""A language model: embedding, recurrent layer and linear layer, its state taken and returned by forward."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.served import LENGTHS, assert_near, infer_together
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_protos.v1.manifest_pb2 import POLICY_KIND_CAUSAL

State = Tensor | tuple[Tensor, Tensor]
WORDS = 17


class LanguageModel(nn.Module):
    """Tokens `[batch, time]` and the state before them → scores of the next word, and the state after them."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.rnn = kind(6, 9, num_layers=2, batch_first=True)
        self.fc = nn.Linear(9, WORDS)

    def forward(self, tokens: Tensor, hidden: State) -> tuple[Tensor, State]:
        y, hidden = self.rnn(self.embedding(tokens), hidden)
        return self.fc(y), hidden

    def start(self, batch: int) -> State:
        zeros = torch.zeros(2, batch, 9)
        return (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else zeros


def language_model(kind: type[nn.RNNBase]) -> LanguageModel:
    torch.manual_seed(4)
    model = LanguageModel(kind).eval()
    with torch.no_grad():
        # Far from uniform, so that the best word is the best by far more than the tolerance.
        model.fc.weight *= 5
        model.embedding.weight *= 3
    return model


MODELS = {"lstm": language_model(nn.LSTM), "gru": language_model(nn.GRU)}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    folder = tmp_path_factory.mktemp("language")
    for name, model in MODELS.items():
        cx.export(model.eval(), (torch.randint(0, WORDS, (3, 4)), model.start(3)), name=name, out=folder)
    with serving(folder) as server, cc.connect(server.address) as connected:
        yield connected


@pytest.mark.system("11", "language model: the state that forward takes and returns is the session's")
@pytest.mark.parametrize("name", MODELS)
def test_state_of_forward_is_the_sessions(client: cc.Client, name: str) -> None:
    """The bundle takes tokens and answers scores alone, token by token from many sessions as eager over the whole."""
    manifest = client.model(name).manifest
    assert [port.name for port in manifest.inputs] == ["tokens"]
    assert len(manifest.outputs) == 1
    assert [state.input for state in manifest.states] == ["rnn.h_0", "rnn.c_0"][: 2 if name == "lstm" else 1]
    assert manifest.default_policy.kind == POLICY_KIND_CAUSAL
    model = MODELS[name]
    rows = [torch.randint(0, WORDS, (length,)) for length in LENGTHS]
    with torch.no_grad():
        for row, answer in zip(rows, infer_together(client, name, rows), strict=True):
            assert_near(answer["output"], model(row[None], model.start(1))[0][0])
        with client.session(name) as session:
            found = np.concatenate([session.send(token.numpy()) for token in rows[2][:, None]])
        assert_near(found, model(rows[2][None], model.start(1))[0][0])


@pytest.mark.system("11", "greedy generation through the server, each word fed back")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(client: cc.Client, name: str) -> None:
    """A client that sends back the best word of each answer generates the text that the eager loop generates."""
    model = MODELS[name]
    wanted, found = [3], [3]
    hidden = model.start(1)
    with torch.no_grad(), client.session(name) as session:
        for _ in range(25):
            scores, hidden = model(torch.tensor([[wanted[-1]]]), hidden)
            wanted.append(int(scores[0, -1].argmax()))
            answer = session.send(np.array([found[-1]]))
            found.append(int(answer[-1].argmax()))
            assert_near(answer[-1], scores[0, -1])
    assert found == wanted
