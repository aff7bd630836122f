"""The limit: onnxruntime called in process on full batches, no RPC."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench.sizes import FRAMES

BATCHES = (1, 8, 32, 64)
_TURNS = 5


@dataclass(frozen=True)
class RawFigures:
    """CPU microseconds per chunk by batch size, and the median call at batch 1 by the clock, in milliseconds."""

    cpu_us_per_chunk: dict[int, float]
    call_ms: float

    @property
    def limit(self) -> float:
        """CPU microseconds per chunk at the largest batch: the unit of the benchmark."""
        return self.cpu_us_per_chunk[BATCHES[-1]]


class Raw:
    """A graph with its inputs at each batch size, ready to be called."""

    def __init__(self, graph: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(graph, options)
        rng = np.random.default_rng(0)
        self._feeds = {batch: self._draw(batch, rng) for batch in BATCHES}

    def _draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        sizes = {"batch": batch, "time": FRAMES}
        shapes = {node.name: [sizes.get(dim, dim) for dim in node.shape] for node in self._session.get_inputs()}
        feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        return feeds | {"lengths": np.full(batch, FRAMES, np.int32)}

    def measure(self, seconds: float) -> RawFigures:
        """Each batch size in turn, five times; `seconds` are shared among all."""
        cpu: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        calls_ms: list[float] = []
        for _ in range(_TURNS):
            for batch in BATCHES:
                walls: list[float] = []
                started, end = time.process_time(), time.perf_counter() + seconds / _TURNS / len(BATCHES)
                while not walls or time.perf_counter() < end:
                    began = time.perf_counter()
                    self._session.run(None, self._feeds[batch])
                    walls.append(time.perf_counter() - began)
                cpu[batch].append((time.process_time() - started) / len(walls) / batch * 1e6)
                calls_ms += [wall * 1e3 for wall in walls] if batch == 1 else []
        return RawFigures(
            {batch: statistics.median(values) for batch, values in cpu.items()}, statistics.median(calls_ms)
        )
