"""Versions that come, go and take sessions over under live streams.

The streams are the Python client's, on real servers. What the old version answered is compared bit for bit with a run
that nobody disturbed, and what moved with eager PyTorch: the old weights until the move, then the new ones from the
carried state.
"""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load, save
from tests.durability.versions import add_variant, export_versions, put, rewrite, spoken, tagged
from tests.support.shared import make_once
from tests.support.stream import RawStream, open_item, reason
from tests.support.supervised import supervised

import carousel_client as cc
from carousel_protos.v1.carousel_pb2 import ModelState
from carousel_server.config import ServerConfig
from carousel_server.serve import Server, serving

RETIRING = ModelState.MODEL_STATE_RETIRING
SERVING = ModelState.MODEL_STATE_SERVING
AVAILABLE = ModelState.MODEL_STATE_AVAILABLE
# Longer than any test streams.
TOKENS = np.random.default_rng(0).integers(0, 11, 20_000)
FRAMES = np.random.default_rng(0).standard_normal((20_000, 5)).astype(np.float32)


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    return make_once(tmp_path_factory, "versions", lambda folder: export_versions(folder, models))


@pytest.fixture
def place(tmp_path: Path, versions: Path) -> Path:
    """A models folder with the first version of each model."""
    put(versions, tmp_path / "models", "speaker/1", "tagger/1")
    return tmp_path / "models"


@asynccontextmanager
async def served(place: Path, **settings: object) -> AsyncIterator[tuple[Server, cc.aio.Client]]:
    config = ServerConfig(models=place, listen="127.0.0.1:0", drain_timeout_s=0.1, **settings)
    async with serving(config) as server, cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        yield server, client


async def state_of(client: cc.aio.Client, model: str, version: str) -> int:
    (found,) = [each for each in await client.models() if (each.name, each.version) == (model, version)]
    return found.state


async def until(there: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await there():  # noqa: ASYNC110 -- a server is asked
            await asyncio.sleep(0.005)


async def wait_for_state(client: cc.aio.Client, model: str, version: str, state: int) -> None:
    async def reached() -> bool:
        return await state_of(client, model, version) == state

    await until(reached)


class Live:
    """A session whose chunks of `size` frames are sent one after the other, until it is told to end."""

    def __init__(self, client: cc.aio.Client, model: str, x: np.ndarray, size: int, **options: object) -> None:
        self.answers: list[np.ndarray] = []
        self._x, self._size = x, size
        self._ending = asyncio.Event()
        self._task = asyncio.create_task(self._run(client, model, options))

    async def _run(self, client: cc.aio.Client, model: str, options: dict[str, object]) -> None:
        async with client.session(model, **options) as session:
            async for y in session.stream(self._chunks()):
                self.answers.append(y)

    async def _chunks(self) -> AsyncIterator[np.ndarray]:
        for at in range(0, len(self._x), self._size):
            if self._ending.is_set():
                return
            yield self._x[at : at + self._size]
            await asyncio.sleep(0.002)

    async def go_on(self, chunks: int) -> None:
        """Come back once so many more chunks were answered."""
        wanted = len(self.answers) + chunks

        async def reached() -> bool:
            return len(self.answers) >= wanted or self._task.done()

        await until(reached)

    async def end(self) -> np.ndarray:
        """Send no more; all frames that were answered. Raises what ended the session."""
        self._ending.set()
        return await self.ended()

    async def ended(self) -> np.ndarray:
        await asyncio.wait_for(self._task, 20)
        return np.concatenate(self.answers)


async def undisturbed(versions: Path, folder: Path, chunks: list[np.ndarray]) -> list[bytes]:
    """The bits of a server that does nothing else, with the speaker's first version alone."""
    alone = folder / "alone"
    if not alone.exists():
        put(versions, alone, "speaker/1")
    async with served(alone) as (_, client), client.session("speaker") as session:
        return [answer.tobytes() async for answer in session.stream(_each(chunks))]


async def _each(chunks: list[np.ndarray]) -> AsyncIterator[np.ndarray]:
    for chunk in chunks:
        yield chunk


def near(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def first_change(got: np.ndarray, unchanged: np.ndarray) -> int:
    """The first frame that is not what the old version says."""
    (differing,) = np.nonzero(np.abs(got - unchanged).max(axis=1) > 1e-5)
    return int(differing[0])


async def test_old_sessions_finish_on_a_version_that_retires(place: Path, versions: Path, tmp_path: Path):
    """While a version loads, is the newest and retires, the sessions of the old one get the bits of an undisturbed run.

    New sessions are on the new one, the old one takes no more, and is gone with its last session; health stays SERVING.
    """
    async with served(place) as (server, client), grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="speaker"))
        old = [Live(client, "speaker", TOKENS, size) for size in (2, 3)]
        await old[0].go_on(5)
        put(versions, place, "speaker/2")
        assert (await client.load("speaker")).version == "2"
        (retiring,) = (await client.unload("speaker", version="1")).models
        assert (retiring.state, retiring.open_sessions, retiring.deadline_unix_ms > 0) == (RETIRING, 2, True)
        async with client.session("speaker") as session:
            near(await session.send(TOKENS[:9]), spoken(TOKENS[:9], (2, 9)))
            assert session.version == "2"
        async with RawStream(channel) as stream:
            refused = (await stream.ask(open_item("late", "speaker", version="1"))).failed.status
            assert (refused.code, reason(refused)) == (grpc.StatusCode.FAILED_PRECONDITION.value[0], "MODEL_RETIRED")
            assert refused.message == (
                "version 1 of model 'speaker' is retiring and takes nothing new; leave the version out"
            )
        await old[0].go_on(20)
        for live, size in zip(old, (2, 3), strict=True):
            got = await live.end()
            chunks = [TOKENS[at : at + size] for at in range(0, len(got), size)]
            assert [y.tobytes() for y in live.answers] == await undisturbed(versions, tmp_path, chunks)
        await wait_for_state(client, "speaker", "1", AVAILABLE)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TimeoutError):  # it never changed
            await asyncio.wait_for(health.read(), 0.05)


