"""A real server as a process of its own, for as long as the example needs it."""

import asyncio
import re
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import carousel_client.aio as carousel
from carousel_protos.v1.carousel_pb2 import ModelState, ModelStatus

CAROUSEL = Path(sys.executable).with_name("carousel")
_START_S = 60


class ServerError(Exception):
    """The server did not come up, or did not stop; the message has its last words."""


@asynccontextmanager
async def running(models: Path, model: str) -> AsyncIterator[str]:
    """`carousel serve` on a free port of the loopback; gives its address once `model` is served.

    However this is left, the server has stopped: SIGTERM first, SIGKILL where that does not help. Raises `ServerError`.
    """
    process = await asyncio.create_subprocess_exec(
        CAROUSEL, "serve", "--models", models, "--listen", "127.0.0.1:0", "--drain-timeout", "5",
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None, "it is a pipe"
    log: deque[str] = deque(maxlen=20)
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reader = asyncio.create_task(_read_log(process.stderr, log, address))
    try:
        try:
            async with asyncio.timeout(_START_S):
                target = await address
                await _wait_served(target, model)
        except TimeoutError:
            raise ServerError(f"the server was not ready after {_START_S} s:\n" + "\n".join(log)) from None
        yield target
    finally:
        await _stop(process)
        await reader
    if process.returncode:
        raise ServerError(f"the server ended with {process.returncode}:\n" + "\n".join(log))


async def _read_log(stream: asyncio.StreamReader, log: deque[str], address: asyncio.Future[str]) -> None:
    async for raw in stream:
        line = raw.decode().rstrip()
        log.append(line)
        if not address.done() and (found := re.search(r"listening on (\S+:\d+)", line)):
            address.set_result(found[1])
    if not address.done():
        address.set_exception(ServerError("the server did not start:\n" + "\n".join(log)))


async def _wait_served(target: str, model: str) -> None:
    """Wait until the model is served: its golden vectors are replayed first."""
    async with carousel.connect(target) as client:
        while (status := await _status(client, model)).state != ModelState.MODEL_STATE_SERVING:
            if status.state == ModelState.MODEL_STATE_FAILED:
                raise ServerError(f"the server refuses {model}: {status.reason}")
            await asyncio.sleep(0.05)


async def _status(client: carousel.Client, model: str) -> ModelStatus:
    known = [status for status in await client.models(timeout=5) if status.name == model]
    return known[-1] if known else ModelStatus(name=model)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), 15)
    except TimeoutError:
        process.kill()
        await process.wait()
