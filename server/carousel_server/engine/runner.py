"""The runner: a step's rows into one batch, through the runtime, and apart again. It publishes nothing."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carousel_server.engine.arena import Arena
from carousel_server.engine.frames import Piece
from carousel_server.engine.runtime import Runtime
from carousel_server.engine.spec import Array, ModelSpec, Port
from carousel_server.engine.step import Block, Step

AHEAD = "_ahead"


class Batch(NamedTuple):
    """What a step is run on. `slots` has the arena row of each block."""

    graph: str
    slots: NDArray[np.intp]
    feeds: dict[str, Array]


class Outcome(NamedTuple):
    """What a step gave, a row for each block, in the step's order."""

    slots: NDArray[np.intp]
    # `[batch, layers × directions, size]` of each state.
    states: list[Array]
    # `[batch, time, …]` or `[batch, …]`, with the padding, of each of `ports`.
    outputs: list[Array]
    ports: Sequence[Port]

    def rows(self, blocks: Sequence[Block]) -> list[tuple[bytes, ...]]:
        """The bytes of each block's outputs, `[frames, …]` or `[…]`, padding cut off."""
        return list(zip(*map(self._split, self.ports, self.outputs, (blocks,) * len(self.ports)), strict=True))

    @staticmethod
    def _split(port: Port, array: Array, blocks: Sequence[Block]) -> list[bytes]:
        row = array.nbytes // len(array)
        frame = row // array.shape[1] if port.per_frame else 0
        data = array.tobytes()
        return [
            data[start : start + (block.frames * frame or row)]
            for start, block in zip(range(0, len(data), row), blocks, strict=True)
        ]


class Runner:
    """Runs steps of one model. `gather` belongs to the thread that commits; `run` may be called on any."""

    def __init__(self, spec: ModelSpec, runtimes: Mapping[str, Runtime], arena: Arena) -> None:
        self._spec = spec
        self._runtimes = runtimes
        self._arena = arena

    def gather(self, step: Step) -> Batch:
        """The step's inputs, lengths, contexts and states as the graph takes them: copies, padded with zeros."""
        blocks = step.blocks
        slots = np.array([block.owner.slot for block in blocks], np.intp)
        feeds = self._inputs("", [block.frames for block in blocks], [block.pieces for block in blocks])
        if self._spec.lengths + AHEAD in self._runtimes[step.graph].inputs:
            feeds |= self._inputs(AHEAD, [block.ahead for block in blocks], [block.ahead_pieces for block in blocks])
        for position, port in enumerate(self._spec.contexts):
            feeds[port.name] = np.stack([block.owner.context.arrays[position] for block in blocks])
        for state, rows in zip(self._spec.states, self._arena.gather(slots), strict=True):
            feeds[state.input] = rows
        return Batch(step.graph, slots, feeds)

    def run(self, batch: Batch) -> Outcome:
        """One model call. Raises `RunError`; nothing has changed, either way."""
        runtime = self._runtimes[batch.graph]
        results = dict(zip(runtime.outputs, runtime.run(batch.feeds), strict=True))
        return Outcome(
            batch.slots,
            [results[state.output] for state in self._spec.states],
            [results[port.name] for port in self._spec.outputs],
            self._spec.outputs,
        )

    def _inputs(self, suffix: str, lengths: list[int], rows: list[list[Piece]]) -> dict[str, Array]:
        feeds: dict[str, Array] = {self._spec.lengths + suffix: np.array(lengths, np.int32)}
        longest = max(lengths)
        even = all(len(pieces) == 1 for pieces in rows) and min(lengths) == longest
        for position, port in enumerate(self._spec.inputs):
            if even:
                frames = [arrays[position][start:stop] for ((arrays, start, stop),) in rows]
                feeds[port.name + suffix] = np.concatenate(frames).reshape(len(rows), longest, *port.item)
                continue
            batch = np.zeros((len(rows), longest, *port.item), port.dtype)
            for row, pieces in zip(batch, rows, strict=True):
                filled = 0
                for arrays, start, stop in pieces:
                    row[filled : filled + stop - start] = arrays[position][start:stop]
                    filled += stop - start
            feeds[port.name + suffix] = batch
        return feeds
