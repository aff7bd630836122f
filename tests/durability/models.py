"""Models whose sessions are kept, moved and branched."""

from pathlib import Path

import torch
from tests.client.conftest import Mixer
from tests.support.models import Speaker, Tagger, make
from torch import nn

import carousel_export as cx


class Conditioned(nn.Module):
    """`[batch, time, 4]` and a context `[batch, 3]` → `[batch, time, 2]`: one GRU, whose state is one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(7, 6, batch_first=True)
        self.linear = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, speaker: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([x, speaker[:, None].expand(-1, x.shape[1], -1)], dim=-1)
        return self.linear(self.gru(seen)[0])


def export_all(folder: Path) -> None:
    """A bidirectional LSTM, a causal one, a GRU with a context, and a model with two inputs and two outputs."""
    torch.manual_seed(3)
    cx.export(make(Tagger), torch.randn(3, 6, 5), name="tagger", out=folder, policy=cx.Lookahead(block=4, ahead=2))
    cx.export(make(Speaker), torch.randint(0, 11, (3, 6)), name="speaker", out=folder)
    cx.export(make(Conditioned), (torch.randn(3, 6, 4), torch.randn(3, 3)), name="conditioned", out=folder)
    example = (torch.randn(6, 3, 4), torch.randint(0, 6, (6, 3)))
    names = {"input_names": ["x", "ids"], "output_names": ["frames", "summary"]}
    cx.export(make(Mixer), example, name="mixer", out=folder, **names)
