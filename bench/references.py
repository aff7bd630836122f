"""Eager PyTorch's answers, computed apart from all that is measured."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from bench.models import Stack, make
from bench.sizes import SIZES
from bench.workload import Workload
from torch import Tensor, nn

# Of each session so many answers are compared.
_CHECKED = 8
_TOLERANCE = 1e-5

Answers = Callable[[Stack, Sequence[Tensor]], list[Tensor]]


def carry(stack: Stack, chunks: Sequence[Tensor]) -> list[Tensor]:
    """Chunk by chunk, each with the state that the last one returned; causal where no direction runs backwards."""
    state, answers = None, []
    for chunk in chunks:
        y, state = stack(chunk[None], state)
        answers.append(y[0])
    return answers


def lookahead(stack: Stack, chunks: Sequence[Tensor]) -> list[Tensor]:
    """Chunks of 8 frames under lookahead(8, 8): each answers the block before it (Zhang et al. 2016)."""
    layers = [(_direction(stack.lstm, n, ""), _direction(stack.lstm, n, "_reverse")) for n in range(2)]
    states: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
    answers = [torch.zeros(0, stack.linear.out_features)]
    for block, ahead in pairwise(chunks):
        x = torch.cat([block, ahead])[None]
        for n, (forward, backward) in enumerate(layers):
            ys, states[n] = forward(x[:, : len(block)], states[n])
            beyond, _ = forward(x[:, len(block) :], states[n])
            back, _ = backward(x.flip(1))
            x = torch.cat([torch.cat([ys, beyond], 1), back.flip(1)], 2)
        answers.append(stack.linear(x[0, : len(block)]))
    return answers


def _direction(lstm: nn.LSTM, layer: int, suffix: str) -> nn.LSTM:
    """One direction of one layer, as a layer of its own."""
    weights = {
        f"{name}_l0": getattr(lstm, f"{name}_l{layer}{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    one = nn.LSTM(weights["weight_ih_l0"].shape[1], lstm.hidden_size, batch_first=True)
    one.load_state_dict(weights)
    return one


def write(
    folder: Path,
    model: str,
    lengths: Sequence[int],
    answers: Answers = carry,
    tolerance: float = _TOLERANCE,
) -> Path:
    """A workload file: a ring with a chunk of each of `lengths` frames, and what eager PyTorch answers."""
    rng = np.random.default_rng(0)
    chunks = [rng.standard_normal((length, SIZES[model][0])).astype(np.float32) for length in lengths]
    stack, ring = make(model), [torch.from_numpy(chunk) for chunk in chunks] * 2
    with torch.inference_mode():
        wanted = [
            [answer.numpy() for answer in answers(stack, (ring * 2)[offset : offset + _CHECKED])]
            for offset in range(len(chunks))
        ]
    name = f"{model}-{answers.__name__}-{min(lengths)}-{max(lengths)}-{tolerance:g}.npz"
    return Workload(chunks, wanted, tolerance).save(folder / name)
