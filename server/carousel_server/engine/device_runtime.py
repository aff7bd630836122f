"""onnxruntime on a device: inputs and outputs bound, so that states never leave it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carousel_server.config import Device
from carousel_server.engine.arena import Arena
from carousel_server.engine.device_arena import DeviceArena
from carousel_server.engine.onnx_runtime import OnnxRuntime, run_error
from carousel_server.engine.spec import Array, State


class DeviceRuntime(OnnxRuntime):
    """A graph whose outputs `states` stay on the device, and whose batch is that of the states it is given."""

    parallel = False

    def __init__(self, path: Path, *, device: Device, states: frozenset[str], variant: str) -> None:
        super().__init__(path, device=device, threads=1, variant=variant)
        self._device = device
        self._states = states

    def make_arena(self, states: Sequence[State], rows: int) -> Arena:
        """State rows on the device."""
        return DeviceArena(states, rows, self._device)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """The graph's outputs, in its order: states on the device, and of the others an array's rows for each given.

        Raises `RunError`.
        """
        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        rows = len(next(iter(arrays.values())))
        assert rows, "a step has at least one row"
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if name in arrays:
                continue
            batch = value.shape()[0]
            binding.bind_ortvalue_input(name, value)
        # The arrays have to outlive the run.
        filled = {name: _fill(array, batch) for name, array in arrays.items()}
        for name, array in filled.items():
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name, self._device if name in self._states else "cpu", 0)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise run_error(error) from error
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return [value if name in self._states else value.numpy()[:rows] for name, value in values]


def _fill(array: Array, batch: int) -> Array:
    """Rows up to `batch`, as the first one: its values are good ones, and its answer is dropped."""
    missing = batch - len(array)
    return np.concatenate([array, array[:1].repeat(missing, axis=0)]) if missing else np.ascontiguousarray(array)
