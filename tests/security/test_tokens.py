"""Bearer tokens: who is let in, to what, how often, and until when."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.security.conftest import Serve, TokenFile
from tests.support.stream import chunk_item, open_item, reason, rpc_status

import carousel_client as cc
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.errors import ConfigError
from carousel_server.front.scopes import needed
from carousel_server.front.tokens import Tokens, digest, line, make_token

FRAMES = np.ones((4, 5), np.float32)
SERVICE = pb.DESCRIPTOR.services_by_name["Carousel"]
# By the scopes of which one is enough.
METHODS = {
    "Stream": {"infer"},
    "Infer": {"infer"},
    "GetState": {"infer"},
    "PutState": {"infer"},
    "Fork": {"infer"},
    "ListSessions": {"infer"},
    "ListModels": {"infer", "admin"},
    "GetModel": {"infer", "admin"},
    "LoadModel": {"admin"},
    "UnloadModel": {"admin"},
}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def call(channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """A call with an empty request by a stock client; its status."""
    ask = getattr(CarouselStub(channel), method)
    try:
        if method == "Stream":
            stream = ask(metadata=metadata)
            await stream.done_writing()
            await stream.read()
        else:
            await ask(SERVICE.methods_by_name[method].input_type._concrete_class(), metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110 -- what is waited for is the server's own
            await asyncio.sleep(0.02)


def test_every_method_has_its_scopes():
    """No call of the API is without a decision; one that nobody thought of is an admin's."""
    assert {method.name: set(needed(f"/{SERVICE.full_name}/{method.name}")) for method in SERVICE.methods} == METHODS
    assert needed(f"/{SERVICE.full_name}/Invented") == needed("/other.Service/Method") == {"admin"}


