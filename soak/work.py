"""Sequences cut into chunks, and what eager PyTorch answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from soak.models import MARKS, Tally
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole

import carousel_client as cc

Array = NDArray[np.generic]

# What is streamed, in turn: a model and a policy of its.
KINDS: tuple[tuple[str, cc.Policy | None], ...] = (
    ("tally", None),
    ("tagger", None),
    ("tagger", cc.Lookahead(block=1, ahead=8)),
    ("speaker", None),
    ("tally", None),
    ("tagger", cc.Carry(block=3)),
    ("tagger", cc.Full()),
)


@dataclass(frozen=True)
class Work:
    """One sequence, cut as its client sends it."""

    model: str
    policy: cc.Policy | None
    chunks: Sequence[Array]

    def eager(self) -> Array:
        """What the model answers to all of it, `[frames, …]`, from PyTorch alone."""
        x = torch.from_numpy(np.concatenate(self.chunks))
        match self.model, self.policy:
            case "tally", _:
                answer = whole(Tally().eval(), x)
            case "speaker", _:
                answer = whole(make(Speaker), x)
            case _, cc.Carry(block):
                assert block is not None, "the soak's blocks have a size"
                sizes = [block] * (len(x) // block) + ([len(x) % block] if len(x) % block else [])
                answer = carried(make(Tagger), x, sizes)
            case _, cc.Full():
                answer = whole(make(Tagger), x)
            case _, cc.Lookahead(block, ahead):
                assert block is not None, "the soak's blocks have a size"
                assert ahead is not None, "and so do the frames ahead"
                answer = looked_ahead(make(Tagger), x, block, ahead)
            case _:
                answer = looked_ahead(make(Tagger), x, 4, 2)  # the bundle's
        return np.asarray(answer.numpy())

    def miscounted(self, answers: Sequence[Array]) -> tuple[int, int]:
        """Chunks that were lost and chunks that were doubled, as `Tally`'s last answer has them."""
        frames = np.array([len(chunk) for chunk in self.chunks])
        counted = [answer for answer in answers if len(answer)][-1][-1][: len(frames)]
        return int((counted < frames).sum()), int((counted > frames).sum())


def draw(count: int, chunks: int, seed: int) -> list[Work]:
    """`count` sequences of `chunks` chunks of 1 to 8 frames, each kind in turn."""
    assert chunks <= MARKS, "every chunk has a mark of its own"
    rng = np.random.default_rng(seed)
    works = []
    for number in range(count):
        model, policy = KINDS[number % len(KINDS)]
        sizes = rng.integers(1, 9, chunks)
        cuts = np.cumsum(sizes)[:-1]
        if model == "tally":
            frames: Array = np.repeat(np.arange(chunks), sizes)
        elif model == "speaker":
            frames = rng.integers(0, 11, int(sizes.sum()))
        else:
            frames = rng.standard_normal((int(sizes.sum()), 5)).astype(np.float32)
        works.append(Work(model, policy, np.split(frames, cuts)))
    return works
