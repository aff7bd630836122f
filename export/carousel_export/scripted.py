"""A step in TorchScript, repeated over time: a trace has no loops, so that the loop around it is scripted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carousel_export.signature import Signature
from carousel_export.step import frame_of


def repeated(step: nn.Module, signature: Signature, example: Sequence[Tensor]) -> nn.Module:
    """A step over time by the graph contract, for a trace; `example` are the contract's inputs.

    `step` takes the inputs of one frame `[batch, …]`, contexts and states, and returns outputs and states.
    """
    count = len(signature.inputs)
    tensors = frame_of(example, signature)
    traced = torch.jit.trace(  # type: ignore[no-untyped-call]
        _Listed(step, len(signature.outputs)).eval(),
        (tensors[:count], tensors[count:]),
        check_trace=False,
        strict=False,
    )
    return _Contract(torch.jit.script(_Loop(traced).eval()), signature).eval()


class _Listed(nn.Module):
    """A step with lists for its tensors, whatever their number."""

    def __init__(self, step: nn.Module, outputs: int) -> None:
        super().__init__()
        self.step = step
        self.outputs = outputs

    def forward(self, frames: list[Tensor], rest: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        results = self.step(*frames, *rest)
        return list(results[: self.outputs]), list(results[self.outputs :])


class _Loop(nn.Module):
    """The loop over time; a row's states stop at its length."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(
        self, inputs: list[Tensor], lengths: Tensor, contexts: list[Tensor], states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        frames: list[list[Tensor]] = []
        for i in range(inputs[0].size(1)):
            outputs, after = self.step([x[:, i] for x in inputs], contexts + states)
            frames.append(outputs)
            running = lengths > i
            states = [
                torch.where(running.reshape([-1] + [1] * (new.dim() - 1)), new, old)
                for new, old in zip(after, states)  # noqa: B905 - TorchScript's
            ]
        return [torch.stack([outputs[k] for outputs in frames], 1) for k in range(len(frames[0]))], states


class _Contract(nn.Module):
    """The loop with the contract's inputs and outputs."""

    def __init__(self, loop: Any, signature: Signature) -> None:
        super().__init__()
        self.loop = loop
        self._counts = len(signature.inputs), len(signature.contexts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, contexts = self._counts
        given = list(tensors)
        after = inputs + 1 + contexts
        outputs, states = self.loop(given[:inputs], given[inputs], given[inputs + 1 : after], given[after:])
        return (*outputs, *states)
