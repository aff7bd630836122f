"""States between real servers: moved in the middle of a stream, branched, listed, and refused where they do not fit."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tests.client.conftest import Mixer
from tests.client.process import serving
from tests.durability.models import Conditioned
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole
from tests.support.stream import RawStream, array, chunk_item, close_item, open_item, policy, tensor

import carousel_client as cc
import carousel_export as cx
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_protos.v1.manifest_pb2 import PolicyKind
from carousel_protos.v1.state_pb2 import PortableState, SessionState
from carousel_server.config import ServerConfig
from carousel_server.engine.portable import seal, unseal
from carousel_server.serve import Server

LENGTH = 29
SPEAKER = np.array([0.5, -1, 2], np.float32)


@pytest.fixture(scope="module")
def addresses(durable_models: Path) -> Iterator[tuple[str, str]]:
    """Two server processes with the same bundles."""
    with serving(durable_models) as here, serving(durable_models) as there:
        yield here.address, there.address


def inputs(model: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    match model:
        case "speaker":
            return {"tokens": draw.integers(0, 11, LENGTH)}
        case "mixer":
            return {"x": draw.standard_normal((LENGTH, 4), np.float32), "ids": draw.integers(0, 6, LENGTH)}
    return {"x": draw.standard_normal((LENGTH, 5 if model == "tagger" else 4), np.float32)}


def cut(model: str, sizes: list[int]) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum(sizes)
    return [
        {name: values[end - size : end] for name, values in inputs(model).items()}
        for end, size in zip(ends, sizes, strict=True)
    ]


async def send(stream: RawStream, session_id: str, index: int, chunk: dict[str, np.ndarray], *, end: bool) -> pb.Result:
    tensors = [tensor(values, name) for name, values in chunk.items()]
    item = pb.RequestItem(chunk=pb.Chunk(session_id=session_id, index=index, tensors=tensors, end=end))
    answer = await stream.ask(item)
    assert answer.HasField("result"), answer
    return answer.result


def eager(model: str, kind: str, block: int, ahead: int) -> dict[str, np.ndarray]:
    """Every output of the whole sequence, from eager PyTorch alone."""
    given = {name: torch.from_numpy(values) for name, values in inputs(model).items()}
    if model == "tagger":
        match kind:
            case "lookahead":
                return {"output": looked_ahead(make(Tagger), given["x"], block, ahead).numpy()}
            case "carry":
                sizes = [block] * (LENGTH // block) + [LENGTH % block]
                return {"output": carried(make(Tagger), given["x"], sizes).numpy()}
        return {"output": whole(make(Tagger), given["x"]).numpy()}
    with torch.no_grad():
        if model == "mixer":
            frames, summary = make(Mixer)(given["x"][:, None], given["ids"][:, None])
            return {"frames": frames[:, 0].numpy(), "summary": summary[0].numpy()}
        if model == "conditioned":
            return {"output": make(Conditioned)(given["x"][None], torch.from_numpy(SPEAKER)[None])[0].numpy()}
    return {"output": whole(make(Speaker), given["tokens"]).numpy()}


@pytest.mark.parametrize(
    ("model", "kind", "block", "ahead"),
    [
        ("tagger", "lookahead", 4, 2),
        ("tagger", "lookahead", 3, 5),
        ("tagger", "carry", 3, 0),
        ("tagger", "full", 0, 0),
        ("speaker", "causal", 0, 0),
        ("conditioned", "causal", 0, 0),
        ("mixer", "causal", 0, 0),
        ("mixer", "full", 0, 0),
    ],
)
async def test_a_session_moves_between_servers_in_the_middle_of_its_stream(
    addresses: tuple[str, str], model: str, kind: str, block: int, ahead: int
):
    """Moved after each chunk, frames waiting, it answers what eager PyTorch does, with the bits of one that stayed."""
    chunks = cut(model, [1, 5, 2, 9, 6, 3, 3])
    stays, moves = (f"{model}-{kind}-{block}-{what}" for what in ("stays", "moves"))
    asked = {"policy": policy(kind, block, ahead)}
    if model == "conditioned":
        asked["context"] = [tensor(SPEAKER, "speaker")]
    results: dict[str, list[pb.Result]] = {stays: [], moves: []}
    async with (
        grpc.aio.insecure_channel(addresses[0]) as first,
        grpc.aio.insecure_channel(addresses[1]) as second,
        cc.aio.connect(addresses[0]) as one,
        cc.aio.connect(addresses[1]) as another,
        RawStream(first) as stream,
        RawStream(second) as other,
    ):
        for session_id in (stays, moves):
            assert (await stream.ask(open_item(session_id, model, **asked))).HasField("opened")
        here, there = (one, stream), (another, other)
        for index, chunk in enumerate(chunks):
            end = index == len(chunks) - 1
            results[stays].append(await send(stream, stays, index, chunk, end=end))
            client, held = here
            results[moves].append(await send(held, moves, index, chunk, end=end))
            state = await client.get_state(moves)
            assert (await held.ask(close_item(moves))).HasField("closed")
            here, there = there, here
            client, held = here
            info = await client.put_state(state)
            assert (info.session_id, info.next_index, info.attached) == (moves, index + 1, False)
            assert (await held.ask(open_item(moves, model, resume=True))).opened.next_index == index + 1
    bits = {
        session_id: [[(each.name, each.data) for each in result.tensors] for result in answers]
        for session_id, answers in results.items()
    }
    assert bits[stays] == bits[moves]
    for name, wanted in eager(model, kind, block, ahead).items():
        parts = [array(each) for result in results[moves] for each in result.tensors if each.name == name]
        got = parts[-1] if name == "summary" else np.concatenate(parts)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


async def test_the_last_answer_moves_too(addresses: tuple[str, str]):
    """A chunk that is sent again after the move, since its answer was lost, gets the same bits and runs nothing."""
    chunk = cut("speaker", [9])[0]
    async with (
        grpc.aio.insecure_channel(addresses[0]) as first,
        grpc.aio.insecure_channel(addresses[1]) as second,
        RawStream(first) as stream,
        RawStream(second) as other,
    ):
        await stream.ask(open_item("retried", "speaker"))
        wanted = await send(stream, "retried", 0, chunk, end=False)
        with cc.connect(addresses[0]) as here, cc.connect(addresses[1]) as there:
            there.put_state(here.get_state("retried"))
        await other.ask(open_item("retried", "speaker", resume=True))
        assert await send(other, "retried", 0, chunk, end=False) == wanted
        assert (await other.ask(chunk_item("retried", 2, chunk["tokens"]))).failed.index == 2


async def test_a_state_asked_for_while_chunks_run_is_that_of_the_last_answer(addresses: tuple[str, str]):
    """With chunks under way a state is complete up to some chunk, and from there the rest gives the right answers."""
    chunks = cut("tagger", [1] * LENGTH)
    wanted = eager("tagger", "lookahead", 4, 2)["output"]
    async with (
        grpc.aio.insecure_channel(addresses[0]) as channel,
        cc.aio.connect(addresses[0]) as client,
        RawStream(channel) as stream,
    ):
        await stream.ask(open_item("busy", "tagger"))
        items = [chunk_item("busy", index, chunk["x"]) for index, chunk in enumerate(chunks)]
        await stream.send(*items)
        states = [await client.get_state("busy") for _ in range(5)]
        for _ in items:
            assert (await stream.receive()).HasField("result")
        places = set()
        for number, state in enumerate([*states, await client.get_state("busy")]):
            name = f"busy-{number}"
            place = (await client.put_state(state, session_id=name)).next_index
            places.add(place)
            await stream.ask(open_item(name, "tagger", resume=True))
            answers = [await send(stream, name, index, chunks[index], end=False) for index in range(place, LENGTH)]
            last = (await stream.ask(chunk_item(name, LENGTH, end=True))).result
            parts = [array(each) for result in [*answers, last] for each in result.tensors]
            first = answers[0].first_frame if answers else last.first_frame
            np.testing.assert_allclose(np.concatenate(parts), wanted[first:], rtol=0, atol=1e-5)
        assert LENGTH in places


async def test_branches_know_nothing_of_each_other(addresses: tuple[str, str]):
    """Branches of one session go on from its place, each with its own frames, in turn, as eager PyTorch does alone."""
    start, *ends = (np.random.default_rng(seed).integers(0, 11, 8) for seed in range(4))
    async with (
        grpc.aio.insecure_channel(addresses[0]) as channel,
        cc.aio.connect(addresses[0]) as client,
        RawStream(channel) as stream,
    ):
        await stream.ask(open_item("trunk", "speaker"))
        await send(stream, "trunk", 0, {"tokens": start}, end=False)
        named = (await client.fork("trunk", new_id="branch")).session_id
        assert named == "branch"
        branches = ["trunk", named, (await client.fork("trunk")).session_id]
        for name in branches[1:]:
            assert (await stream.ask(open_item(name, "speaker", resume=True))).opened.next_index == 1
        got: dict[str, list[np.ndarray]] = {name: [] for name in branches}
        for index in (1, 2):
            for name, tokens in zip(branches, ends, strict=True):
                part = {"tokens": tokens[:3] if index == 1 else tokens[3:]}
                result = await send(stream, name, index, part, end=index == 2)
                got[name].append(array(result.tensors[0]))
        for name, tokens in zip(branches, ends, strict=True):
            wanted = whole(make(Speaker), torch.from_numpy(np.concatenate([start, tokens])))[len(start) :]
            np.testing.assert_allclose(np.concatenate(got[name]), wanted.numpy(), rtol=0, atol=1e-5)


async def test_a_branch_of_a_session_with_frames_waiting(addresses: tuple[str, str]):
    """Under look-ahead a branch has the frames that wait, and what it is sent later is not the trunk's."""
    x, z = (np.random.default_rng(seed).standard_normal((9, 5), np.float32) for seed in (1, 2))
    async with (
        grpc.aio.insecure_channel(addresses[0]) as channel,
        cc.aio.connect(addresses[0]) as client,
        RawStream(channel) as stream,
    ):
        await stream.ask(open_item("ahead", "tagger"))
        first = array((await send(stream, "ahead", 0, {"x": x}, end=False)).tensors[0])
        assert len(first) == 4
        await client.fork("ahead", new_id="ahead-too")
        await stream.ask(open_item("ahead-too", "tagger", resume=True))
        for name, rest in (("ahead", x), ("ahead-too", z)):
            result = await send(stream, name, 1, {"x": rest}, end=True)
            wanted = looked_ahead(make(Tagger), torch.from_numpy(np.concatenate([x, rest])), 4, 2).numpy()
            np.testing.assert_allclose(array(result.tensors[0]), wanted[4:], rtol=0, atol=1e-5)


