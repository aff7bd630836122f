"""The flags of every command that calls a server: where it is, how it is known, and who calls."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import carousel_client as cc

_FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class ServerOptions:
    """What the flags say."""

    target: str
    tls: bool | cc.TLS
    insecure: bool
    token: str | None = field(repr=False)

    def connect(self, *, resume_timeout: float) -> cc.Client:
        """Raises `cc.CarouselError` for files that cannot be used, and a token that would travel in the clear."""
        return cc.connect(
            self.target, tls=self.tls, token=self.token, insecure=self.insecure, resume_timeout=resume_timeout
        )


@contextmanager
def calling(server: ServerOptions) -> Iterator[cc.Client]:
    """A client of the server; what it is refused is the command's one line."""
    try:
        with server.connect(resume_timeout=0) as client:
            yield client
    except cc.CarouselError as error:
        raise click.ClickException(str(error)) from error


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags; the command gets them together as `server`, a `ServerOptions`."""

    @functools.wraps(command)
    def grouped(
        *,
        target: str,
        tls: bool,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        token: str | None,
        insecure: bool,
        **others: Any,
    ) -> Any:
        files = cc.TLS(root_certificates=tls_ca, certificate=tls_cert, key=tls_key)
        used = files if files != cc.TLS() else tls
        return command(server=ServerOptions(target, used, insecure, token), **others)

    for option in reversed((
        click.option("--target", default="localhost:8001", show_default=True, help="HOST:PORT of the server."),
        click.option("--tls", is_flag=True, help="Encrypt, and check the server's certificate; those below imply it."),
        click.option("--tls-ca", type=_FILE, help="PEM: trust these authorities, not those that gRPC trusts."),
        click.option("--tls-cert", type=_FILE, help="PEM: show this certificate, for servers that ask for one."),
        click.option("--tls-key", type=_FILE, help="PEM: the key of --tls-cert."),
        # hide_input: a secret, which no message repeats.
        click.option(
            "--token",
            hide_input=True,
            help="Say who calls. Better in CAROUSEL_TOKEN: others on this machine can see a command's flags.",
        ),
        click.option("--insecure", is_flag=True, help="Send a token unencrypted, over a network that is trusted."),
    )):  # fmt: skip
        grouped = option(grouped)
    return grouped
