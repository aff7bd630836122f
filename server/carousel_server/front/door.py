"""A port: what it takes, how it is encrypted, and who is let in."""

from collections.abc import Callable

import grpc

from carousel_server.config import ServerConfig
from carousel_server.errors import ConfigError
from carousel_server.front.guard import Guard
from carousel_server.front.interceptor import CallInterceptor
from carousel_server.front.tls import Tls


class Door:
    """`setting` is the one that has its address, "listen" or "admin". Raises `ConfigError` for one that is taken."""

    def __init__(
        self,
        setting: str,
        config: ServerConfig,
        guard: Guard,
        tls: Tls | None,
        add_services: Callable[[grpc.aio.Server], None],
    ) -> None:
        address = config.addresses[setting]
        takes_admin = setting == "admin" or not config.admin
        self._server = grpc.aio.server(
            interceptors=(CallInterceptor(guard, takes_admin=takes_admin),),
            options=(
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),  # an answer that was computed has to reach its client
                ("grpc.keepalive_time_ms", 60_000),  # a client whose network vanished is found out
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # and clients look as often for theirs
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, and is told so
            ),
        )
        add_services(self._server)
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, tls.credentials())
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: it is in use, or no address of this machine; stop what listens there, "
                f"or give another --{setting} HOST:PORT (port 0 takes any that is free)"
            ) from error
        self.address = f"{address.rpartition(':')[0]}:{self.port}"

    async def open(self) -> None:
        await self._server.start()

    async def close(self, grace_s: float | None) -> None:
        await self._server.stop(grace=grace_s)
