"""BiLSTM-CRF taggers: emissions, best path and score through a served graph, against decoders in plain Python."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.support.crf import WORDS, LayerTagger, TutorialTagger
from tests.support.served import LENGTHS, assert_near, infer_together, served, stream_together
from torch import nn

import carousel_client as cc
from carousel_protos.v1.manifest_pb2 import POLICY_KIND_FULL

pytestmark = pytest.mark.system("10", "BiLSTM-CRF: emissions, best path and its score in the graph")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (TutorialTagger() if name == "tutorial" else LayerTagger(batch_first=name == "layer")).eval()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: make(name) for name in ("layer", "time-major", "tutorial")}
    with served(tmp_path_factory.mktemp("crf"), models, torch.randint(0, WORDS, (3, 6))) as connected:
        yield connected


@pytest.mark.parametrize("name", ["layer", "time-major"])
def test_a_layer_that_decodes_to_lists(client: cc.Client, name: str) -> None:
    """An unchanged model with a published CRF layer answers the paths of the layer's own decode, row by row."""
    manifest = client.model(name).manifest
    assert manifest.ragged
    assert [policy.kind for policy in manifest.policies] == [POLICY_KIND_FULL]
    texts = [torch.randint(0, WORDS, (length,)) for length in LENGTHS]
    model = make(name)
    with torch.no_grad():
        for text, answer in zip(texts, infer_together(client, name, texts), strict=True):
            wanted = model(text[None])
            assert_near(answer["emissions"], wanted["emissions"][0])
            assert answer["path"].tolist() == wanted["path"][0]


def test_start_and_stop_as_tags(client: cc.Client) -> None:
    """A model with `cx.viterbi_decode` has the paths and scores of the tutorial's loop, from sessions at once."""
    model = make("tutorial")
    assert isinstance(model, TutorialTagger)
    texts = [torch.randint(0, WORDS, (length,)) for length in LENGTHS]
    for text, answers in zip(texts, stream_together(client, "tutorial", texts, 4), strict=True):
        path, score = (answers[-1][output.name] for output in client.model("tutorial").manifest.outputs)
        with torch.no_grad():
            wanted_score, wanted_path = model.viterbi(model.features(text[None])[0])
        assert path.tolist() == wanted_path
        np.testing.assert_allclose(score, wanted_score, rtol=1e-5, atol=1e-5)