async def test_what_is_left_at_the_deadline_is_ended(place: Path, versions: Path):
    """A session is answered until its version's deadline, then told MODEL_RETIRED, and others' sessions go on."""
    put(versions, place, "speaker/2")
    async with served(place) as (_, client):
        await client.load("speaker", version="1")
        left, other = Live(client, "speaker", TOKENS, 2, version="1"), Live(client, "speaker", TOKENS, 2)
        await left.go_on(5)
        await client.unload("speaker", version="1", deadline=0.3)
        await left.go_on(5)
        with pytest.raises(cc.FailedPrecondition, match="version 1 of model 'speaker' was unloaded") as caught:
            await left.ended()
        assert caught.value.reason == "MODEL_RETIRED"
        got = np.concatenate(left.answers)
        near(got, spoken(TOKENS[: len(got)], (1, len(got))))
        await wait_for_state(client, "speaker", "1", AVAILABLE)
        got = await other.end()
        near(got, spoken(TOKENS[: len(got)], (2, len(got))))


async def test_the_default_deadline_is_the_servers(place: Path):
    """Without a deadline of its own an unload gives sessions --retire-timeout, and 0 ends them at once."""
    async with served(place, retire_timeout_s=0) as (_, client):
        for _ in range(2):
            session = await client.session("speaker").__aenter__()
            await session.send(TOKENS[:3])
            (status,) = (await client.unload("speaker")).models
            assert (status.state, status.open_sessions) == (AVAILABLE, 0)
            with pytest.raises(cc.FailedPrecondition, match="the time of its sessions is over"):
                await session.send(TOKENS[:3])
            await client.load("speaker")


