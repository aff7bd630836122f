"""How a client reaches its server: whose certificate it believes, what it shows, and who it says it is."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from urllib.parse import quote

import grpc

from carousel_client.errors import InvalidArgument

# A call's session, percent-encoded: what a proxy before several servers can hash on, so that a session finds the server
# that has it in memory. Servers do not look at it.
SESSION_KEY = "carousel-session-id"

# A file, or what is in it.
Pem = str | PathLike[str] | bytes


@dataclass(frozen=True, kw_only=True)
class TLS:
    """Certificates in PEM, each a path or its content.

    `root_certificates` are the authorities that are believed, those that gRPC trusts where None. `certificate`, with
    those that lead to its authority, and `key` are the client's own, for a server that asks for one. `server_name` is
    the name in the server's certificate where that is not the target's host.
    """

    root_certificates: Pem | None = None
    certificate: Pem | None = None
    key: Pem | None = field(default=None, repr=False)
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises `InvalidArgument` for a file that cannot be read, and a certificate without its key."""
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("certificate and key go together; give both")
        return grpc.ssl_channel_credentials(
            _read(self.root_certificates, "root_certificates"),
            _read(self.key, "key"),
            _read(self.certificate, "certificate"),
        )


@dataclass(frozen=True)
class Access:
    """What a channel and its calls need. Raises `InvalidArgument` for what cannot work, or would give a token away."""

    target: str
    tls: bool | TLS | grpc.ChannelCredentials = False
    token: str | None = field(default=None, repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.token is None:
            return
        if not re.fullmatch(r"[!-~]+", self.token):
            raise InvalidArgument("the token is empty, or has characters that no token has; give it as it was printed")
        if self.tls is False and not self.insecure and not _is_loopback(self.target):
            raise InvalidArgument(
                f"the token would travel unencrypted to {self.target}; use TLS, or insecure where the network is "
                "trusted"
            )

    def channel(self, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        if (credentials := self._credentials()) is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, credentials, self._with_name(options))

    def aio_channel(self, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        if (credentials := self._credentials()) is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, credentials, self._with_name(options))

    def metadata(self, session_id: str = "") -> tuple[tuple[str, str], ...]:
        """A call's; `session_id` is the session that it is about, of a stream with several the oldest, "" of none."""
        token = (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()
        return (*token, (SESSION_KEY, quote(session_id, safe=""))) if session_id else token

    def _credentials(self) -> grpc.ChannelCredentials | None:
        """None for a channel that is not encrypted."""
        if self.tls is False:
            return None
        if isinstance(self.tls, grpc.ChannelCredentials):
            return self.tls
        return (TLS() if self.tls is True else self.tls).credentials()

    def _with_name(self, options: Sequence[tuple[str, int]]) -> list[tuple[str, int | str]]:
        name = self.tls.server_name if isinstance(self.tls, TLS) else None
        return [*options, ("grpc.ssl_target_name_override", name)] if name is not None else [*options]


def _read(pem: Pem | None, what: str) -> bytes | None:
    if pem is None or isinstance(pem, bytes):
        return pem
    try:
        content = Path(pem).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{what} {pem} cannot be read ({error.strerror}); give a PEM file") from error
    if b"-----BEGIN" not in content:
        raise InvalidArgument(f"{what} {pem} is not in PEM; give a file with -----BEGIN in it")
    return content


def _is_loopback(target: str) -> bool:
    """Whether a gRPC target is on this machine; a name other than localhost is not looked up."""
    if target.startswith("unix"):
        return True
    host = target.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    if host.count(":") < 2 or host.startswith("["):
        host = host.rpartition(":")[0] or host
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
