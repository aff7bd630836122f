"""What the soak serves: small models whose answers eager PyTorch gives too, and one that counts what it was run on."""

from pathlib import Path

import torch
from tests.support.models import Speaker, Tagger, make
from torch import nn

import carousel_export as cx

# Chunks of a sequence that `Tally` can tell apart.
MARKS = 48


class Tally(nn.Module):
    """Marks `[batch, time]` → `[batch, time, 48]`: how many frames with each mark there were so far.

    A recurrent layer that adds: a frame that is lost or run twice is in every answer after it, as a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks = nn.Embedding(MARKS, MARKS)
        self.rnn = nn.RNN(MARKS, MARKS, nonlinearity="relu", bias=False, batch_first=True)
        for weight in (self.marks.weight, self.rnn.weight_ih_l0, self.rnn.weight_hh_l0):
            nn.init.eye_(weight)

    def forward(self, marks: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.marks(marks))[0]


def export_all(folder: Path) -> None:
    """A bidirectional LSTM, a causal one over token ids, and the one that counts."""
    torch.manual_seed(7)
    cx.export(make(Tagger), torch.randn(3, 6, 5), name="tagger", out=folder, policy=cx.Lookahead(block=4, ahead=2))
    cx.export(make(Speaker), torch.randint(0, 11, (3, 6)), name="speaker", out=folder)
    export_tally(folder)


def export_tally(folder: Path) -> None:
    cx.export(make(Tally), torch.randint(0, MARKS, (3, 6)), name="tally", out=folder)