async def test_own_sessions_are_listed_page_by_page(addresses: tuple[str, str]):
    """Each session stands once in the list, in the order of ids, with its place and whether a stream holds it."""
    async with (
        grpc.aio.insecure_channel(addresses[0]) as channel,
        cc.aio.connect(addresses[0]) as client,
        RawStream(channel) as stream,
    ):
        for name in ("list-c", "list-a", "list-b"):
            await stream.ask(open_item(name, "conditioned", context=[tensor(SPEAKER, "speaker")]))
        await send(stream, "list-a", 0, cut("conditioned", [3])[0], end=False)
        await client.fork("list-a", new_id="list-d")
        stub = CarouselStub(channel)
        names, token = [], ""
        for size in (2, 2, 2):
            request = pb.ListSessionsRequest(model="conditioned", page_size=size, page_token=token)
            page = await stub.ListSessions(request)
            names += [info.session_id for info in page.sessions]
            if not (token := page.next_page_token):
                break
        listed = await client.sessions(model="conditioned")
        assert names == [info.session_id for info in listed]
        assert names == sorted(names)
        found = {info.session_id: info for info in listed if info.session_id.startswith("list-")}
        assert [(info.next_index, info.attached) for info in found.values()] == [
            (1, True),
            (0, True),
            (0, True),
            (1, False),
        ]
        first = found["list-a"]
        assert (first.model, first.version, first.variant, first.epoch) == ("conditioned", "1", "float32", 1)
        assert first.policy.kind == PolicyKind.POLICY_KIND_CAUSAL
        assert 0 <= first.idle_s < 60
        await client.drop("list-d")
        assert "list-d" not in {info.session_id for info in await client.sessions()}
        with pytest.raises(cc.NotFound, match="there is no session 'nobody'"):
            await client.drop("nobody")