async def test_live_sessions_move_between_two_chunks(place: Path, versions: Path):
    """Sessions that stream without a pause go on with the new weights from the old ones' state, and do not notice.

    Those that a chunk was not sent to for a while move too; each answers what eager PyTorch does.
    """
    async with served(place) as (_, client):
        speakers = [Live(client, "speaker", TOKENS, size) for size in (1, 2, 5)]
        taggers = [Live(client, "tagger", FRAMES, size) for size in (1, 3, 7)]
        async with client.session("speaker", session_id="quiet") as quiet:
            parts = [await quiet.send(TOKENS[:7])]
            await asyncio.gather(*(live.go_on(8) for live in (*speakers, *taggers)))
            put(versions, place, "speaker/2", "tagger/2")
            for model, count in (("speaker", 4), ("tagger", 3)):
                await client.load(model)
                answer = await client.unload(model, version="1", move=True)
                assert (answer.moved, answer.staying_sessions) == (count, 0)
                assert [(each.version, each.state) for each in answer.models] == [("1", AVAILABLE)]
            parts.append(await quiet.send(TOKENS[7:20]))
            near(np.concatenate(parts), spoken(TOKENS[:20], (1, 7), (2, 13)))
            (info,) = [each for each in await client.sessions() if each.session_id == "quiet"]
            assert (info.version, info.epoch) == ("2", 1)
        for live in (*speakers, *taggers):
            await live.go_on(8)
        for live, size in zip(speakers, (1, 2, 5), strict=True):
            got = await live.end()
            x = TOKENS[: len(got)]
            at = first_change(got, spoken(x, (1, len(x)))) // size * size
            assert at > 0
            near(got, spoken(x, (1, at), (2, len(x) - at)))
        for live in taggers:
            got = await live.end()
            x = FRAMES[: len(got)]
            blocks = first_change(got, tagged(x, len(x))) // 4
            assert blocks > 0
            near(got, tagged(x, blocks))


async def test_frames_that_wait_and_answers_that_are_kept_move_too(place: Path, versions: Path):
    """A moved session runs the frames that waited with the new weights, and goes on from there wherever it is taken up.

    Who takes it up is told the new version, also where it asks for the old one.
    """
    async with served(place) as (_, client), cc.aio.connect(client.target) as other, AsyncExitStack() as left:
        session = await left.enter_async_context(client.session("tagger", session_id="waits", version="1"))
        parts = [await session.send(FRAMES[:13])]  # two blocks answered, five frames wait
        put(versions, place, "tagger/2")
        await client.load("tagger")
        assert (await client.unload("tagger", version="1", move=True, move_to="2")).moved == 1
        kept = await client.get_state("waits")
        left.pop_all()
        async with other.session("tagger", session_id="waits", resume=True) as taken:
            await taken.ready()
            assert (taken.next_index, taken.version) == (1, "2")
            parts.append(await taken.send(FRAMES[13:30], end=True))
        near(np.concatenate(parts), tagged(FRAMES[:30], 2))
        assert (await client.put_state(kept, session_id="again")).version == "2"


async def test_an_open_whose_answer_was_lost_finds_a_moved_session(place: Path, versions: Path):
    """A moved session can be opened again as it was, with the old version's number, and by no number it never had."""
    put(versions, place, "speaker/2")
    async with (
        served(place) as (_, client),
        grpc.aio.insecure_channel(client.target) as channel,
        RawStream(channel) as stream,
    ):
        await client.load("speaker", version="1")
        opening = open_item("lost", "speaker", version="1", holder="h")
        assert (await stream.ask(opening)).opened.version == "1"
        await client.unload("speaker", version="1", move=True)
        again = (await stream.ask(opening)).opened
        assert (again.version, again.epoch, again.next_index) == ("2", 2, 0)
        refused = await stream.ask(open_item("lost", "speaker", version="3", resume=True))
        assert reason(refused.failed.status) == "SESSION_DIFFERS"


