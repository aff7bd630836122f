"""Lengths that a model masks by, and packs nothing with, are the session's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import carousel_export as cx
from carousel_protos.v1 import manifest_pb2 as pb

X, LENGTHS = torch.randn(3, 7, 5), torch.tensor([7, 4, 2])


def mask(y: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(y.shape[1])[None] < lengths[:, None])[..., None]


class Masks(nn.Module):
    """A BiLSTM, and code for its frames and the lengths."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor], *, bidirectional: bool = True) -> None:
        super().__init__()
        self.answer = answer
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.answer(self.lstm(x)[0], lengths)


class Renamed(Masks):
    """Calls them something else, and takes them first."""

    def forward(self, valid: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.answer(self.lstm(x)[0], valid)


class Speaks(nn.Module):
    """A whole number a row that is no length: who speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        return self.lstm(x + self.embedding(speaker)[:, None])[0]


def attended(y: Tensor, lengths: Tensor) -> Tensor:
    weights = y.sum(-1, keepdim=True).masked_fill(~mask(y, lengths), -1e9).softmax(1)
    return (weights * y).sum(1)


ANSWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "frames beyond are zero": lambda y, n: y * mask(y, n),
    "attention": attended,
    "masked mean": lambda y, n: (y * mask(y, n)).sum(1) / n[:, None],
    "masked maximum": lambda y, n: y.masked_fill(~mask(y, n), -1e9).amax(1),
    "last frame": lambda y, n: y.gather(1, (n - 1)[:, None, None].expand(-1, 1, y.shape[2])).squeeze(1),
    "mean by lengths": lambda y, n: y.sum(1) / n[:, None],
    "not used": lambda y, _: y,
}


@pytest.mark.parametrize("case", ANSWERS)
def test_lengths_are_found(tmp_path: Path, case: str) -> None:
    """They are no input and no context of the bundle, the manifest says where they stand, and the gate proves them."""
    model = Masks(ANSWERS[case]).eval()
    bundle = cx.export(model, (X, LENGTHS), name="model", out=tmp_path)
    assert list(bundle.manifest.arguments) == ["x", "lengths"]
    assert [port.name for port in bundle.manifest.inputs] == ["x"]
    assert not bundle.manifest.contexts
    assert bundle.manifest.ragged
    assert cx.parity(bundle, model)["share"] <= 1


@pytest.mark.parametrize("case", ["frames beyond are zero", "attention", "last frame"])
def test_lengths_are_found_by_what_they_do(tmp_path: Path, case: str) -> None:
    """Another name and another place are found as well, also of a causal model, and with named axes."""
    model = Renamed(ANSWERS[case], bidirectional=False).eval()
    dims = {"x": ("batch", "time", "5"), "valid": ("batch",)}
    bundle = cx.export(model, (LENGTHS.int(), X), name="model", out=tmp_path, dims=dims)
    assert list(bundle.manifest.arguments) == ["lengths", "x"]
    assert not bundle.manifest.contexts
    kind = pb.POLICY_KIND_FULL if case == "attention" else pb.POLICY_KIND_CAUSAL
    assert bundle.manifest.default_policy.kind == kind
    assert cx.parity(bundle, model)["share"] <= 1


def test_a_speaker_is_no_length(tmp_path: Path) -> None:
    """A number that says something else of a row stays a context."""
    bundle = cx.export(Speaks().eval(), (X, torch.tensor([3, 6, 2])), name="model", out=tmp_path)
    assert [port.name for port in bundle.manifest.contexts] == ["speaker"]
