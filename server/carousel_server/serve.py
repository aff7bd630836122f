"""`carousel serve`: the life of a server process, read from top to bottom."""

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc
import uvloop
from grpc_health.v1 import (
    health,  # its `aio` is an attribute, not a module
    health_pb2,
    health_pb2_grpc,
)
from grpc_reflection.v1alpha import reflection

from carousel_protos.v1 import carousel_pb2
from carousel_protos.v1.carousel_pb2_grpc import add_CarouselServicer_to_server
from carousel_server.config import ServerConfig
from carousel_server.engine.engine import Engine
from carousel_server.errors import ConfigError, LoadError
from carousel_server.front.interceptor import ErrorInterceptor
from carousel_server.front.native import NativeServicer

log = logging.getLogger("carousel")

SERVICE = carousel_pb2.DESCRIPTOR.services_by_name["Carousel"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, and then until open sessions are drained. Raises `ConfigError`."""
    uvloop.run(_run(config))


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
        await server.stop()


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
    """A server on a port: `start`, then `stop`. `port` is known once it was started."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.engine = Engine(config)
        self._native = NativeServicer(self.engine)
        self._health = health.aio.HealthServicer()
        self._health_updates: set[asyncio.Task[None]] = set()
        self._loaded = False
        self.port = 0

    async def start(self) -> None:
        """Bind, report NOT_SERVING while models load, then SERVING."""
        self._server = grpc.aio.server(
            interceptors=(ErrorInterceptor(),),
            options=(
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.max_send_message_length", -1),  # an answer that was computed has to reach its client
                ("grpc.keepalive_time_ms", 60_000),  # a client whose network vanished is found out
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, and is told so
            ),
        )
        add_CarouselServicer_to_server(self._native, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._report("", serving=False)
        self.engine.catalogue.on_change = self._model_changed
        try:
            self.port = self._server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self._config.listen}: it is in use, or no address of this machine; stop what "
                "listens there, or give another --listen HOST:PORT (port 0 takes any that is free)"
            ) from error
        await self._server.start()
        log.info("listening on %s:%d", self._config.listen.rpartition(":")[0], self.port)
        try:
            await self.engine.start()
            self._check_served()
        except BaseException:
            await self._server.stop(grace=None)
            await self.engine.stop()
            raise
        self._loaded = True
        await self._report_all()

    async def stop(self) -> None:
        """NOT_SERVING, announce, drain with a deadline, stop."""
        await self._health.enter_graceful_shutdown()
        drain_s = self._config.drain_timeout_s
        self._native.announce(drain_s)
        log.info("stopping: %d sessions on streams have %g s to finish", self.engine.sessions.attached, drain_s)
        await self.engine.drain()
        await self._server.stop(grace=1.0)
        await self.engine.stop()
        log.info("stopped")

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
        await self._report(name, serving=any(entry.model is not None for entry in entries))
        if self._loaded:
            await self._report_all()

    async def _report_all(self) -> None:
        served = any(entry.model is not None for entry in self.engine.catalogue.entries())
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
