"""What a client notes while it runs: answers, their latencies, and how far they are off eager PyTorch's."""

import asyncio
import time

import numpy as np
from bench.workload import Workload


class Record:
    """`over` tells sessions to stop; `warm` is set once each had its first answer."""

    def __init__(self, workload: Workload, sessions: int) -> None:
        self.over = False
        self.warm = asyncio.Event()
        self._workload = workload
        self._cold = sessions
        self._answers: list[tuple[float, float]] = []
        self._worst = 0.0

    def done(self, session: int, index: int, sent: float, answer: bytes) -> None:
        """The answer to a session's chunk `index` is here. Raises `RuntimeError` where it is wrong."""
        now = time.perf_counter()
        self._answers.append((now, now - sent))
        wanted = self._workload.wanted[session % len(self._workload.chunks)]
        if index < len(wanted):
            self._check(answer, wanted[index])
        if index == 0:
            self._cold -= 1
            if not self._cold:
                self.warm.set()

    def _check(self, answer: bytes, wanted: np.ndarray) -> None:
        got = np.frombuffer(answer, np.float32)
        error = float(np.abs(got - wanted.ravel()).max(initial=0)) if got.size == wanted.size else float("inf")
        if not error <= self._workload.tolerance:
            raise RuntimeError(f"an answer is {error:.3g} off eager PyTorch's")
        self._worst = max(self._worst, error)

    @property
    def worst(self) -> float:
        """The largest difference so far."""
        return self._worst

    def since(self, begin: float) -> int:
        """Answers that arrived after a moment of `time.perf_counter`."""
        return sum(when >= begin for when, _ in self._answers)

    def latencies(self, begin: float, end: float) -> np.ndarray:
        """Seconds, of the answers that arrived between two moments of `time.perf_counter`."""
        return np.array([latency for when, latency in self._answers if begin <= when < end])
