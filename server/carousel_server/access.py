"""Where the server listens, and for whom: settings that are checked together."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from carousel_server.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Access:
    """Addresses, certificates and tokens. The files' contents are checked by who reads them, when the server starts."""

    listen: str = "127.0.0.1:8001"
    # Where admin calls are taken, and then nowhere else; "": on `listen` too.
    admin: str = ""
    # PEM: the server's certificate, with those that lead to its authority, and its key; read again when they change.
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # PEM: the authorities whose certificates clients have to show.
    tls_client_ca: Path | None = None
    # TOML: who may call what (`carousel_server.front.tokens`); read again when it changes.
    tokens: Path | None = None
    # Listen for other machines without TLS, or for whoever calls.
    insecure: bool = False

    def check_access(self) -> None:
        """Raises `ConfigError` for settings that contradict each other, or that open the server to whoever calls."""
        for name, address in self.addresses.items():
            host, port = _split(name, address)
            if not (self.insecure or self.protected or is_loopback(host)):
                raise ConfigError(
                    f"--{name} {host}:{port} can be reached from other machines: give --tls-cert and --tls-key, and "
                    "--tokens or --tls-client-ca; or, where the network itself is trusted, --insecure"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: the certificate, and its key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key: the server shows a certificate first")

    @property
    def addresses(self) -> dict[str, str]:
        """HOST:PORT by the setting's name."""
        return {"listen": self.listen} | ({"admin": self.admin} if self.admin else {})

    @property
    def protected(self) -> bool:
        """Whether calls are encrypted, and callers known."""
        return self.tls_cert is not None and (self.tokens is not None or self.tls_client_ca is not None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; a name other than localhost is not looked up, and counts as public."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _split(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{name} is {address!r}: it must be HOST:PORT, such as 127.0.0.1:8001")
    return host, int(port)
