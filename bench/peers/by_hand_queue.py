"""The strongest thing a good engineer writes in an afternoon: one queue, whatever waits stacked into one call.

States are stacked and unstacked with NumPy; two runner threads take from the queue in turn.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import uvloop
from bench.peers.by_hand import arguments, run
from bench.sizes import SIZES

_MOST = 64


class Batcher:
    def __init__(self, graph: Path, loop: asyncio.AbstractEventLoop) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(graph, options)
        self._h, self._c = (n for n in self._session.get_inputs() if n.name.endswith(("h_0", "c_0")))
        self.zeros = np.zeros(self._h.shape[1:], np.float32)
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[np.ndarray, Any, asyncio.Future[Any]]] = queue.SimpleQueue()
        self._turn = threading.Lock()
        for _ in range(2):
            threading.Thread(target=self._work, daemon=True).start()

    async def ask(self, x: np.ndarray, state: Any) -> Any:
        future = self._loop.create_future()
        self._queue.put((x, state, future))
        return await future

    def _work(self) -> None:
        while True:
            with self._turn:
                batch = [self._queue.get()]
                while len(batch) < _MOST:
                    try:
                        batch.append(self._queue.get_nowait())
                    except queue.Empty:
                        break
            x, lengths = _stack([x for x, _, _ in batch])
            feeds = {
                "x": x,
                "lengths": lengths,
                self._h.name: np.stack([state[0] for _, state, _ in batch]),
                self._c.name: np.stack([state[1] for _, state, _ in batch]),
            }
            y, h, c = self._session.run(None, feeds)
            answers = [(future, (y[i, : len(x)].tobytes(), (h[i], c[i]))) for i, (x, _, future) in enumerate(batch)]
            self._loop.call_soon_threadsafe(self._give, answers)

    def _give(self, answers: list[tuple[asyncio.Future[Any], Any]]) -> None:
        for future, answer in answers:
            if not future.done():
                future.set_result(answer)


def _stack(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[frames, features]` as one batch, padded where they differ in length, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if (lengths == lengths[0]).all():
        return np.stack(rows), lengths
    batch = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), np.float32)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch, lengths


async def serve(graph: Path, features: int) -> None:
    batcher = Batcher(graph, asyncio.get_running_loop())

    async def stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        state = (batcher.zeros, batcher.zeros)
        async for request in requests:
            y, state = await batcher.ask(np.frombuffer(request, np.float32).reshape(-1, features), state)
            yield y

    await run(stream)


def main() -> None:
    given = arguments().parse_args()
    uvloop.run(serve(given.graph, SIZES[given.model][0]))


if __name__ == "__main__":
    main()