async def test_what_cannot_move_stays_and_is_told(place: Path, versions: Path):
    """Sessions that another version has other tensors or no variant for are listed with the reason, and finish."""
    add_variant(place / "tagger" / "1", "float16")
    async with served(place) as (_, client):
        stays = Live(client, "speaker", TOKENS, 2, session_id="stays")
        half = Live(client, "tagger", FRAMES, 6, session_id="half", variant="float16")
        looks = Live(client, "tagger", FRAMES, 6, session_id="looks")
        lives = stays, half, looks
        await asyncio.gather(*(live.go_on(5) for live in lives))
        put(versions, place, "speaker/3", "tagger/2")
        for model in ("speaker", "tagger"):
            await client.load(model)
        speakers = await client.unload("speaker", version="1", move=True)
        taggers = await client.unload("tagger", version="1", move=True)
        assert (speakers.moved, speakers.staying_sessions, taggers.moved, taggers.staying_sessions) == (0, 1, 1, 1)
        (speaker,), (tagger,) = speakers.staying, taggers.staying
        assert (speaker.session_id, tagger.session_id) == ("stays", "half")
        assert "whose tensors are not those of version 3 of speaker" in speaker.reason
        assert tagger.reason == "tagger has no variant 'float16' here; it has float32"
        for live in lives:
            await live.go_on(5)
        got = await stays.end()
        near(got, spoken(TOKENS[: len(got)], (1, len(got))))
        got = await half.end()
        near(got, tagged(FRAMES[: len(got)], len(got)))
        await looks.end()
        for model in ("speaker", "tagger"):
            await wait_for_state(client, model, "1", AVAILABLE)


async def test_a_retirement_can_be_taken_back(place: Path, versions: Path):
    """Loading a version that is retiring lets it stay, with its sessions; nothing is ended at the old deadline."""
    async with served(place) as (_, client):
        live = Live(client, "speaker", TOKENS, 2)
        await live.go_on(5)
        await client.unload("speaker", deadline=0.3)
        assert await state_of(client, "speaker", "1") == RETIRING
        with pytest.raises(cc.FailedPrecondition, match="is retiring"):
            await client.infer("speaker", TOKENS[None, :3])
        assert (await client.load("speaker")).state == SERVING
        await asyncio.sleep(0.5)
        await live.go_on(5)
        got = await live.end()
        near(got, spoken(TOKENS[: len(got)], (1, len(got))))
        assert await state_of(client, "speaker", "1") == SERVING


async def test_a_move_needs_somewhere_to_go(place: Path, versions: Path):
    """A move from no version, with no other served, or to one that is not, is refused and changes nothing."""
    async with served(place) as (_, client):
        for options, said in (
            ({}, "name the version of 'speaker' whose sessions are to move"),
            ({"version": "1"}, "cannot move to another version: no other is served"),
            ({"version": "1", "move_to": "9"}, "cannot move to 9: no other is served; load it first"),
        ):
            with pytest.raises(cc.CarouselError, match=said):
                await client.unload("speaker", move=True, **options)
        with pytest.raises(cc.InvalidArgument, match="the deadline is nan s"):
            await client.unload("speaker", deadline=float("nan"))
        assert await state_of(client, "speaker", "1") == SERVING


