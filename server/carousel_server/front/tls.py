"""The server's certificate and key, and the clients' authority: read again at the first handshake after a change."""

import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import grpc

from carousel_server.errors import ConfigError
from carousel_server.front.files import Stamp, stamp, warn_if_readable

log = logging.getLogger("carousel")

Configuration = grpc.ServerCertificateConfiguration


class Tls:
    """Connections that are open keep what they were made with; a new pair that does not fit is not taken.

    Raises `ConfigError` where the files cannot be used at the start.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._files = [path for path in (certificate, key, client_ca) if path is not None]
        # gRPC asks from threads of its own.
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._current = self._read()
        warn_if_readable(key, "the key")

    def credentials(self) -> grpc.ServerCredentials:
        """For one port."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._fetcher(),  # type: ignore[arg-type]  # None says that nothing is new, which the type does not know
            require_client_authentication=self._client_ca is not None,
        )

    def _fetcher(self) -> Callable[[], Configuration | None]:
        given = self._current

        def fetch() -> Configuration | None:
            """What is new since the last handshake on this port, None for nothing."""
            nonlocal given
            current = self._look()
            if current is given:
                return None
            given = current
            return current

        return fetch

    def _look(self) -> Configuration:
        with self._lock:
            if (now := self._stamps()) != self._seen:
                self._seen = now
                try:
                    self._current = self._read()
                    log.info("took the new certificate in %s", self._certificate)
                except ConfigError as error:
                    log.error("%s; the certificate from before is used on", error)
            return self._current

    def _stamps(self) -> list[Stamp | None]:
        return [stamp(path) for path in self._files]

    def _read(self) -> Configuration:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate, self._key, password=self._refuse_password)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
            pair = (self._key.read_bytes(), self._certificate.read_bytes())
            roots = self._client_ca.read_bytes() if self._client_ca is not None else None
        except OSError as error:  # ssl.SSLError is one
            why = (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or str(error)
            files = ", ".join(map(str, self._files))
            raise ConfigError(
                f"the TLS files {files} cannot be used ({why.replace('_', ' ').lower()}): give a certificate and its "
                "key, and authorities, in PEM"
            ) from error
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def _refuse_password(self) -> str:
        raise ConfigError(f"the key {self._key} is encrypted: give one that is not, readable by the server alone")
