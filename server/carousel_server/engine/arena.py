"""The arena: one contiguous array for each state tensor, a row for each resident session."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carousel_server.engine.spec import Array, State
from carousel_server.errors import TooManySessionsError

ZERO_ROW = 0


class Arena:
    """`rows` state rows and the row of zeros. Rows that were never used take address space and no memory."""

    def __init__(self, states: Sequence[State], rows: int) -> None:
        self._arrays = [np.zeros((rows + 1, *state.row), state.dtype) for state in states]
        self._unused = rows
        self._free: list[int] = []
        self._next = ZERO_ROW + 1

    def take(self) -> int:
        """A row of zeros of one's own. Raises `TooManySessionsError` where none is left."""
        if self._free:
            slot = self._free.pop()
            for array in self._arrays:
                array[slot] = 0
            return slot
        if self._next == self._unused + 1:
            raise TooManySessionsError(
                f"all {self._unused} sessions are in use; close some, or try later", retry_after_s=1.0
            )
        self._next += 1
        return self._next - 1

    def give_back(self, slot: int) -> None:
        assert slot != ZERO_ROW
        self._free.append(slot)

    def gather(self, slots: NDArray[np.intp]) -> list[Array]:
        """Copies of the rows, `[batch, layers × directions, size]` for each state."""
        return [array[slots] for array in self._arrays]

    def scatter(self, slots: NDArray[np.intp], rows: Sequence[Array]) -> None:
        """Write rows back; those of the row of zeros are dropped."""
        if not slots.all():
            rows = [row[slots != ZERO_ROW] for row in rows]
            slots = slots[slots != ZERO_ROW]
        for array, row in zip(self._arrays, rows, strict=True):
            array[slots] = row

    def read(self, slot: int) -> list[Array]:
        return [array[slot].copy() for array in self._arrays]

    def write(self, slot: int, rows: Sequence[Array]) -> None:
        assert slot != ZERO_ROW
        for array, row in zip(self._arrays, rows, strict=True):
            array[slot] = row