async def test_calls_need_a_known_token_with_the_scope(serve: Serve, token_file: TokenFile):
    """Every method refuses a call without a token and with a wrong one, and a token without its scope."""
    tokens = {"infer": token_file.add("anna", "infer"), "admin": token_file.add("root", "admin")}
    unknown = make_token()
    wrong = [
        (),
        bearer(unknown),
        bearer(tokens["infer"][:-1]),
        bearer(tokens["infer"] + "x"),
        bearer(""),
        (("authorization", tokens["infer"]),),
        (("authorization", f"Basic {tokens['infer']}"),),
        (("token", tokens["infer"]),),
    ]
    async with (
        serve(tokens=token_file.path) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for method, scopes in METHODS.items():
            for metadata in wrong:
                assert await call(channel, method, metadata) == grpc.StatusCode.UNAUTHENTICATED, (method, metadata)
            for scope, token in tokens.items():
                denied = await call(channel, method, bearer(token)) == grpc.StatusCode.PERMISSION_DENIED
                assert denied == (scope not in scopes), (method, scope)


async def test_a_refusal_has_its_reason(serve: Serve, token_file: TokenFile):
    """UNAUTHENTICATED and SCOPE_MISSING are told with what to do, by the client's own classes."""
    token = token_file.add("anna", "infer")
    async with serve(tokens=token_file.path) as (_, connect):
        for options, said in (({}, "send it as `authorization: Bearer TOKEN`"), ({"token": "x"}, "not one that this")):
            async with connect(**options) as client:
                with pytest.raises(cc.Unauthenticated, match=said) as caught:
                    await client.models()
                assert caught.value.reason == "UNAUTHENTICATED"
                with pytest.raises(cc.Unauthenticated):
                    async with client.session("tagger") as session:
                        await session.ready()
        async with connect(token=token) as client:
            with pytest.raises(cc.PermissionDenied, match="LoadModel needs the scope admin, which anna") as denied:
                await client.load("tagger")
            assert (denied.value.reason, denied.value.metadata) == ("SCOPE_MISSING", {"scope": "admin"})


async def test_nothing_is_read_of_a_caller_that_is_not_known(serve: Serve, token_file: TokenFile):
    """A request that is no message is UNAUTHENTICATED without a token, and an error of its own with one."""
    token = token_file.add("anna", "infer")
    async with (
        serve(tokens=token_file.path) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        ask = channel.unary_unary(f"/{SERVICE.full_name}/Infer")
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            (bearer(token), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(b"\xff\xff\xff", metadata=metadata)
            assert caught.value.code() == code


async def test_probes_need_no_token(serve: Serve, token_file: TokenFile):
    """Health, watched or asked, and reflection answer anybody."""
    token_file.add("anna")
    async with (
        serve(tokens=token_file.path) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        assert await health.Check(health_pb2.HealthCheckRequest()) == serving
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert await watch.read() == serving
        watch.cancel()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in reflection.ServerReflectionInfo(iter([request])):
            assert SERVICE.full_name in {service.name for service in answer.list_services_response.service}
            break


async def test_a_session_is_its_principals(serve: Serve, token_file: TokenFile):
    """Resume, chunk, close, state, branch and list by another principal find nothing that is not theirs."""
    anna, ben = token_file.add("anna"), token_file.add("ben")
    async with (
        serve(tokens=token_file.path) as (server, connect),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        connect(token=anna) as client,
        client.session("tagger", session_id="s", policy=cc.Carry()) as session,
    ):
        before = await session.send(FRAMES)
        stub = CarouselStub(channel)
        items = [
            pb.RequestItem(open=pb.Open(session_id="s", model="tagger", resume=True)),
            pb.RequestItem(open=pb.Open(session_id="s", model="tagger")),
            pb.RequestItem(chunk=pb.Chunk(session_id="s", index=1, end=True)),
            pb.RequestItem(close=pb.Close(session_id="s")),
        ]
        stream = stub.Stream(metadata=bearer(ben))
        await stream.write(pb.StreamRequest(items=items))
        failed = [item.failed async for item in _items(stream, len(items))]
        assert {(item.status.code, reason(item.status)) for item in failed} == {(7, "NOT_OWNER")}
        stream.cancel()
        asked: list[tuple[Any, Any]] = [
            (stub.GetState, pb.GetStateRequest(session_id="s")),
            (stub.Fork, pb.ForkRequest(session_id="s")),
            (
                stub.PutState,
                pb.PutStateRequest(
                    state=(await stub.GetState(pb.GetStateRequest(session_id="s"), metadata=bearer(anna))).state,
                    session_id="s",
                ),
            ),
        ]
        for method, request in asked:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(request, metadata=bearer(ben))
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED, request
            assert reason(rpc_status(caught.value)) == "NOT_OWNER"
        for token, ids in ((anna, ["s"]), (ben, [])):
            listed = await stub.ListSessions(pb.ListSessionsRequest(), metadata=bearer(token))
            assert [one.session_id for one in listed.sessions] == ids
        after = await session.send(FRAMES, end=True)
        assert after.shape == before.shape


async def _items(stream: Any, count: int) -> Any:
    while count:
        response = await asyncio.wait_for(stream.read(), 20)
        for item in response.items:
            count -= 1
            yield item


async def _read_out(stream: Any) -> None:
    while await asyncio.wait_for(stream.read(), 20) is not grpc.aio.EOF:
        pass


async def test_a_principals_sessions_are_bounded(serve: Serve, token_file: TokenFile):
    """Over its number of open sessions a principal is told to wait, by whatever call; others are not touched."""
    anna, ben = token_file.add("anna", max_sessions=1), token_file.add("ben")
    async with (
        serve(tokens=token_file.path) as (server, connect),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        connect(token=anna) as client,
        connect(token=ben) as other,
        client.session("tagger", session_id="s") as session,
        other.session("tagger") as theirs,
    ):
        await session.ready()
        await theirs.ready()
        with pytest.raises(cc.ResourceExhausted, match="1 sessions of anna are open") as caught:
            async with client.session("tagger") as second:
                await second.ready()
        assert (caught.value.reason, caught.value.retry_after) == ("TOO_MANY_SESSIONS", 1.0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await CarouselStub(channel).Fork(pb.ForkRequest(session_id="s"), metadata=bearer(anna))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        token_file.limit("anna", max_sessions=2)

        async def allowed() -> bool:
            try:
                async with client.session("tagger") as second:
                    await second.ready()
            except cc.ResourceExhausted:
                return False
            return True

        await eventually(allowed)
        await session.send(FRAMES, end=True)


async def test_a_principals_rows_are_bounded(serve: Serve, token_file: TokenFile):
    """Over its number of waiting rows a principal is told to try again; the rows are free again once answered."""
    token = token_file.add("anna", max_rows=3)
    batch = np.ones((3, 4, 5), np.float32)
    async with serve(tokens=token_file.path) as (_, connect), connect(token=token) as client:
        with pytest.raises(cc.ResourceExhausted, match="0 rows of anna are waiting and 3 are allowed") as caught:
            await client.infer("tagger", np.ones((4, 4, 5), np.float32))
        assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", 0.1)
        together = await asyncio.gather(*(client.infer("tagger", batch) for _ in range(4)), return_exceptions=True)
        assert any(isinstance(answer, cc.ResourceExhausted) for answer in together)
        assert any(not isinstance(answer, BaseException) for answer in together)
        for _ in range(3):
            assert (await client.infer("tagger", batch)).shape == (3, 4, 3)


async def test_a_changed_file_is_taken(serve: Serve, token_file: TokenFile, caplog: pytest.LogCaptureFixture):
    """A new token works and a withdrawn one does not, its streams end at once and no other; a broken file changes
    nothing.
    """
    anna, ben = token_file.add("anna"), token_file.add("ben")
    async with (
        serve(tokens=token_file.path) as (server, connect),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        connect(token=ben) as other,
        other.session("tagger", policy=cc.Carry()) as theirs,
    ):
        await theirs.send(FRAMES)
        stream = CarouselStub(channel).Stream(metadata=bearer(anna))
        await stream.write(pb.StreamRequest(items=[open_item("s", "tagger"), chunk_item("s", 0, FRAMES)]))
        kinds = [item.WhichOneof("item") async for item in _items(stream, 2)]
        assert kinds == ["opened", "result"]
        carl = token_file.add("carl")
        token_file.remove("anna")
        with pytest.raises(grpc.aio.AioRpcError, match="was withdrawn") as caught:
            await asyncio.wait_for(stream.read(), 20)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert await call(channel, "ListModels", bearer(anna)) == grpc.StatusCode.UNAUTHENTICATED
        async with connect(token=carl) as newcomer:
            assert await newcomer.models()
            token_file.path.write_text("carl = 1\n")

            async def complained() -> bool:
                return "carl must be a table" in caplog.text

            await eventually(complained)
            assert await newcomer.models()
        assert server.engine.sessions.owned("anna") == 1
        assert len(await theirs.send(FRAMES, end=True)) == 4


async def test_a_known_callers_stream_ends_as_any_other(serve: Serve, token_file: TokenFile):
    """Cancelled by its client it leaves the session to be resumed; a server that stops ends it without delay."""
    token = token_file.add("anna")
    opened = pb.StreamRequest(items=[open_item("s", "tagger"), chunk_item("s", 0, FRAMES)])
    resumed = pb.StreamRequest(items=[open_item("s", "tagger", resume=True)])
    async with serve(tokens=token_file.path) as (server, _):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        first = CarouselStub(channel).Stream(metadata=bearer(token))
        await first.write(opened)
        assert [item.WhichOneof("item") async for item in _items(first, 2)] == ["opened", "result"]
        first.cancel()

        async def detached() -> bool:
            return server.engine.sessions.attached == 0

        await eventually(detached)
        second = CarouselStub(channel).Stream(metadata=bearer(token))
        await second.write(resumed)
        assert [item.opened.next_index async for item in _items(second, 1)] == [1]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _read_out(second)
    assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    await channel.close()


async def test_two_tokens_of_one_principal_work_at_once(serve: Serve, token_file: TokenFile):
    """So a token can be changed without a gap, and sessions stay the principal's."""
    old, new = make_token(), make_token()
    hashes = ", ".join(f'"{digest(token).hex()}"' for token in (old, new))
    token_file.path.write_text(f'anna = {{ scopes = ["infer"], sha256 = [{hashes}] }}\n')
    async with serve(tokens=token_file.path) as (server, connect):
        for token in (old, new):
            async with connect(token=token) as client, client.session("tagger") as session:
                await session.ready()
                assert server.engine.sessions.owned("anna") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anna", "is not TOML"),
        ("anna = 1", "anna must be a table"),
        ('anna = { sha256 = "ab" }', "scopes must be a list"),
        ('anna = { scopes = ["root"] }', "scopes must be a list"),
        ("anna = { scopes = [] }", "scopes must be a list"),
        ('anna = { scopes = ["infer"], sha256 = "ab" }', "64 hexadecimal digits"),
        ('anna = { scopes = ["infer"], token = "x" }', "unknown key 'token'"),
        ('anna = { scopes = ["infer"], max_rows = -1 }', "max_rows must be a whole number"),
        ('anna = { scopes = ["infer"], max_sessions = true }', "max_sessions must be a whole number"),
        ('"" = { scopes = ["infer"] }', "1 to 256 printable characters"),
        ('anna = { scopes = ["infer"] }\nanna = { scopes = ["admin"] }', "is not TOML"),
        (
            "\n".join(
                f'{n} = {{ scopes = ["infer"], sha256 = "{h * 32}" }}' for n, h in (("anna", "ab"), ("ben", "AB"))
            ),
            "anna and ben have the same token",
        ),
    ],
)
def test_a_file_with_something_wrong_is_refused_whole(tmp_path: Path, text: str, said: str):
    """One line names the file and what in it is wrong."""
    path = tmp_path / "tokens.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        Tokens.read(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.read(tmp_path / "missing.toml")


@pytest.mark.parametrize("name", ["anna", "anna.b", 'qu"ote', "spiffe://example.org/a", "Ünal"])
def test_a_line_is_read_as_it_was_written(tmp_path: Path, name: str):
    """The line of a new token names its principal and scopes, and does not have the token."""
    token = make_token()
    entry = line(name, ["infer", "admin", "infer"], token)
    assert token not in entry
    (tmp_path / "tokens.toml").write_text(entry)
    principal = Tokens.read(tmp_path / "tokens.toml").find(token)
    assert principal is not None
    assert (principal.name, principal.scopes) == (name, {"infer", "admin"})


def test_tokens_cannot_be_guessed():
    """Each is new, and has 256 bits from the system's source of randomness."""
    tokens = {make_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert {len(token.removeprefix("carousel_")) for token in tokens} == {43}  # 256 bits, six a character


async def test_a_file_that_everybody_can_read_is_warned_of(
    serve: Serve, token_file: TokenFile, caplog: pytest.LogCaptureFixture
):
    """The line says what to do."""
    token_file.add("anna")
    token_file.path.chmod(0o644)
    async with serve(tokens=token_file.path):
        (record,) = [record for record in caplog.records if "chmod o-rw" in record.message]
        assert record.levelno == logging.WARNING


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "é", "a\x00"])
def test_a_client_refuses_what_cannot_be_a_token(token: str):
    """Before anything is sent, and without repeating it."""
    with pytest.raises(cc.InvalidArgument, match="has characters that no token has") as caught:
        cc.connect("localhost:1", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("localhost:8001", True),
        ("127.0.0.9:8001", True),
        ("[::1]:8001", True),
        ("dns:///localhost:8001", True),
        ("ipv4:127.0.0.1:8001", True),
        ("unix:/run/carousel.sock", True),
        ("example.org:8001", False),
        ("dns:///example.org:8001", False),
        ("10.0.0.1:8001", False),
        ("localhost.example.org:8001", False),
        ("[2001:db8::1]:8001", False),
    ],
)
def test_a_client_gives_no_token_away(target: str, near: bool):
    """A token goes unencrypted to this machine alone, unless the network is said to be trusted."""
    if near:
        cc.connect(target, token="t").close()
    else:
        with pytest.raises(cc.InvalidArgument, match="would travel unencrypted"):
            cc.connect(target, token="t")
    for options in ({"insecure": True}, {"tls": True}):
        cc.connect(target, token="t", **options).close()
