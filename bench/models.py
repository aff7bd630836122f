"""The two models of the benchmark, and their bundles, exported once into a folder."""

from pathlib import Path

import torch
from torch import nn

import carousel_export as cx

FRAMES = 10


class Stack(nn.Module):
    """`[batch, time, features]` → `[batch, time, 32]`: two bidirectional LSTM layers and a linear one."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, 32)

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        y, state = self.lstm(x, state)
        return self.linear(y), state


class Whole(nn.Module):
    """The same as a user has it for training: frames in, scores out."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x)[0]


SIZES = {"A": (80, 128), "B": (512, 256)}


def make(name: str) -> Stack:
    """A: LSTM 80→128; B: LSTM 512→256; weights drawn with a fixed seed."""
    torch.manual_seed(0)
    return Stack(*SIZES[name]).eval()


def export_all(folder: Path) -> None:
    """The models folders `A` and `B` under `folder`, with one bundle each, unless they are there."""
    for name, (features, _) in SIZES.items():
        if not (folder / name / name).exists():
            cx.export(Whole(make(name)).eval(), torch.randn(3, FRAMES, features), name=name, out=folder / name)
