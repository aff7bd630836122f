"""Sending what an iterable yields from a thread of its own, so that answers and chunks never wait for each other."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from carousel_protos.v1.carousel_pb2 import Result

_EXHAUSTED = object()


class Feeder:
    """Iterates `chunks` in a thread and sends them, at most `in_flight` ahead of the results that were taken.

    As an iterator it gives the results in order, the last one that of the empty chunk which ends the sequence. What
    `chunks`, `send` or `ended` raises is raised here, after the results of what was sent before.
    """

    def __init__(
        self,
        chunks: Iterable[object],
        send: Callable[[object, bool], Future[Result]],
        ended: Future[Result],
        in_flight: int,
    ) -> None:
        self._chunks = chunks
        self._send = send
        self._answers: queue.SimpleQueue[Future[Result] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(in_flight)
        # Held while a chunk is sent, so that none is sent after `stop` has returned.
        self._sending = threading.Lock()
        self._stopped = False
        ended.add_done_callback(self._answers.put)
        threading.Thread(target=self._feed, name="carousel-feeder", daemon=True).start()

    def __iter__(self) -> Iterator[Result]:
        while (answer := self._answers.get()) is not None:
            result = answer.result()
            self._room.release()
            yield result

    def stop(self) -> None:
        with self._sending:
            self._stopped = True
        self._room.release()

    def _feed(self) -> None:
        try:
            chunks = iter(self._chunks)
            more = True
            while more and self._room.acquire() and not self._stopped:
                chunk = next(chunks, _EXHAUSTED)
                more = chunk is not _EXHAUSTED
                with self._sending:
                    if self._stopped:
                        return
                    self._answers.put(self._send(chunk if more else None, not more))
            self._answers.put(None)
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that iterates, and raised there
            failed: Future[Result] = Future()
            failed.set_exception(error)
            self._answers.put(failed)