@pytest.fixture(scope="module")
def sealed(addresses: tuple[str, str]) -> bytes:
    """A state of `tagger` with frames waiting and an answer kept."""
    with cc.connect(addresses[0]) as client, client.session("tagger", session_id="sealed") as session:
        session.send(inputs("tagger")["x"][:11])
        return client.get_state("sealed")


def test_any_flipped_bit_is_refused(addresses: tuple[str, str], sealed: bytes):
    """Whichever byte of a state was damaged, nothing is opened."""
    with cc.connect(addresses[1]) as client:
        for position in range(0, len(sealed), 37):
            damaged = bytearray(sealed)
            damaged[position] ^= 0x10
            with pytest.raises((cc.InvalidArgument, cc.FailedPrecondition)) as caught:
                client.put_state(bytes(damaged), session_id="damaged")
            assert caught.value.reason in ("STATE_DAMAGED", "STATE_FORMAT")
        with pytest.raises(cc.InvalidArgument, match=r"is no carousel\.v1\.PortableState; send the bytes"):
            client.put_state(b"\xff" * 40)
        with pytest.raises(cc.InvalidArgument, match="names no format"):
            client.put_state(b"")
        with pytest.raises(cc.NotFound):
            client.get_state("damaged")


def test_a_newer_format_is_refused(addresses: tuple[str, str], sealed: bytes):
    """A state that a later version wrote is not read halfway."""
    envelope = PortableState.FromString(sealed)
    envelope.format = 2
    with cc.connect(addresses[1]) as client:
        for newer in (envelope.SerializeToString(), seal(SessionState(format=2))):
            with pytest.raises(cc.FailedPrecondition, match="has format 2 and this server reads up to 1") as caught:
                client.put_state(newer)
            assert (caught.value.reason, caught.value.metadata["supported"]) == ("STATE_FORMAT", "1")


