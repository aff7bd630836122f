"""TLS and mutual TLS on real sockets, with certificates that are replaced while streams live."""

import asyncio
import logging
import socket
import ssl
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from tests.security.conftest import Serve, TokenFile
from tests.support.certificates import LOCAL, Authority, Pair

import carousel_client as cc
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.config import ServerConfig
from carousel_server.errors import ConfigError
from carousel_server.serve import Server

FRAMES = np.ones((4, 5), np.float32)


async def subject(server: Server, authority: Authority) -> str:
    """Whose certificate a new connection is shown."""

    def look() -> str:
        context = ssl.create_default_context(cafile=authority.path)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return dict(pair[0] for pair in secured.getpeercert()["subject"])["commonName"]

    return await asyncio.to_thread(look)


async def refused(client: cc.aio.Client) -> str:
    """Why a connection does not come about."""
    with pytest.raises(cc.Unavailable) as caught:
        async with client:
            await client.models(timeout=20)
    return str(caught.value)


async def test_tls_encrypts_and_the_server_is_known(serve: Serve, authority: Authority, server_pair: Pair):
    """Who trusts the authority streams, by this client and a stock one; other trust and plaintext do not get in."""
    async with serve(tls_cert=server_pair.certificate, tls_key=server_pair.key) as (server, connect):
        async with connect(tls=cc.TLS(root_certificates=authority.path)) as client, client.session("tagger") as session:
            assert len(await session.send(FRAMES, end=True)) == 4
        stock = grpc.ssl_channel_credentials(authority.path.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", stock) as channel:
            answer = await CarouselStub(channel).ListModels(pb.ListModelsRequest())
        assert {model.name for model in answer.models} == {"tagger", "speaker"}
        assert "of no authority that is trusted here" in await refused(connect(tls=True))
        misnamed = cc.TLS(root_certificates=authority.path, server_name="other.example")
        assert "for another name" in await refused(connect(tls=misnamed))
        assert "it may want TLS" in await refused(connect())
    async with serve() as (_, connect):
        assert "speaks no TLS" in await refused(connect(tls=True))


async def test_mutual_tls_wants_a_certificate_of_the_authority(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path
):
    """Clients without a certificate, or with one that another authority signed, do not get in."""
    anna, eve = authority.pair("anna"), Authority(tmp_path, "other").pair("eve")
    roots = authority.path
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tls_client_ca": roots}
    async with serve(**settings) as (_, connect):
        async with connect(tls=cc.TLS(root_certificates=roots, certificate=anna.certificate, key=anna.key)) as client:
            assert await client.models()
        for tls in (
            cc.TLS(root_certificates=roots),
            cc.TLS(root_certificates=roots, certificate=eve.certificate, key=eve.key),
        ):
            assert "a certificate from its clients" in await refused(connect(tls=tls))


async def test_a_certificate_names_the_principal(serve: Serve, authority: Authority, server_pair: Pair):
    """Without tokens, a session is its certificate's: by SPIFFE ID, else common name; one with neither is refused."""
    spiffe = [x509.UniformResourceIdentifier("spiffe://example.org/anna")]
    names = {"a": ("anna", ()), "b": ("ben", ()), "c": ("whoever", spiffe), "d": ("", ())}
    pairs = {file: authority.pair(name, alternatives, file=file) for file, (name, alternatives) in names.items()}
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tls_client_ca": authority.path}
    async with serve(**settings) as (server, connect):

        def connect_as(file: str):
            pair = pairs[file]
            return connect(tls=cc.TLS(root_certificates=authority.path, certificate=pair.certificate, key=pair.key))

        async with connect_as("a") as client, client.session("tagger", session_id="s") as session:
            await session.ready()
            async with connect_as("b") as other:
                with pytest.raises(cc.PermissionDenied, match="session s is not yours"):
                    async with other.session("tagger", session_id="s") as stolen:
                        await stolen.ready()
            async with connect_as("c") as third, third.session("tagger") as own:
                await own.ready()
                owners = [server.engine.sessions.owned(name) for name in ("anna", "ben", "spiffe://example.org/anna")]
                assert owners == [1, 0, 1]
        async with connect_as("d") as nameless:
            with pytest.raises(cc.Unauthenticated, match="no common name and no SPIFFE ID"):
                await nameless.models()


async def test_a_certificate_has_the_scopes_that_the_file_gives_it(
    serve: Serve, authority: Authority, server_pair: Pair, token_file: TokenFile
):
    """With tokens too, a certificate that the file names needs none; one that it does not name needs a token."""
    token = token_file.add("ben", "infer")
    token_file.add_certified("anna", "admin")
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tls_client_ca": authority.path}
    async with serve(**settings, tokens=token_file.path) as (_, connect):
        for name in ("anna", "ben"):
            pair = authority.pair(name)
            tls = cc.TLS(root_certificates=authority.path, certificate=pair.certificate, key=pair.key)
            async with connect(tls=tls) as client:
                if name == "anna":
                    await client.load("tagger")
                    with pytest.raises(cc.PermissionDenied, match="Infer needs the scope infer"):
                        await client.infer("tagger", FRAMES[None])
                else:
                    with pytest.raises(cc.Unauthenticated, match="a token is needed"):
                        await client.models()
            async with connect(tls=tls, token=token) as client:
                assert (await client.infer("tagger", FRAMES[None])).shape == (1, 4, 3)


async def test_new_certificates_are_taken_and_streams_live_on(
    serve: Serve, authority: Authority, server_pair: Pair, caplog: pytest.LogCaptureFixture
):
    """The next handshake after a change is shown the new certificate; a stream from before is not interrupted; a
    certificate whose key is not there yet is not taken."""
    newer = authority.pair("newer", LOCAL)
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key}
    async with (
        serve(**settings) as (server, connect),
        connect(tls=cc.TLS(root_certificates=authority.path)) as client,
        client.session("tagger", policy=cc.Carry()) as session,
    ):
        before = await session.send(FRAMES)
        assert await subject(server, authority) == "server"
        server_pair.certificate.write_bytes(newer.certificate.read_bytes())
        assert await subject(server, authority) == "server"
        assert "the certificate from before is used on" in caplog.text
        server_pair.key.write_bytes(newer.key.read_bytes())
        assert await subject(server, authority) == "newer"
        assert len(await session.send(FRAMES, end=True)) == len(before) == 4
        async with connect(tls=cc.TLS(root_certificates=authority.path)) as another:
            assert await another.models()