def other_bits(bundle: Path) -> None:
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def truncated(bundle: Path) -> None:
    rewrite(bundle, "model.onnx", lambda data: data[: len(data) // 2])


def missing(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()


def other_golden(bundle: Path) -> None:
    def change(data: bytes) -> bytes:
        tensors = load(data)
        changed = next(key for key in tensors if "/out/" in key)
        return save({**tensors, changed: tensors[changed] + np.float32(1e-3)}, metadata_of(data))

    rewrite(bundle, "golden.safetensors", change)


def metadata_of(safetensors: bytes) -> dict[str, str]:
    length = int.from_bytes(safetensors[:8], "little")
    return json.loads(safetensors[8 : 8 + length])["__metadata__"]


def wrong_graph(bundle: Path) -> None:
    """Another model's graph, its checksum as it should be."""
    tagger = (bundle.parents[1] / "tagger" / "1" / "model.onnx").read_bytes()
    rewrite(bundle, "model.onnx", lambda _: tagger)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (other_bits, "is not the file that was exported (its sha256 differs); export the model again"),
        (truncated, "export the model again"),
        (missing, "model.onnx is missing; export the model again"),
        (other_golden, "off the eager model's answers"),
        (wrong_graph, "version 2 of model 'speaker' is not served"),
    ],
)
async def test_a_corrupt_new_version_disturbs_nobody(
    place: Path, versions: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
):
    """A new version that cannot be served is refused in a line; the old one answers the same bits, and new sessions."""
    async with served(place) as (server, client):
        live = Live(client, "speaker", TOKENS, 2)
        await live.go_on(5)
        put(versions, place, "speaker/2")
        damage(place / "speaker" / "2")
        with pytest.raises(cc.FailedPrecondition) as caught:
            await client.load("speaker")
        assert caught.value.reason == "LOAD_FAILED"
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert (await client.model("speaker")).status.version == "1"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            check = health_pb2.HealthCheckRequest(service="speaker")
            assert (await health_pb2_grpc.HealthStub(channel).Check(check)).status == 1
        async with client.session("speaker") as session:
            assert len(await session.send(TOKENS[:3])) == 3
            assert session.version == "1"
        await live.go_on(5)
        got = await live.end()
        chunks = [TOKENS[at : at + 2] for at in range(0, len(got), 2)]
    assert [y.tobytes() for y in live.answers] == await undisturbed(versions, tmp_path, chunks)


# With a store


async def leave(client: cc.aio.Client, name: str, frames: int) -> None:
    """A session that its client goes away from, and that is not closed."""
    async with AsyncExitStack() as left:
        session = await left.enter_async_context(client.session("speaker", session_id=name))
        near(await session.send(TOKENS[:frames]), spoken(TOKENS[:frames], (1, frames)))
        left.pop_all()


async def test_a_session_that_was_ended_is_in_the_store(place: Path, versions: Path, tmp_path: Path):
    """At the deadline the state is kept: refused where only another version is served, it moves once that is asked for.

    It goes on where the old version is loaded again, with the same bits.
    """
    async with served(place, store=f"sqlite:{tmp_path / 'sessions'}") as (_, client):
        for name in ("moves", "waits"):
            await leave(client, name, 10)
        put(versions, place, "speaker/2")
        await client.load("speaker")
        (status,) = (await client.unload("speaker", version="1", deadline=0)).models
        assert (status.state, status.open_sessions) == (AVAILABLE, 0)
        with pytest.raises(cc.FailedPrecondition, match="the model has changed under the state") as caught:
            async with client.session("speaker", session_id="waits", resume=True) as session:
                await session.ready()
        assert (caught.value.reason, caught.value.metadata["expected_version"]) == ("MODEL_DIFFERS", "1")
        assert "it is of version 1 of 'speaker', which is not served here, and 2 is" in str(caught.value)
        await client.load("speaker", version="1")
        async with client.session("speaker", session_id="waits", resume=True) as session:
            near(await session.send(TOKENS[10:20]), spoken(TOKENS[:20], (1, 20))[10:])
            assert session.version == "1"
        await client.unload("speaker", version="1", deadline=0)
        await client.unload("speaker", version="1", move=True)
        async with client.session("speaker", session_id="moves", resume=True) as session:
            near(await session.send(TOKENS[10:20]), spoken(TOKENS[:20], (1, 10), (2, 10))[10:])
            assert session.version == "2"


async def test_a_cold_session_on_a_stream_moves_at_its_next_chunk(place: Path, versions: Path, tmp_path: Path):
    """A session that only the store has goes on with the new version when its stream sends on, and is stored so."""
    store = f"sqlite:{tmp_path / 'sessions'}"
    async with (
        served(place, store=store, cold_after_s=0.05) as (server, client),
        client.session("speaker", session_id="cold") as session,
    ):

        async def cold() -> bool:
            return not len(server.engine.sessions)

        await session.send(TOKENS[:10])
        await until(cold)
        put(versions, place, "speaker/2")
        await client.load("speaker")
        assert (await client.unload("speaker", version="1", move=True)).moved == 0
        near(await session.send(TOKENS[10:20]), spoken(TOKENS[:20], (1, 10), (2, 10))[10:])
        assert (await server.engine.keeper.store.read("cold")).version == "2"


@pytest.mark.parametrize("move", [False, True])
async def test_a_restart_finds_old_sessions_a_version(place: Path, versions: Path, tmp_path: Path, move: bool):
    """After a restart on a newer version, an old session has its own loaded for it, or with --move-sessions moves."""
    store = f"sqlite:{tmp_path / 'sessions'}"
    async with served(place, store=store) as (_, client):
        await leave(client, "old", 10)
    put(versions, place, "speaker/2")
    async with served(place, store=store, move_sessions=move) as (_, client):
        assert await state_of(client, "speaker", "1") == AVAILABLE
        async with client.session("speaker", session_id="old", resume=True) as session:
            wanted = spoken(TOKENS[:20], (1, 10), (2, 10)) if move else spoken(TOKENS[:20], (1, 20))
            near(await session.send(TOKENS[10:20]), wanted[10:])
            assert session.version == ("2" if move else "1")
        async with client.session("speaker") as session:
            await session.ready()
            assert session.version == "2"


async def test_a_version_that_is_gone_is_named(place: Path, versions: Path, tmp_path: Path):
    """Where an old session's version is not on disk any more, it is refused with what it expects; the state stays."""
    store = f"sqlite:{tmp_path / 'sessions'}"
    async with served(place, store=store) as (_, client):
        await leave(client, "old", 10)
    put(versions, place, "speaker/2")
    shutil.rmtree(place / "speaker" / "1")
    for _ in range(2):
        async with served(place, store=store) as (_, client):
            with pytest.raises(cc.FailedPrecondition, match="of version 1 of 'speaker', which is not served"):
                async with client.session("speaker", session_id="old", resume=True) as session:
                    await session.ready()
    put(versions, place, "speaker/1")
    async with (
        served(place, store=store) as (_, client),
        client.session("speaker", session_id="old", resume=True) as session,
    ):
        near(await session.send(TOKENS[10:20]), spoken(TOKENS[:20], (1, 20))[10:])


async def test_other_weights_under_the_same_number_are_found_out(place: Path, versions: Path, tmp_path: Path):
    """A version's folder that is replaced changes no session that is on it, and takes none of the store's for its own.

    The hash that is in each state tells them apart.
    """
    store = f"sqlite:{tmp_path / 'sessions'}"
    async with served(place, store=store) as (_, client):
        await leave(client, "left", 10)
        live = Live(client, "speaker", TOKENS, 2)
        await live.go_on(5)
        shutil.rmtree(place / "speaker" / "1")
        put(versions, place, "speaker/2", speaker="1")
        assert (await client.load("speaker")).state == SERVING
        await live.go_on(5)
        got = await live.end()
        near(got, spoken(TOKENS[: len(got)], (1, len(got))))
        await client.unload("speaker", deadline=0)
        await client.load("speaker")
        async with client.session("speaker") as session:
            near(await session.send(TOKENS[:5]), spoken(TOKENS[:5], (2, 5)))
        with pytest.raises(cc.FailedPrecondition, match="its graphs' sha256 differs") as caught:
            async with client.session("speaker", session_id="left", resume=True) as session:
                await session.ready()
        assert caught.value.reason == "MODEL_DIFFERS"


def test_killed_while_sessions_move_nothing_is_lost_or_doubled(place: Path, versions: Path, tmp_path: Path):
    """Killed after they moved, sessions go on with the version that the store says; no chunk is lost or runs twice."""
    put(versions, place, "speaker/2")
    with supervised(place, "--store", f"sqlite:{tmp_path / 'sessions'}") as server:
        with (
            cc.connect(server.address, resume_timeout=60) as admin,
            cc.connect(server.address, resume_timeout=60) as client,
        ):
            admin.load("speaker", version="1")
            moving, killed = threading.Event(), threading.Event()

            def stream(number: int) -> np.ndarray:
                answers = []
                with client.session("speaker", version="1") as session:
                    for at in range(0, 240, 3):
                        answers.append(session.send(TOKENS[number + at : number + at + 3]))
                        if at == 60 + 3 * number:
                            moving.set()
                        if at == 180:
                            assert killed.wait(60)
                return np.concatenate(answers)

            with ThreadPoolExecutor(8) as threads:
                running = [threads.submit(stream, number) for number in range(8)]
                assert moving.wait(60)
                assert admin.unload("speaker", version="1", move=True, deadline=60).staying_sessions == 0
                server.kill()
                killed.set()
                got = [each.result(60) for each in running]
        assert server.deaths == 1
    for number, answers in enumerate(got):
        x = TOKENS[number : number + 240]
        at = first_change(answers, spoken(x, (1, len(x)))) // 3 * 3
        near(answers, spoken(x, (1, at), (2, len(x) - at)))
