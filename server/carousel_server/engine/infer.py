"""Infer: whole sequences, stateless. Each row takes its place in the scheduler beside the sessions' blocks."""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carousel_server.engine.arena import ZERO_ROW
from carousel_server.engine.context import Context
from carousel_server.engine.frames import Piece
from carousel_server.engine.spec import Array, Port
from carousel_server.errors import CarouselError


class InferRow:
    """One row: a sequence that is run at once from a zero state."""

    def __init__(
        self,
        graph: str,
        inputs: tuple[Array, ...],
        context: Context,
        frames: int,
        done: asyncio.Future[tuple[bytes, ...]],
    ) -> None:
        self.graph = graph
        self.context = context
        self.slot = ZERO_ROW
        self.queued = False
        self.rollback: list[Array] | None = None
        self._inputs = inputs
        self._frames = frames
        self._done = done

    @property
    def closed(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._done.done()

    @property
    def due(self) -> bool:
        return not self.closed

    def next_block(self) -> tuple[int, int]:
        return self._frames, 0

    def pieces(self, start: int, count: int) -> list[Piece]:
        return [(self._inputs, start, start + count)] if count else []

    def completes(self, frames: int) -> bool:
        return frames == self._frames

    def commit(self, frames: int, outputs: tuple[bytes, ...]) -> None:  # noqa: ARG002 (one block is all of it)
        if not self.closed:
            self._done.set_result(outputs)

    def fail(self, error: CarouselError) -> None:
        if not self.closed:
            self._done.set_exception(error)


def stack(
    outputs: Sequence[Port], lengths: NDArray[np.int32], time: int, rows: list[tuple[bytes, ...]]
) -> dict[str, Array]:
    """The rows' outputs as `[batch, time, …]`, zero after each row's length, or `[batch, …]`."""
    stacked = {}
    for position, port in enumerate(outputs):
        batch = np.zeros((len(rows), *((time,) if port.per_frame else ()), *port.item), port.dtype)
        for into, length, row in zip(batch, lengths, rows, strict=True):
            values = np.frombuffer(row[position], port.dtype)
            if port.per_frame:
                into[:length] = values.reshape(length, *port.item)
            else:
                into[...] = values.reshape(port.item)
        stacked[port.name] = batch
    return stacked
