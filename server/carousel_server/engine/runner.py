"""The runner: a step's rows into one batch, through onnxruntime, and apart again. It publishes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carousel_server.engine.arena import Arena
from carousel_server.engine.frames import Piece
from carousel_server.engine.runtime import Runtime
from carousel_server.engine.spec import Array, ModelSpec
from carousel_server.engine.step import Step

AHEAD = "_ahead"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave, an entry for each block, in the step's order."""

    slots: NDArray[np.intp]
    # The bytes of each output, `[frames, …]` or `[…]`, padding cut off.
    outputs: list[tuple[bytes, ...]]
    # Rows of each state.
    states: list[Array]


class Runner:
    """Runs steps of one model. Not thread-safe: one step at a time."""

    def __init__(self, spec: ModelSpec, runtimes: Mapping[str, Runtime], arena: Arena) -> None:
        self._spec = spec
        self._runtimes = runtimes
        self._arena = arena

    def run(self, step: Step) -> Outcome:
        """One model call. Raises `RunError`; then nothing has changed."""
        runtime = self._runtimes[step.graph]
        blocks = step.blocks
        slots = np.fromiter((block.owner.slot for block in blocks), np.intp, len(blocks))
        feeds = self._inputs("", [block.frames for block in blocks], [block.pieces for block in blocks])
        if self._spec.lengths + AHEAD in runtime.inputs:
            feeds |= self._inputs(AHEAD, [block.ahead for block in blocks], [block.ahead_pieces for block in blocks])
        for position, port in enumerate(self._spec.contexts):
            feeds[port.name] = np.stack([block.owner.context.arrays[position] for block in blocks])
        states = self._arena.gather(slots)
        feeds |= {state.input: rows for state, rows in zip(self._spec.states, states, strict=True)}
        results = dict(zip(runtime.outputs, runtime.run(feeds), strict=True))
        outputs = [results[port.name] for port in self._spec.outputs]
        return Outcome(
            slots,
            [self._split(outputs, position, block.frames) for position, block in enumerate(blocks)],
            [results[state.output] for state in self._spec.states],
        )

    def _inputs(self, suffix: str, lengths: list[int], rows: list[list[Piece]]) -> dict[str, Array]:
        feeds: dict[str, Array] = {self._spec.lengths + suffix: np.array(lengths, np.int32)}
        longest = max(lengths)
        for position, port in enumerate(self._spec.inputs):
            batch = np.zeros((len(rows), longest, *port.item), port.dtype)
            for row, pieces in zip(batch, rows, strict=True):
                filled = 0
                for arrays, start, stop in pieces:
                    row[filled : filled + stop - start] = arrays[position][start:stop]
                    filled += stop - start
            feeds[port.name + suffix] = batch
        return feeds

    def _split(self, outputs: list[Array], position: int, frames: int) -> tuple[bytes, ...]:
        return tuple(
            (array[position, :frames] if port.per_frame else array[position]).tobytes()
            for port, array in zip(self._spec.outputs, outputs, strict=True)
        )