def set_policy(state: SessionState) -> None:
    state.policy.CopyFrom(policy("causal"))


def set_carry(state: SessionState) -> None:
    state.policy.CopyFrom(policy("lookahead"))


def spoil_state(state: SessionState) -> None:
    state.states[0].data = np.full(state.states[0].shape, np.nan, np.float32).tobytes()


def shorten_state(state: SessionState) -> None:
    state.states[0].CopyFrom(tensor(np.zeros((4, 6), np.float32), state.states[0].name))


def widen_frames(state: SessionState) -> None:
    state.waiting[0].CopyFrom(tensor(np.zeros((3, 6), np.float32), "x"))


def add_frames(state: SessionState) -> None:
    state.waiting[0].CopyFrom(tensor(np.zeros((40, 5), np.float32), "x"))


def skip_chunks(state: SessionState) -> None:
    state.next_index += 3


def lose_outputs(state: SessionState) -> None:
    del state.results[0].tensors[:]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda state: setattr(state, "variant", "int8"), "VARIANT_NOT_FOUND", "no variant 'int8' here"),
        (set_policy, "POLICY_NOT_ALLOWED", "does not allow policy causal"),
        (set_carry, "POLICY_NOT_ALLOWED", r"runs lookahead\(4, 2\) where the state has lookahead\(0, 0\)"),
        (lambda state: setattr(state, "model", "parser"), "MODEL_NOT_FOUND", "there is no model 'parser'"),
        (lambda state: setattr(state, "version", "9"), "MODEL_NOT_FOUND", "no version '9'"),
        (lambda state: setattr(state, "model", "speaker"), "SIGNATURE_DIFFERS", "tensors are not those of"),
        (lambda state: setattr(state, "model_sha256", "0"), "MODEL_DIFFERS", "does not compute the same"),
        (spoil_state, "BAD_TENSOR", "wanted finite float32"),
        (shorten_state, "BAD_TENSOR", r"float32 \[4, 6\]; wanted finite float32 \[4, 7\]"),
        (lambda state: state.states.pop(), "STATE_DAMAGED", "lacks the states"),
        (widen_frames, "BAD_TENSOR", "wanted float32"),
        (add_frames, "STATE_DAMAGED", "frames answered where lookahead"),
        (skip_chunks, "STATE_DAMAGED", "expects chunk 4 and keeps the answers to"),
        (lambda state: setattr(state, "next_index", 2**63), "STATE_DAMAGED", "counts over"),
        (lose_outputs, "STATE_DAMAGED", "lacks output 'output'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    addresses: tuple[str, str], sealed: bytes, change, kind: str, said: str
):
    """Each thing that keeps a state from being right here is named, and nothing is opened."""
    state = unseal(sealed)
    change(state)
    with cc.connect(addresses[1]) as client:
        with pytest.raises(cc.CarouselError, match=said) as caught:
            client.put_state(seal(state), session_id="unfit")
        assert caught.value.reason == kind
        assert "\n" not in str(caught.value)
        assert not [info for info in client.sessions() if info.session_id == "unfit"]


