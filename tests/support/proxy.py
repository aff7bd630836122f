"""A TCP proxy that cuts connections where a test wants it: between a real client and a real server, on a thread."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

Direction = Literal["to server", "to client"]


@dataclass(frozen=True)
class Cut:
    """Cut the connection once so many more bytes have passed in one direction: with a reset, or as a plain end."""

    direction: Direction
    after: int
    reset: bool = True


class Proxy:
    """Forwards to `target`. `draw` says where the next cut is to be, asked again after each; None: no more.

    While `open` is false connections are refused: they are ended as soon as they come.
    """

    def __init__(self, target: str, draw: Callable[[], Cut | None] = lambda: None) -> None:
        self.target = target
        self.cuts = 0
        self.open = True
        self._draw = draw
        self._next = draw()
        self._passed = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    def plan(self, cut: Cut) -> None:
        """The next cut, counted from now."""
        self._next, self._passed = cut, 0

    def cut(self) -> None:
        """Cut every connection now."""
        self._loop.call_soon_threadsafe(self._abort, True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._abort(True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    def _abort(self, reset: bool) -> None:
        for writer in self._writers:
            if reset:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.open:
            writer.close()
            return
        try:
            upstream, to_server = await asyncio.open_connection(*self.target.rsplit(":", 1))
        except OSError:
            writer.close()
            return
        pair = {writer, to_server}
        self._writers |= pair
        await asyncio.gather(
            self._forward("to server", reader, to_server), self._forward("to client", upstream, writer)
        )
        self._writers -= pair
        for end in pair:
            end.close()

    async def _forward(self, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                cut = self._next
                if cut is not None and cut.direction == direction:
                    left = cut.after - self._passed
                    if len(data) >= left:
                        sink.write(data[:left])
                        with suppress(OSError):
                            await asyncio.wait_for(sink.drain(), 1)
                        if self._next is cut:
                            self.cuts += 1
                            self._next, self._passed = self._draw(), 0
                            self._abort(cut.reset)
                        return
                    self._passed += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()


@contextmanager
def proxied(target: str, draw: Callable[[], Cut | None] = lambda: None) -> Iterator[Proxy]:
    proxy = Proxy(target, draw)
    try:
        yield proxy
    finally:
        proxy.close()
