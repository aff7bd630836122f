"""The models of the benchmark, and their bundles."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.sizes import FRAMES, SIZES
from torch import nn

import carousel_export as cx
from carousel_protos.bundle import Bundle

States = tuple[torch.Tensor, torch.Tensor]


class Stack(nn.Module):
    """`[batch, time, features]` → `[batch, time, 32]`: two LSTM layers and a linear one."""

    def __init__(self, features: int, hidden: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.linear = nn.Linear(hidden * (2 if bidirectional else 1), 32)

    def forward(self, x: torch.Tensor, state: States | None = None) -> tuple[torch.Tensor, States]:
        y, state = self.lstm(x, state)
        return self.linear(y), state


class Whole(nn.Module):
    """The same as a user has it for training: frames in, scores out."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.stack(x)[0]
        return scores


@dataclass(frozen=True)
class Exported:
    """Where a model's bundle is, and what of its manifest the benchmark needs."""

    folder: Path
    name: str
    state_bytes: int
    int8_tolerance: float

    @property
    def graph(self) -> Path:
        return self.folder / self.name / "1" / "model.onnx"


def make(name: str) -> Stack:
    """Weights are drawn with a fixed seed."""
    torch.manual_seed(0)
    return Stack(*SIZES[name], bidirectional=name != "U").eval()


def export_all(folder: Path) -> dict[str, Exported]:
    """The models folders `A`, `B` and `U` under `folder`, with one bundle each, made anew by this exporter."""
    return {name: _export(folder / name, name) for name in SIZES}


def _export(folder: Path, name: str) -> Exported:
    shutil.rmtree(folder / name, ignore_errors=True)
    model = Whole(make(name)).eval()
    variants = ("int8",) if name == "B" else ()
    cx.export(model, torch.randn(3, FRAMES, SIZES[name][0]), name=name, out=folder, variants=variants)
    manifest = Bundle.open(folder / name / "1", check=False).manifest
    int8 = [graph.tolerance.absolute for graph in manifest.graphs if graph.variant == "int8"]
    return Exported(folder, name, sum(layer.state_bytes for layer in manifest.layers), max(int8, default=0.0))
