"""Infer: whole sequences, stateless. Each row takes its place in the scheduler beside the sessions' blocks."""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carousel_server.config import Limits
from carousel_server.engine.arena import START_ROW
from carousel_server.engine.budget import Budget
from carousel_server.engine.context import Context, read_contexts
from carousel_server.engine.frames import Piece
from carousel_server.engine.spec import Array, ModelSpec, Port, frame_bytes
from carousel_server.engine.steps import Steps
from carousel_server.errors import CarouselError, QueueFullError, TensorError, TooLargeError, TooShortError


class InferRow:
    """One row: a sequence that is run at once from its start."""

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
        self.slot = START_ROW
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


class Infer:
    """Whole-sequence requests to one model."""

    def __init__(self, spec: ModelSpec, steps: Steps, limits: Limits, budget: Budget) -> None:
        self._budget = budget
        self._spec = spec
        self._steps = steps
        self._limits = limits
        # Rows that wait for their answer.
        self.waiting = 0

    async def run(self, tensors: dict[str, Array], lengths: NDArray[np.int32] | None, graph: str) -> dict[str, Array]:
        """Outputs `[batch, time, …]` for inputs `[batch, time, …]`, each row run from zero over its length.

        `tensors` has the contexts, `[batch, …]`, beside the inputs. Raises `TensorError`, `TooShortError`,
        `TooLargeError`, `QueueFullError`, `InputRejectedError`, `StepError`.
        """
        where = "the request"
        self._spec.check_names(tensors, where, (*self._spec.inputs, *self._spec.contexts))
        for port in self._spec.inputs:
            port.check(tensors[port.name], where, ("batch", "time"))
        shapes = {tensors[port.name].shape[:2] for port in self._spec.inputs}
        if len(shapes) > 1:
            raise TensorError(f"the tensors differ in batch and time: {sorted(shapes)}; send the same for each")
        batch, time = shapes.pop()
        contexts, outputs = read_contexts(
            self._spec, {port.name: tensors[port.name] for port in self._spec.contexts}, batch
        )
        lengths = np.full(batch, time, np.int32) if lengths is None else lengths
        if batch < 1 or len(lengths) != batch or lengths.min() < 1 or lengths.max() > time:
            raise TensorError(f"wanted one length from 1 to {time} for each of the {batch} rows, and at least one row")
        if lengths.min() < self._spec.least_frames:
            raise TooShortError(
                f"row {int(lengths.argmin())} has {lengths.min()} frames, and the model needs at least "
                f"{self._spec.least_frames}; send longer sequences",
                least_frames=self._spec.least_frames,
            )
        if time > self._limits.max_chunk_frames:
            raise TooLargeError(
                f"{time} frames are more than the {self._limits.max_chunk_frames} allowed; use a session"
            )
        size = batch * time * frame_bytes((*self._spec.inputs, *outputs))
        self._check_room(batch, size)
        loop = asyncio.get_running_loop()
        done: list[asyncio.Future[tuple[bytes, ...]]] = [loop.create_future() for _ in range(batch)]
        self.waiting += batch
        self._budget.held += size
        try:
            for position, future in enumerate(done):
                row = tuple(tensors[port.name][position] for port in self._spec.inputs)
                self._steps.add(InferRow(graph, row, contexts[position], int(lengths[position]), future))
            answers = await asyncio.gather(*done, return_exceptions=True)
        finally:
            self.waiting -= batch
            self._budget.held -= size
            for future in done:
                future.cancel()
        rows = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            rows.append(answer)
        return stack(outputs, lengths, time, rows)

    def _check_room(self, rows: int, size: int) -> None:
        if self.waiting + rows > self._limits.max_pending_rows:
            raise QueueFullError(f"{self.waiting} rows are waiting; try again", retry_after_s=0.1)
        if size > self._budget.most:
            raise TooLargeError(
                f"the request and its answer have {size} bytes and {self._budget.most} are allowed; send fewer rows"
            )
        if size > self._budget.share:
            raise QueueFullError("too many bytes of requests and chunks are waiting; try again", retry_after_s=0.1)


def stack(
    outputs: Sequence[Port], lengths: NDArray[np.int32], time: int, rows: list[tuple[bytes, ...]]
) -> dict[str, Array]:
    """The rows' outputs as `[batch, time, …]`, zero after each row's length, or `[batch, …]`."""
    stacked = {}
    for position, port in enumerate(outputs):
        batch = np.zeros((len(rows), *port.shape(time)), port.dtype)
        for number, (length, row) in enumerate(zip(lengths, rows, strict=True)):
            values = np.frombuffer(row[position], port.dtype).reshape(port.shape(int(length)))
            if port.per_frame or port.extent:
                batch[number, : len(values)] = values
            else:
                batch[number] = values
        stacked[port.name] = batch
    return stacked