async def test_a_new_client_authority_is_taken(serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path):
    """Once the file with the authorities changes, new connections are judged by the new ones."""
    later = Authority(tmp_path, "later")
    roots = tmp_path / "clients.pem"
    roots.write_bytes(authority.path.read_bytes())
    pairs = [authority.pair("anna"), later.pair("ben")]
    settings = {"tls_cert": server_pair.certificate, "tls_key": server_pair.key, "tls_client_ca": roots}
    async with serve(**settings) as (_, connect):
        access = [cc.TLS(root_certificates=authority.path, certificate=p.certificate, key=p.key) for p in pairs]
        assert "a certificate from its clients" in await refused(connect(tls=access[1]))
        roots.write_bytes(later.path.read_bytes())
        async with connect(tls=access[1]) as client:
            assert await client.models()
        assert "a certificate from its clients" in await refused(connect(tls=access[0]))


@pytest.mark.parametrize("broken", ["other key", "encrypted key", "no key", "no certificate", "no authority"])
def test_files_that_cannot_be_used_are_refused_at_the_start(
    config: ServerConfig, authority: Authority, server_pair: Pair, tmp_path: Path, broken: str
):
    """A key of another certificate, an encrypted one and files without PEM are one line that names the file."""
    certificate, key, roots = server_pair.certificate, server_pair.key, authority.path
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing\n")
    match broken:
        case "other key":
            key = authority.pair("another").key
        case "encrypted key":
            locked = authority.pair("locked", password=b"secret")
            certificate, key = locked.certificate, locked.key
        case "no key":
            key = tmp_path / "missing.key"
        case "no certificate":
            certificate = nothing
        case "no authority":
            roots = nothing
    settings = {"models": config.models, "tls_cert": certificate, "tls_key": key, "tls_client_ca": roots}
    with pytest.raises(ConfigError) as caught:
        Server(ServerConfig(**settings))
    message = str(caught.value)
    assert "\n" not in message
    assert str(key if "key" in broken else nothing) in message
    assert ("encrypted" in message) == (broken == "encrypted key")


def test_a_key_that_everybody_can_read_is_warned_of(
    config: ServerConfig, server_pair: Pair, caplog: pytest.LogCaptureFixture
):
    """The line says what to do."""
    settings = {"models": config.models, "tls_cert": server_pair.certificate, "tls_key": server_pair.key}
    Server(ServerConfig(**settings))
    assert "chmod" not in caplog.text
    server_pair.key.chmod(0o644)
    Server(ServerConfig(**settings))
    (record,) = [record for record in caplog.records if "chmod o-rw" in record.message]
    assert record.levelno == logging.WARNING
