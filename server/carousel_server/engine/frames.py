"""Frames of a session that wait: chunks as they came, viewed and not copied until a step gathers them."""

from collections.abc import Iterator

from carousel_server.engine.budget import Budget
from carousel_server.engine.spec import Array

# One array for each model input, and the frames [start, stop) of them.
Piece = tuple[tuple[Array, ...], int, int]


class Frames:
    """A queue of frames, one array for each model input `[frames, …]` in every chunk.

    Each counts for `frame_bytes` of the budget: itself and its answer.
    """

    __slots__ = ("_chunks", "_count", "_frame_bytes", "_skip", "budget")

    def __init__(self, budget: Budget, frame_bytes: int) -> None:
        self.budget = budget
        self._frame_bytes = frame_bytes
        self._chunks: list[tuple[tuple[Array, ...], int]] = []
        self._skip = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, arrays: tuple[Array, ...], frames: int) -> None:
        if frames:
            self._chunks.append((arrays, frames))
            self._grow(frames)

    def measure(self, frames: int) -> int:
        """Bytes that it would have with so many frames more."""
        return (self._count + frames) * self._frame_bytes

    def _grow(self, frames: int) -> None:
        self._count += frames
        self.budget.held += frames * self._frame_bytes

    def pieces(self, start: int, count: int) -> list[Piece]:
        """Where the frames [start, start + count) lie."""
        if start == 0 and self._chunks and count <= self._chunks[0][1] - self._skip:
            return [(self._chunks[0][0], self._skip, self._skip + count)] if count else []
        return list(self._pieces(start + self._skip, count))

    def _pieces(self, start: int, count: int) -> Iterator[Piece]:
        for arrays, frames in self._chunks:
            if count <= 0:
                return
            if start < frames:
                stop = min(frames, start + count)
                yield arrays, start, stop
                count -= stop - start
                start = 0
            else:
                start -= frames

    def clear(self) -> None:
        self._chunks.clear()
        self._skip = 0
        self._grow(-self._count)

    def drop_first(self, count: int) -> None:
        self._grow(-count)
        self._skip += count
        done = 0
        while done < len(self._chunks) and self._skip >= self._chunks[done][1]:
            self._skip -= self._chunks[done][1]
            done += 1
        del self._chunks[:done]

    def drop_last(self, count: int) -> None:
        """Forget the newest frames; chunks are forgotten whole."""
        while count > 0:
            _, frames = self._chunks.pop()
            count -= frames
            self._grow(-frames)
        assert count == 0, "only whole chunks are taken back"
