"""What eager PyTorch answers under each policy: the model as it is, one sequence at a time, no graph code.

Causal and carry feed and fetch the states of the untouched recurrent modules, piece by piece. Full is one plain run.
Lookahead runs each layer as modules of one direction over a block and the frames ahead of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from carousel_export.eager import Eager, run_layer
from carousel_export.errors import ExampleError
from carousel_export.padding import Padding, PadTime
from carousel_export.policies import Full, Lookahead, Piece, Policy
from carousel_export.recurrent import Layer, States, directions_of, sides_of, weights_of
from carousel_export.signature import BATCH, Port, Signature


@dataclass(frozen=True)
class Stream:
    """One stream of frames: a tensor `[time, …]` for each input, the state it starts from, and the client's cuts.

    `initial` has a tensor `[layers × directions, size]` for each state, in the signature's order; None: as
    the model starts. `contexts` has a tensor `[…]` for each context.
    """

    inputs: tuple[Tensor, ...]
    initial: tuple[Tensor, ...] | None = None
    cuts: tuple[int, ...] = ()
    contexts: tuple[Tensor, ...] = ()

    @property
    def frames(self) -> int:
        """The stream's length."""
        return self.inputs[0].shape[0]


@dataclass(frozen=True)
class Answer:
    """What a stream is answered: for each output `[time, …]` (or its final value), and each final state."""

    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]


class Source(Protocol):
    """What an exported graph is held to: it answers streams, one at a time."""

    signature: Signature

    @property
    def name(self) -> str:
        """In words, as "eager PyTorch"."""

    def run(self, sequence: Stream, policy: Policy) -> Answer:
        """The stream's answer under a policy."""


