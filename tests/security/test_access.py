"""Where a server listens, and for whom: safe unless it is told otherwise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.security.conftest import Serve, TokenFile
from tests.support.certificates import Authority, Pair

import carousel_client as cc
from carousel_server.config import ServerConfig
from carousel_server.errors import ConfigError

FRAMES = np.ones((4, 5), np.float32)
FILES = {name: Path(f"{name}.pem") for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens")}
CERTIFICATE = ("tls_cert", "tls_key")


def make(models: Path, *files: str, **settings: Any) -> ServerConfig:
    return ServerConfig(models=models, **{name: FILES[name] for name in files}, **settings)


def test_a_server_listens_for_its_own_machine(models: Path):
    """Without settings nobody else can reach it."""
    assert make(models).listen == "127.0.0.1:8001"
    assert make(models).admin == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_loopback_needs_nothing(models: Path, host: str):
    """Addresses that only this machine can reach are served without TLS and tokens."""
    make(models, listen=f"{host}:0", admin=f"{host}:0")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.7", "192.168.1.9", "example.org", "[2001:db8::1]"])
@pytest.mark.parametrize("files", [(), CERTIFICATE, ("tokens",)])
def test_a_public_address_needs_tls_and_known_callers(models: Path, host: str, files: tuple[str, ...]):
    """Other machines are let in encrypted and known, or because the operator says that this is not needed."""
    for setting in ("listen", "admin"):
        with pytest.raises(ConfigError) as caught:
            make(models, *files, **{setting: f"{host}:8001"})
        message = str(caught.value)
        assert message.startswith(f"--{setting} {host}:8001 can be reached from other machines: give --tls-cert")
        assert "--insecure" in message
        assert "\n" not in message
        make(models, *files, **{setting: f"{host}:8001"}, insecure=True)
        make(models, *CERTIFICATE, "tokens", **{setting: f"{host}:8001"})
        make(models, *CERTIFICATE, "tls_client_ca", **{setting: f"{host}:8001"})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("tls_cert",), "--tls-cert and --tls-key go together"),
        (("tls_key",), "--tls-cert and --tls-key go together"),
        (("tls_client_ca",), "--tls-client-ca needs --tls-cert"),
    ],
)
def test_settings_that_do_not_fit_are_refused(models: Path, files: tuple[str, ...], said: str):
    """A certificate without its key, and client certificates without the server's, are told at once."""
    with pytest.raises(ConfigError, match=said):
        make(models, *files)


async def test_admin_calls_have_a_port_of_their_own(serve: Serve):
    """With --admin, models are loaded and unloaded there and nowhere else; all else is answered on both."""
    async with serve(admin="127.0.0.1:0") as (server, connect), connect() as client, connect(admin=True) as admin:
        assert server.port != server.admin_port
        for ask in (client.load, client.unload):
            with pytest.raises(
                cc.PermissionDenied, match="is an admin call: make it on this server's --admin"
            ) as caught:
                await ask("speaker")
            assert caught.value.reason == "ADMIN_PORT"
        await admin.unload("speaker")
        with pytest.raises(cc.FailedPrecondition, match="is not loaded"):
            await client.infer("speaker", np.zeros((1, 3), np.int64))
        await admin.load("speaker")
        assert (await client.infer("speaker", np.zeros((1, 3), np.int64))).shape == (1, 3, 11)
        async with admin.session("tagger") as session:
            assert len(await session.send(FRAMES, end=True)) == 4


async def test_the_admin_port_is_guarded_as_the_other(
    serve: Serve, authority: Authority, server_pair: Pair, token_file: TokenFile
):
    """It wants TLS and a token with the scope; an admin's token on the other port opens nothing more."""
    root, anna = token_file.add("root", "admin", "infer"), token_file.add("anna", "infer")
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tokens": token_file.path}
    tls = cc.TLS(root_certificates=authority.path)
    async with serve(**settings, admin="127.0.0.1:0") as (_, connect):
        async with connect(admin=True, tls=tls, token=root) as client:
            await client.load("speaker")
        for options, error in (
            ({"admin": True, "tls": tls, "token": anna}, cc.PermissionDenied),
            ({"admin": True, "tls": tls}, cc.Unauthenticated),
            ({"admin": True, "token": root}, cc.Unavailable),
            ({"tls": tls, "token": root}, cc.PermissionDenied),
            ({"tls": tls}, cc.Unauthenticated),
        ):
            async with connect(**options) as client:
                with pytest.raises(error):
                    await client.load("speaker", timeout=20)


async def test_streams_on_both_ports_are_told_that_the_server_goes(serve: Serve):
    """A drain is announced to whoever has a stream."""
    async with (
        serve(admin="127.0.0.1:0") as (server, connect),
        connect() as client,
        connect(admin=True) as admin,
        client.session("tagger") as one,
        admin.session("tagger") as two,
    ):
        await one.ready()
        await two.ready()
        server._native.announce(5)
        await one.send(FRAMES)
        await two.send(FRAMES)
        assert client.going_away is not None
        assert admin.going_away is not None
