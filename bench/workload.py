"""What sessions send and what they must get back; NumPy alone, for the client loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Workload:
    """A ring of chunks `[frames, features]`, and eager PyTorch's answers.

    A session with offset o sends chunk (o + k) % len(chunks) as its k-th; `wanted[o][k]`, `[frames, outputs]`, is the
    answer to it, within `tolerance`, for the first few k.
    """

    chunks: list[Array]
    wanted: list[list[Array]]
    tolerance: float

    def save(self, path: Path) -> Path:
        answers = [answer for row in self.wanted for answer in row]
        np.savez(
            path,
            lengths=[len(chunk) for chunk in self.chunks],
            frames=np.concatenate(self.chunks),
            answer_lengths=[[len(answer) for answer in row] for row in self.wanted],
            answers=np.concatenate(answers),
            tolerance=self.tolerance,
        )
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        data = np.load(path)
        chunks = np.split(data["frames"], np.cumsum(data["lengths"])[:-1])
        lengths = data["answer_lengths"]
        answers = np.split(data["answers"], np.cumsum(lengths.ravel())[:-1])
        width = lengths.shape[1]
        wanted = [answers[row * width : (row + 1) * width] for row in range(len(lengths))]
        return cls(chunks, wanted, float(data["tolerance"]))
