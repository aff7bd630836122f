"""The limit: onnxruntime called in process on full batches, no RPC. CPU microseconds per chunk, by batch size."""

import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench.models import FRAMES

BATCHES = (1, 8, 32, 64)


class Raw:
    """A graph with its inputs at each batch size, ready to be called."""

    def __init__(self, file: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(file, options)
        rng = np.random.default_rng(0)
        self._feeds = {batch: self._draw(batch, rng) for batch in BATCHES}

    def _draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        sizes = {"batch": batch, "time": FRAMES}
        shapes = {node.name: [sizes.get(dim, dim) for dim in node.shape] for node in self._session.get_inputs()}
        feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        return feeds | {"lengths": np.full(batch, FRAMES, np.int32)}

    def measure(self, seconds: float = 0.3) -> dict[int, float]:
        """CPU microseconds per chunk by batch size: each the median of five turns that share `seconds`."""
        found: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        for _ in range(5):
            for batch in BATCHES:
                calls, started, end = 0, time.process_time(), time.perf_counter() + seconds / 5
                while time.perf_counter() < end:
                    self._session.run(None, self._feeds[batch])
                    calls += 1
                found[batch].append((time.process_time() - started) / calls / batch * 1e6)
        return {batch: statistics.median(values) for batch, values in found.items()}
