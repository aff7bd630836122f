"""Recurrent layers that know the lengths of a batch's rows: each row is run alone, and zeros stand after its end."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from carousel_export.eager import Handler, run_layer
from carousel_export.recurrent import Layer, States


def rows_alone(lengths: Sequence[int], within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Handler:
    """The handler that does so; the layers run within a context."""

    def answer(_call: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        batch, time = (0, 1) if module.batch_first else (1, 0)
        answers = []
        with within():
            for row, length in enumerate(lengths):
                start = hx and tuple(state.narrow(1, row, 1).contiguous() for state in hx)
                y, states = run_layer(module, x.narrow(batch, row, 1).narrow(time, 0, length), start)
                gap = list(y.shape)
                gap[time] = x.shape[time] - length
                answers.append((torch.cat([y, y.new_zeros(gap)], time), states))
            return torch.cat([y for y, _ in answers], batch), tuple(
                torch.cat(column, 1) for column in zip(*(states for _, states in answers), strict=True)
            )

    return answer
