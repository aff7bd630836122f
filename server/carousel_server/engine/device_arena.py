"""The arena on a device: state rows stay there, gathered and written by slot without a way through the host.

Each state is one buffer. A step's rows are gathered into buffers of their own, the model's graph writes the rows that
follow into others, and only a step that has succeeded is scattered back. That one-node graph is bound in place, for
otherwise every step would copy the whole arena; no graph is captured here, under which that would be wrong
(onnxruntime #32243), and the model's own graph never has the arena bound.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from carousel_server.config import Device
from carousel_server.engine.arena import START_ROW, Arena
from carousel_server.engine.moves import gather, scatter
from carousel_server.engine.onnx_runtime import providers
from carousel_server.engine.spec import Array, State


def bucket(rows: int) -> int:
    """The size of batch that `rows` rows are run in: a device takes its time for each size it has not seen."""
    return 1 << (rows - 1).bit_length()


class DeviceArena(Arena):
    """`Arena` with its rows as onnxruntime values on `device`, in batches filled up to a power of two."""

    def __init__(self, states: Sequence[State], rows: int, device: Device) -> None:
        self._device = device
        # Rows that fill a batch up, and those of the row to start from, end here.
        self._waste = rows + 1
        super().__init__(states, rows)

    def _allocate(self, states: Sequence[State], rows: int) -> None:
        self._buffers: list[ort.OrtValue] = []
        for state in states:
            start = np.zeros((rows + 2, *state.row), state.dtype)
            start[START_ROW] = 0 if state.initial is None else state.initial
            self._buffers.append(ort.OrtValue.ortvalue_from_numpy(start, self._device, 0))
        options = ort.SessionOptions()
        options.enable_mem_pattern = False
        options.intra_op_num_threads = 1
        options.log_severity_level = 3

        @cache
        def load(make: Callable[[str, tuple[int, ...]], bytes], dtype: str, row: tuple[int, ...]) -> Any:
            # h and c are mostly alike: each session of a device has a stream and libraries' handles of its own.
            return ort.InferenceSession(make(dtype, row), options, providers=providers(self._device))

        self._gathers = [load(gather, state.dtype.name, state.row) for state in states]
        self._scatters = [load(scatter, state.dtype.name, state.row) for state in states]

    def buckets(self, most: int) -> Sequence[int]:
        """The sizes of batch there are, up to that for `most` rows."""
        return [1 << power for power in range(bucket(most).bit_length())]

    def _reset(self, slot: int) -> None:
        self._put(np.array([slot]), self._get(np.array([START_ROW])))

    def gather(self, slots: NDArray[np.intp]) -> list[Any]:
        """Copies of the rows on the device, filled up with the row to start from."""
        return self._get(_filled(slots, START_ROW))

    def scatter(self, slots: NDArray[np.intp], rows: Sequence[Any]) -> None:
        """Write rows on the device back; those of the row to start from, and what filled up, are dropped."""
        self._put(_filled(np.where(slots == START_ROW, self._waste, slots), self._waste), rows)

    def read(self, slot: int) -> list[Array]:
        return [value.numpy()[0] for value in self._get(np.array([slot]))]

    def write(self, slot: int, rows: Sequence[Array]) -> None:
        assert slot != START_ROW
        self._put(np.array([slot]), [ort.OrtValue.ortvalue_from_numpy(row[None], self._device, 0) for row in rows])

    def _get(self, slots: NDArray[np.intp]) -> list[ort.OrtValue]:
        taken = []
        for session, buffer in zip(self._gathers, self._buffers, strict=True):
            binding = session.io_binding()
            binding.bind_ortvalue_input("arena", buffer)
            binding.bind_cpu_input("slots", slots.astype(np.int64))
            binding.bind_output("taken", self._device, 0)
            session.run_with_iobinding(binding)
            taken.append(binding.get_outputs()[0])
        return taken

    def _put(self, slots: NDArray[np.intp], rows: Sequence[ort.OrtValue]) -> None:
        for session, buffer, given in zip(self._scatters, self._buffers, rows, strict=True):
            binding = session.io_binding()
            binding.bind_ortvalue_input("arena", buffer)
            binding.bind_cpu_input("slots", slots.astype(np.int64).reshape(-1, 1))
            binding.bind_ortvalue_input("given", given)
            binding.bind_ortvalue_output("changed", buffer)
            session.run_with_iobinding(binding)


def _filled(slots: NDArray[np.intp], filling: int) -> NDArray[np.intp]:
    return np.pad(slots, (0, bucket(len(slots)) - len(slots)), constant_values=filling)
