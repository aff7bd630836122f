"""Which arguments are states and lengths is found out, however they are given and however small the example is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import carousel_export as cx


class Apart(nn.Module):
    """Takes h and c as two arguments, and returns them in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        y, (h, c) = self.lstm(x, (h, c))
        return {"h": h, "y": y, "c": c}


class Paired(nn.Module):
    """Takes the pairs of two layers in a list, and hands them back so."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.LSTM(5, 7, batch_first=True)
        self.above = nn.LSTM(7, 4, batch_first=True)

    def forward(self, states: list[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        y, below = self.below(x, states[0])
        y, above = self.above(y, states[1])
        return y, [below, above]


class Packed(nn.Module):
    """Packs by lengths that it is given as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 7, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, frames: list[int]) -> Tensor:
        packed = pack_padded_sequence(x, frames, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]


def pair(size: int, batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, batch, size), torch.zeros(1, batch, size)


CASES = {
    "apart": (Apart(), (torch.randn(4, 3, 5), *pair(7, 3)), ["x", "lstm.h_0", "lstm.c_0"], ["x"], ["y"]),
    "paired, rows of one frame": (
        Paired(),
        ([pair(7, 2), pair(4, 2)], torch.randn(2, 1, 5)),
        ["[(below.h_0, below.c_0), (above.h_0, above.c_0)]", "x"],
        ["x"],
        ["output"],
    ),
    "lengths in a list, batch as long as time": (
        Packed(),
        (torch.randn(3, 3, 5), [3, 1, 2]),
        ["x", "lengths"],
        ["x"],
        ["output"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_recognised(tmp_path: Path, case: str) -> None:
    """The bundle's tensors are inputs and outputs alone; the manifest says how to call the model, and is believed."""
    model, example, arguments, inputs, outputs = CASES[case]
    bundle = cx.export(model.eval(), example, name="model", out=tmp_path)
    manifest = bundle.manifest
    assert list(manifest.arguments) == arguments
    assert [port.name for port in manifest.inputs] == inputs
    assert [port.name for port in manifest.outputs] == outputs
    assert not manifest.contexts
    assert cx.parity(bundle, model)["share"] <= 1
