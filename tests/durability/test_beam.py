"""The beam search of docs/state.md, as it stands there."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.client.process import serving
from tests.support.models import Speaker, make, whole

import carousel_client as cc

PAGE = Path(__file__).parents[2] / "docs" / "state.md"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits)


def read_function() -> Callable[..., list[tuple[float, list[int]]]]:
    (source,) = re.findall(r"```python\n(def beam_search.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"ExitStack": ExitStack, "itemgetter": itemgetter, "log_softmax": log_softmax}
    exec(compile(source, PAGE, "exec"), names)
    return names["beam_search"]


def searched_eagerly(prompt: list[int], width: int, steps: int) -> list[tuple[float, list[int]]]:
    """The same search, every sequence run from its start."""
    model = make(Speaker)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        ways = []
        for score, tokens in beams:
            gains = torch.log_softmax(whole(model, torch.tensor(prompt + tokens))[-1], 0).tolist()
            ways += [(score + gain, [*tokens, token]) for token, gain in enumerate(gains)]
        beams = sorted(ways, key=itemgetter(0), reverse=True)[:width]
    return beams


def test_the_search_of_the_guide_finds_what_a_search_without_sessions_does(models: Path):
    """Beam search over branches gives the sequences and scores of eager PyTorch, and leaves no session open."""
    with serving(models) as server, cc.connect(server.address) as client:
        got = read_function()(client, "speaker", [3, 1, 4], width=4, steps=6)
        assert client.sessions() == []
    wanted = searched_eagerly([3, 1, 4], width=4, steps=6)
    assert [tokens for _, tokens in got] == [tokens for _, tokens in wanted]
    # 1e-5 a step.
    np.testing.assert_allclose([score for score, _ in got], [score for score, _ in wanted], rtol=0, atol=6e-5)
