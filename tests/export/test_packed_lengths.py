"""A model may pack by the session's lengths only: any other are refused, and not served wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import carousel_export as cx

Count = Callable[..., Tensor | list[int]]


class Packs(nn.Module):
    """Packs, once for each of the functions, by what they make of the input and, if it is given, of its lengths."""

    def __init__(self, *counts: Count, tokens: bool = False, largest: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5) if tokens else nn.Identity()
        self.layers = nn.ModuleList(nn.LSTM(6 if i else 5, 3, batch_first=True, bidirectional=True) for i in range(2))
        self.counts = counts
        self.largest = largest

    def run(self, x: Tensor, *lengths: Tensor) -> Tensor:
        y = self.embedding(x)
        for layer, count in zip(self.layers, self.counts, strict=False):
            packed = pack_padded_sequence(y, count(x, *lengths), batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])
        return y.max(dim=1).values if self.largest else y


class Alone(Packs):
    """Takes no lengths."""

    def __init__(self, *counts: Count, tokens: bool = False, largest: bool = False) -> None:
        super().__init__(*counts, tokens=tokens, largest=largest)
        self.layers = self.layers[: len(counts)]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Given(Alone):
    """Takes lengths."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.run(x, lengths)


class Strided(Given):
    """Every second frame, and the lengths that are left."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.run(x[:, ::2], (lengths + 1) // 2)


def words(x: Tensor) -> Tensor:
    return (x != 0).sum(1).clamp(min=1)


def loud(x: Tensor) -> Tensor:
    return (x.abs().sum(-1) > 1.5).sum(1).clamp(min=1)


def given(_: Tensor, lengths: Tensor) -> Tensor:
    return lengths


X, LENGTHS = torch.randn(3, 7, 5), torch.tensor([7, 4, 2])
ZEROS, NO_ZEROS = torch.tensor([[3, 4, 1, 2], [5, 8, 0, 0]]), torch.tensor([[3, 4, 1, 2], [5, 8, 6, 7]])
COMPUTED = ["packs by lengths it computes from its input", "take the lengths as an argument", "call 1 of pack_padded"]
OTHERS = ["other lengths", "pack by the argument"]

REFUSED = {
    "counted words": (Alone(words, tokens=True), ZEROS, COMPUTED),
    "counted words, none padding": (Alone(words, tokens=True), NO_ZEROS, COMPUTED),
    "counted words, one answer": (Alone(words, tokens=True, largest=True), NO_ZEROS, COMPUTED),
    "loud frames": (Alone(loud), X, COMPUTED),
    "at most ten": (Given(lambda _, n: n.clamp(max=10)), (X, LENGTHS), [*OTHERS, "call 1 of pack_padded_sequence"]),
    "halves": (Given(given, lambda _, n: (n + 1) // 2), (X, LENGTHS), [*OTHERS, "call 2 of pack_padded_sequence"]),
    "of its own size": (Alone(lambda x: [min(x.shape[1], 30)] * len(x)), X, COMPUTED),
    "behind a stride": (
        Strided(given),
        (X, LENGTHS),
        ["computes from 'lengths'", "behind a stride in time, do not pack"],
    ),
    "behind a stride, whole": (Strided(given), (X, torch.tensor([7, 7, 7])), ["computes from 'lengths'"]),
    "padding that counts": (Given(given, largest=True), (X, LENGTHS), ["pack_padded_sequence", "beyond"]),
}
ACCEPTED = {
    "given": (Given(given), (X, LENGTHS)),
    "given, listed": (Given(lambda _, n: n.cpu().tolist()), (X, LENGTHS)),
    "given twice": (Given(given, given), (X, LENGTHS)),
    "given, tokens": (Given(given, tokens=True), (NO_ZEROS, torch.tensor([4, 3]))),
    "whole, a tensor": (Alone(lambda x: torch.full((x.shape[0],), x.shape[1]), largest=True), X),
    "whole, a list": (Alone(lambda x: [x.shape[1]] * x.shape[0], largest=True), X),
    "whole, listed": (Alone(lambda x: [x.size(1) for _ in range(len(x))]), X),
    "whole, computed": (Alone(lambda x: (x >= 0).sum(1), tokens=True), ZEROS),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_lengths_are_refused(tmp_path: Path, case: str) -> None:
    """One line names the call and the way out, and no bundle is left."""
    model, example, said = REFUSED[case]
    with pytest.raises(cx.ModelError) as caught:
        cx.export(model.eval(), example, name="model", out=tmp_path)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert not list(tmp_path.rglob("manifest*"))


@pytest.mark.parametrize("case", ACCEPTED)
def test_the_sessions_lengths_are_accepted(tmp_path: Path, case: str) -> None:
    """However they are written."""
    model, example = ACCEPTED[case]
    assert cx.parity(cx.export(model.eval(), example, name="model", out=tmp_path), model)["share"] <= 1
