"""Certificates and tokens as an operator makes them, and servers that want them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import run  # noqa: F401 -- the fixture, for tests of the command
from tests.support.certificates import LOCAL, Authority, Pair

import carousel_client as cc
from carousel_server.config import ServerConfig
from carousel_server.front import guard
from carousel_server.front.tokens import line, make_token
from carousel_server.serve import Server, serving

Connect = Callable[..., AbstractAsyncContextManager[cc.aio.Client]]
Serve = Callable[..., AbstractAsyncContextManager[tuple[Server, Connect]]]


class TokenFile:
    """The file of `carousel serve --tokens`, and the tokens of who is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        self._lines: dict[str, str] = {}

    def add(self, name: str, *scopes: str, **limits: int) -> str:
        """A principal with a new token, which is given back."""
        token = self.tokens[name] = make_token()
        extras = "".join(f", {key} = {value}" for key, value in limits.items())
        self._lines[name] = line(name, scopes or ("infer",), token).removesuffix(" }") + extras + " }"
        self._write()
        return token

    def limit(self, name: str, **limits: int) -> None:
        """Other limits for a principal, whose token stays."""
        until_hash = self._lines[name][: self._lines[name].index('"', self._lines[name].index("sha256")) + 66]
        self._lines[name] = until_hash + "".join(f", {key} = {value}" for key, value in limits.items()) + " }"
        self._write()

    def add_certified(self, name: str, *scopes: str) -> None:
        """A principal that its certificate identifies."""
        self._lines[name] = f'"{name}" = {{ scopes = [{", ".join(map(repr, scopes))}] }}'
        self._write()

    def remove(self, name: str) -> None:
        del self._lines[name]
        self._write()

    def _write(self) -> None:
        self.path.touch(0o600)
        self.path.write_text("".join(entry + "\n" for entry in self._lines.values()))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_pair(authority: Authority) -> Pair:
    return authority.pair("server", LOCAL)


@pytest.fixture
def token_file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.toml")


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are seen soon."""
    monkeypatch.setattr(guard, "_LOOK_S", 0.05)


@pytest.fixture
def serve(config: ServerConfig) -> Serve:
    """A server with settings of its own, and what connects to it."""

    @asynccontextmanager
    async def serve(**settings: Any) -> AsyncIterator[tuple[Server, Connect]]:
        async with serving(replace(config, **settings)) as server:

            def connect(*, admin: bool = False, **options: Any) -> AbstractAsyncContextManager[cc.aio.Client]:
                return cc.aio.connect(f"127.0.0.1:{server.admin_port if admin else server.port}", **options)

            yield server, connect

    return serve