def test_an_id_that_is_in_use_is_refused(addresses: tuple[str, str], sealed: bytes):
    """A state never replaces a session that is open; once that one is gone, its id can be had again."""
    with cc.connect(addresses[0]) as client:
        client.put_state(sealed, session_id="taken")
        for attempt in (
            lambda: client.put_state(sealed, session_id="taken"),
            lambda: client.fork("taken", new_id="taken"),
        ):
            with pytest.raises(cc.AlreadyExists):
                attempt()
        client.drop("taken")
        assert client.put_state(sealed, session_id="taken").next_index == 1
        client.drop("taken")


def test_a_state_moves_to_other_weights_only_when_asked(durable_models: Path, tmp_path: Path, sealed: bytes):
    """With `move` a state goes on under other weights, exactly from where it was; other tensors never fit."""
    folder = tmp_path / "models"
    shutil.copytree(durable_models / "speaker", folder / "speaker")
    tokens = torch.from_numpy(inputs("speaker")["tokens"])
    with serving(folder) as server, cc.connect(server.address) as client:
        cx.export(make(Speaker, seed=5), torch.randint(0, 11, (3, 6)), name="speaker", out=folder, version="2")
        client.load("speaker")
        with client.session("speaker", version="1", session_id="old") as session:
            session.send(tokens[:9].numpy())
            state = client.get_state("old")
        with pytest.raises(cc.FailedPrecondition, match="ask for the state to be moved") as caught:
            client.put_state(state, version="2")
        assert caught.value.reason == "MODEL_DIFFERS"
        info = client.put_state(state, version="2", move=True)
        assert (info.session_id, info.version) == ("old", "2")
        assert unseal(client.get_state("old")).states == unseal(state).states
        before, after = make(Speaker), make(Speaker, seed=5)
        with torch.no_grad():
            _, place = before.lstm(before.embedding(tokens[None, :9]))
            wanted = after.linear(after.lstm(after.embedding(tokens[None, 9:]), place)[0])[0]
        with client.session("speaker", session_id="old", resume=True) as session:
            got = session.send(tokens[9:].numpy(), end=True)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-5)

        other = unseal(sealed)
        other.model = "speaker"
        with pytest.raises(cc.FailedPrecondition, match="whose tensors are not those of version 2 of speaker"):
            client.put_state(seal(other), version="2", move=True)


async def test_a_server_that_drains_gives_states_and_takes_none(durable_models: Path):
    """While it stops, sessions can be carried away from a server, and none is brought to it."""
    config = ServerConfig(models=durable_models, listen="127.0.0.1:0", drain_timeout_s=20)
    server = Server(config)
    await server.start()
    address = f"127.0.0.1:{server.port}"
    async with (
        grpc.aio.insecure_channel(address) as channel,
        cc.aio.connect(address) as client,
        RawStream(channel) as stream,
    ):
        await stream.ask(open_item("leaving", "speaker"))
        stopping = asyncio.create_task(server.stop())
        assert (await stream.receive()).HasField("going_away")
        state = await client.get_state("leaving")
        assert unseal(state).session_id == "leaving"
        for refused in (client.put_state(state, session_id="late"), client.fork("leaving", new_id="late")):
            with pytest.raises(cc.Unavailable) as caught:
                await refused
            assert caught.value.reason == "DRAINING"
        assert (await stream.ask(close_item("leaving"))).HasField("closed")
        await asyncio.wait_for(stopping, 10)


def test_a_state_over_the_limit_is_not_sent(addresses: tuple[str, str], sealed: bytes):
    """A state larger than a message may be is refused by the client, who says what to raise."""
    with (
        cc.connect(addresses[0], max_message_bytes=64) as client,
        pytest.raises(cc.ResourceExhausted, match="over max_message_bytes"),
    ):
        client.put_state(sealed)
