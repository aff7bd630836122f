"""`carousel serve`: the life of a server process, read from top to bottom."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc
from grpc_health.v1 import (
    health,  # its `aio` is an attribute, not a module
    health_pb2,
    health_pb2_grpc,
)
from grpc_reflection.v1alpha import reflection

from carousel_protos.v1 import carousel_pb2
from carousel_protos.v1.carousel_pb2_grpc import add_CarouselServicer_to_server
from carousel_server.access import is_loopback
from carousel_server.config import ServerConfig
from carousel_server.engine.engine import Engine
from carousel_server.errors import LoadError, UndoneError
from carousel_server.front.door import Door
from carousel_server.front.guard import Guard
from carousel_server.front.native import NativeServicer
from carousel_server.front.tls import Tls
from carousel_server.machine import Machine, choose, run_in

log = logging.getLogger("carousel")

SERVICE = carousel_pb2.DESCRIPTOR.services_by_name["Carousel"].full_name
# Seconds that streams are given to read what they were answered, before they are cut.
_GRACE_S = 1.0
# Seconds that all is given to close after the drain time, and that the process has before it is ended.
_CLOSE_S, _LAST_S = 2.0, 5.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, and then until open sessions are drained.

    Raises `ConfigError`, and `UndoneError` where something was left undone in the drain time. A process that hangs then
    ends all the same, with exit code 1.
    """
    run_in(choose(Machine.look(), config).loop, _run(config))


async def _run(config: ServerConfig) -> None:
    server = Server(config)
    with _signals() as stop:
        await server.start()
        # What is loaded lives as long as the process: the collector need not look at it over and over. It runs seldom
        # besides, since messages and steps hold no cycles.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000)
        await stop.wait()
        last = _end_after(config.drain_timeout_s + _LAST_S)
        if undone := await server.stop():
            # What hangs may hang on: the process is still to end.
            raise UndoneError(f"stopped by the deadline, with something undone: {'; '.join(undone)}")
        last.cancel()


def _end_after(seconds: float) -> threading.Timer:
    """End the process then, whatever its event loop and its threads are doing, unless it is cancelled."""

    def end() -> None:
        log.critical("still not stopped %g s after the signal: something hangs, and the process ends as it is", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; a second one ends the process as if we were not here."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    kinds = (signal.SIGTERM, signal.SIGINT)

    def restore() -> None:
        for kind in kinds:
            loop.remove_signal_handler(kind)

    def told() -> None:
        stop.set()
        restore()

    for kind in kinds:
        loop.add_signal_handler(kind, told)
    try:
        yield stop
    finally:
        restore()


class Server:
    """A server on a port, or two: `start`, then `stop`. `port` and `admin_port` are known once it was started.

    Raises `ConfigError` for certificates and tokens that cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.engine = Engine(config)
        self._guard = Guard(config)
        self.engine.sessions.quota = self._guard.max_sessions
        self._tls = (
            Tls(config.tls_cert, config.tls_key, config.tls_client_ca)
            if config.tls_cert is not None and config.tls_key is not None
            else None
        )
        self._native = NativeServicer(self.engine, self._guard)
        self._health = health.aio.HealthServicer()
        self._health_updates: set[asyncio.Task[None]] = set()
        self._loaded = False
        self._doors: list[Door] = []
        self.port = self.admin_port = 0

    async def start(self) -> None:
        """Bind, report NOT_SERVING while models load, then SERVING."""
        await self._report("", serving=False)
        self.engine.catalogue.on_change = self._model_changed
        self._doors = [
            Door(setting, self._config, self._guard, self._tls, self._add_services)
            for setting in self._config.addresses
        ]
        self.port, self.admin_port = self._doors[0].port, self._doors[-1].port
        for setting, door in zip(self._config.addresses, self._doors, strict=True):
            await door.open()
            log.info("listening on %s%s", door.address, self._how(setting))
            if not self._config.protected and not is_loopback(door.address.rpartition(":")[0]):
                log.warning("%s can be reached from other machines, without TLS or by whoever calls", door.address)
        self._guard.start()
        try:
            await self.engine.start()
            self._check_served()
        except BaseException:
            await self._close(time.monotonic() + _CLOSE_S)
            raise
        self._loaded = True
        await self._report_all()

    async def stop(self) -> list[str]:
        """NOT_SERVING, announce, drain, commit, stop: in the drain time, and a few seconds more where something hangs.

        What was left undone, in words.
        """
        await self._health.enter_graceful_shutdown()
        drain_s = self._config.drain_timeout_s
        deadline = time.monotonic() + drain_s
        self._native.announce(drain_s)
        log.info("stopping: %d sessions on streams have %g s to finish", self.engine.sessions.attached, drain_s)
        undone = await self.engine.drain(deadline)
        undone += await self._close(max(deadline, time.monotonic() + _CLOSE_S))
        for what in undone:
            log.error("left undone: %s", what)
        log.info("stopped")
        return undone

    async def _close(self, deadline: float) -> list[str]:
        self._guard.stop()
        await asyncio.gather(*(door.close(_GRACE_S) for door in self._doors))
        return await self.engine.stop(deadline)

    def _add_services(self, server: grpc.aio.Server) -> None:
        add_CarouselServicer_to_server(self._native, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _how(self, setting: str) -> str:
        """What an operator has to know of a port, after its address."""
        ways = [
            way
            for way, used in (
                ("admin calls", setting == "admin"),
                ("TLS", self._tls is not None),
                ("client certificates", self._config.tls_client_ca is not None),
                ("tokens", self._config.tokens is not None),
            )
            if used
        ]
        return f" ({', '.join(ways)})" if ways else ""

    def _check_served(self) -> None:
        """Raise `LoadError` where there are models and none could be loaded; warn where there are none."""
        entries = self.engine.catalogue.entries()
        if not entries:
            log.warning(
                "there is no bundle under %s; give the folder that `carousel export --out` wrote to, which holds "
                "<name>/<version>/manifest.json",
                self._config.models,
            )
        elif all(entry.model is None for entry in entries):
            reasons = [f"{entry.name}: {entry.reason}" for entry in entries if entry.reason]
            raise LoadError(f"no model under {self._config.models} can be served; {reasons[0]}")

    def _model_changed(self, name: str) -> None:
        task = asyncio.ensure_future(self._report_model(name))
        self._health_updates.add(task)
        task.add_done_callback(self._health_updates.discard)

    async def _report_model(self, name: str) -> None:
        entries = self.engine.catalogue.entries(name)
        await self._report(name, serving=any(entry.takes_sessions for entry in entries))
        if self._loaded:
            await self._report_all()

    async def _report_all(self) -> None:
        served = any(entry.takes_sessions for entry in self.engine.catalogue.entries())
        for service in ("", SERVICE):
            await self._report(service, serving=served)

    async def _report(self, service: str, *, serving: bool) -> None:
        await self._health.set(service, _SERVING if serving else _NOT_SERVING)


@asynccontextmanager
async def serving(config: ServerConfig) -> AsyncIterator[Server]:
    """A server inside this event loop, started, and stopped at the end."""
    server = Server(config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