class Reference:
    """Eager PyTorch under a policy, for sequences one at a time."""

    name = "eager PyTorch"

    def __init__(self, eager: Eager, signature: Signature, *, rolled: bool = False) -> None:
        """`rolled`: where the model had loops over cells, ask the layers that they became, and not the loops."""
        self.eager = eager
        self.signature = signature
        self._written = None if rolled else eager.written
        self._single: dict[tuple[Layer, int, int], Layer] = {}

    def run(self, sequence: Stream, policy: Policy) -> Answer:
        """The stream's answer under a policy, cut as the policy cuts it."""
        if self.signature.stepwise:
            return self.run_pieces(sequence, [Piece(i, 1) for i in range(sequence.frames)])
        pieces = policy.pieces(sequence.frames, sequence.cuts)
        return self.run_pieces(
            sequence, pieces, lookahead=isinstance(policy, Lookahead), plain=isinstance(policy, Full)
        )

    def run_pieces(
        self,
        sequence: Stream,
        pieces: Sequence[Piece],
        *,
        lookahead: bool = False,
        plain: bool = False,
        framewise: bool = False,
    ) -> Answer:
        """The stream's answer over given pieces.

        `plain`: recurrent calls start where the model has them start; `framewise`: each frame is a sequence to them, so
        that all that mixes time is other code.
        """
        start = self._memory(self.signature.start)
        memory = self._memory(sequence.initial or self.signature.start)
        parts: list[list[Tensor]] = []
        for piece in pieces:
            end = piece.start + piece.block + piece.ahead
            pairs = zip(self.signature.inputs, sequence.inputs, strict=True)
            given = {port.name: port.give(x[piece.start : end]) for port, x in pairs}
            pairs = zip(self.signature.contexts, sequence.contexts, strict=True)
            given |= {port.name: port.give(x) for port, x in pairs}

            def pad(padding: Padding, x: Tensor, piece: Piece = piece) -> Tensor | None:
                frames = x.movedim(self._time_axis(padding), 0)
                zeros = [frames.new_zeros(side, *frames.shape[1:]) for side in (padding.left, padding.right)]
                if padding.call in memory:
                    zeros[0] = memory[padding.call][0].reshape(zeros[0].shape)
                    ended = torch.cat([zeros[0], frames[: piece.block]])[-padding.left :]
                    memory[padding.call] = (ended.reshape(padding.left, 1, padding.size),)
                return None if plain else torch.cat([zeros[0], frames, zeros[1]]).movedim(0, self._time_axis(padding))

            def answer(
                call: str, module: Layer, x: Tensor, hx: States | None, piece: Piece = piece
            ) -> tuple[Tensor, States]:
                unbatched = x.dim() == 2
                if framewise:
                    return self._framewise(module, x)
                if call not in memory:
                    return run_layer(module, x, hx)
                if lookahead:
                    y, memory[call] = self._lookahead(module, x, memory[call], piece.block, start[call])
                    return y, tuple(s.squeeze(1) if unbatched else s for s in memory[call])
                states = tuple(s.squeeze(1) if unbatched else s for s in memory[call])
                y, ended = run_layer(module, x, hx if plain else states)
                memory[call] = tuple(s.unsqueeze(1) if unbatched else s for s in ended)
                return y, ended

            inputs = self.signature.arrange(given)
            with PadTime(self.signature.paddings, pad, self._time_axis):
                if self._written is None:
                    states = dict(memory) if self.signature.stepwise else None
                    outputs = self.eager.run(inputs, answer, states=states)
                else:
                    block = piece.block if lookahead else None
                    outputs = self._written.run(inputs, answer, memory, block, plain=plain)
            parts.append([self._cut(port, y, piece) for port, y in zip(self.signature.outputs, outputs, strict=True)])
        joined = tuple(
            torch.cat(column) if port.timed else column[-1]
            for port, column in zip(self.signature.outputs, zip(*parts, strict=True), strict=True)
        )
        ended = {call: iter(states) for call, states in memory.items()}
        return Answer(joined, tuple(next(ended[state.call]).squeeze(1) for state in self.signature.states))

    def _memory(self, rows: Sequence[Tensor]) -> dict[str, States]:
        """By call, its states `[layers × directions, 1, size]`."""
        memory: dict[str, States] = {}
        for state, tensor in zip(self.signature.states, rows, strict=True):
            memory[state.call] = (*memory.get(state.call, ()), tensor.unsqueeze(1))
        return memory

    def _cut(self, port: Port, y: Tensor, piece: Piece) -> Tensor:
        if y.dim() != len(port.eager_dims):
            raise ExampleError(
                f"output {port.name!r} is {list(y.shape)} for one sequence of {piece.block + piece.ahead} frames, "
                f"where the example gave {len(port.eager_dims)} axes; name the axis that squeeze is to remove"
            )
        taken = port.take(y)
        return taken[: piece.block] if port.timed else taken

    def _lookahead(self, module: Layer, x: Tensor, states: States, block: int, start: States) -> tuple[Tensor, States]:
        """A layer stack by the blueprint's words; the state it gives on has `start` for the backward directions."""
        batched = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if module.batch_first else x
        sides = sides_of(module)
        ended = tuple(state.clone() for state in start)
        for layer in range(module.num_layers):
            ys = []
            for place, side in enumerate(sides):
                single = self._direction(module, layer, place)
                row = layer * len(sides) + place
                if side == "reverse":
                    # Backward from its start over the frames ahead, then the block: one run over them all, reversed.
                    before = tuple(s[row : row + 1].contiguous() for s in start)
                    ys.append(run_layer(single, batched.flip(0), before)[0].flip(0))
                    continue
                y, after = run_layer(single, batched[:block], tuple(s[row : row + 1].contiguous() for s in states))
                for state, value in zip(ended, after, strict=True):
                    state[row] = value[0]
                if len(batched) > block:
                    y = torch.cat([y, run_layer(single, batched[block:], after)[0]])
                ys.append(y)
            batched = torch.cat(ys, dim=2)
        y = batched.squeeze(1) if x.dim() == 2 else batched.transpose(0, 1) if module.batch_first else batched
        return y, ended

    def _framewise(self, module: Layer, x: Tensor) -> tuple[Tensor, States]:
        """Each frame of the one sequence as a sequence of its own: time takes the place of the batch."""
        unbatched = x.dim() == 2
        turned = x.unsqueeze(1 if module.batch_first else 0) if unbatched else x.transpose(0, 1)
        y, ended = run_layer(module, turned, None)
        last = tuple(state[:, -1] if unbatched else state[:, -1:] for state in ended)
        return (y.squeeze(1 if module.batch_first else 0) if unbatched else y.transpose(0, 1)), last

    def _time_axis(self, padding: Padding) -> int:
        batched = all(BATCH in port.eager_dims for port in self.signature.inputs)
        return padding.time if batched else padding.alone

    def _direction(self, module: Layer, layer: int, direction: int) -> Layer:
        """An eager module of one layer and one direction with the module's weights."""
        key = (module, layer, direction)
        if key not in self._single:
            size = module.input_size if layer == 0 else (module.proj_size or module.hidden_size) * directions_of(module)
            single: Layer
            if isinstance(module, nn.LSTM):
                single = nn.LSTM(size, module.hidden_size, bias=module.bias, proj_size=module.proj_size)
            elif isinstance(module, nn.GRU):
                single = nn.GRU(size, module.hidden_size, bias=module.bias)
            else:
                single = nn.RNN(size, module.hidden_size, bias=module.bias, nonlinearity=module.nonlinearity)
            with torch.no_grad():
                for mine, its in zip(weights_of(single, 0, 0), weights_of(module, layer, direction), strict=True):
                    mine.copy_(its)
            self._single[key] = single.eval().requires_grad_(False)
        return self._single[key]
