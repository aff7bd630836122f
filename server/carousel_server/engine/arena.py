"""The arena: one contiguous array for each state tensor, a row for each resident session."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carousel_server.engine.spec import Array, State
from carousel_server.errors import TooManySessionsError

START_ROW = 0


class Arena:
    """`rows` state rows, and the row that every sequence starts from. Rows never used take no memory."""

    def __init__(self, states: Sequence[State], rows: int) -> None:
        self._unused = rows
        self._free: list[int] = []
        self._next = START_ROW + 1
        self._allocate(states, rows)

    def _allocate(self, states: Sequence[State], rows: int) -> None:
        self._arrays = [np.zeros((rows + 1, *state.row), state.dtype) for state in states]
        for array, state in zip(self._arrays, states, strict=True):
            array[START_ROW] = 0 if state.initial is None else state.initial

    def buckets(self, most: int) -> Sequence[int]:  # noqa: ARG002 -- one that has some needs it
        """The batches up to `most` rows that a run should have been tried with before it counts: here, none."""
        return ()

    def take(self) -> int:
        """A row of one's own, as every sequence starts. Raises `TooManySessionsError` where none is left."""
        if self._free:
            slot = self._free.pop()
        elif self._next == self._unused + 1:
            raise TooManySessionsError(
                f"all {self._unused} sessions are in use; close some, or try later", retry_after_s=1.0
            )
        else:
            slot = self._next
            self._next += 1
        self._reset(slot)
        return slot

    def _reset(self, slot: int) -> None:
        for array in self._arrays:
            array[slot] = array[START_ROW]

    def give_back(self, slot: int) -> None:
        assert slot != START_ROW
        self._free.append(slot)

    def gather(self, slots: NDArray[np.intp]) -> list[Any]:
        """Copies of the rows, `[batch, layers × directions, size]` for each state, as the runtime takes them."""
        return [array[slots] for array in self._arrays]

    def scatter(self, slots: NDArray[np.intp], rows: Sequence[Any]) -> None:
        """Write rows back as the runtime gave them; those of the row to start from are dropped."""
        if not slots.all():
            rows = [row[slots != START_ROW] for row in rows]
            slots = slots[slots != START_ROW]
        for array, row in zip(self._arrays, rows, strict=True):
            array[slots] = row

    def read(self, slot: int) -> list[Array]:
        return [array[slot].copy() for array in self._arrays]

    def write(self, slot: int, rows: Sequence[Array]) -> None:
        assert slot != START_ROW
        for array, row in zip(self._arrays, rows, strict=True):
            array[slot] = row
