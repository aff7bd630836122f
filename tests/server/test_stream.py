"""Streams against eager PyTorch, over real gRPC."""

import asyncio
import json
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole
from tests.support.stream import RawStream, array, chunk_item, close_item, open_item, policy, tensor

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.config import ServerConfig
from carousel_server.serve import Server, serving

TOLERANCE = 1e-5


async def stream_whole(stream: RawStream, session_id: str, x: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Send `x` in chunks of the given sizes and return all its answers joined."""
    await stream.send(
        *(
            chunk_item(session_id, index, chunk, end=index == len(sizes) - 1)
            for index, chunk in enumerate(np.split(x, np.cumsum(sizes)[:-1]))
        )
    )
    answers = []
    for index in range(len(sizes)):
        item = await stream.receive()
        assert item is not None
        assert item.result.index == index, item
        assert item.result.first_frame == sum(map(len, answers))
        answers.append(array(item.result.tensors[0]))
    return np.concatenate(answers)


def random_sizes(rng: np.random.Generator, total: int) -> list[int]:
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        sizes.append(int(min(left, rng.integers(1, 12))))
    return sizes


@pytest.mark.parametrize(
    ("kind", "block", "ahead"),
    [("lookahead", 4, 2), ("lookahead", 1, 8), ("lookahead", 5, 0), ("carry", 0, 0), ("carry", 6, 0), ("full", 0, 0)],
)
async def test_each_policy_says_what_eager_says(channel: grpc.aio.Channel, kind: str, block: int, ahead: int):
    """Sessions of different lengths, cut at random and batched together, each get their own eager answer."""
    model, rng = make(Tagger), np.random.default_rng(3)
    async with RawStream(channel) as stream:
        for number, length in enumerate((1, 2, 9, 40, 133)):
            x = rng.standard_normal((length, 5)).astype(np.float32)
            opened = await stream.ask(open_item(f"{number}", "tagger", policy=policy(kind, block, ahead)))
            assert (opened.opened.policy.block, opened.opened.policy.ahead) == (block, ahead)
            sizes = random_sizes(rng, length)
            got = await stream_whole(stream, f"{number}", x, sizes)
            wanted = {
                "lookahead": lambda x=x: looked_ahead(model, torch.from_numpy(x), block, ahead),
                "carry": lambda x=x, sizes=sizes: carried(model, torch.from_numpy(x), block or sizes),
                "full": lambda x=x: whole(model, torch.from_numpy(x)),
            }[kind]()
            assert np.abs(got - wanted.numpy()).max() <= TOLERANCE


async def test_a_causal_model_streams_token_by_token(channel: grpc.aio.Channel):
    """A token at a time, or all at once: a causal model's answer is the offline one."""
    tokens = torch.randint(0, 11, (1200,), generator=torch.Generator().manual_seed(5))
    wanted = whole(make(Speaker), tokens).numpy()
    async with RawStream(channel) as stream:
        for session_id, sizes in (("one", [1] * 60), ("all", [1200]), ("mixed", [700, 1, 499])):
            await stream.ask(open_item(session_id, "speaker"))
            total = sum(sizes)
            got = await stream_whole(stream, session_id, tokens[:total].numpy(), sizes)
            assert np.abs(got - wanted[:total]).max() <= TOLERANCE


async def test_sessions_share_steps_and_never_each_others_state(channel: grpc.aio.Channel):
    """48 sessions on 6 streams, cut differently and interleaved, each equal their own eager run; steps are shared."""
    model = make(Tagger)

    async def one_stream(number: int) -> None:
        rng = np.random.default_rng(number)
        async with RawStream(channel) as stream:
            xs = [rng.standard_normal((int(rng.integers(30, 60)), 5)).astype(np.float32) for _ in range(8)]
            await stream.send(*(open_item(f"{number}-{row}", "tagger") for row in range(8)))
            answers: dict[str, list[np.ndarray]] = {f"{number}-{row}": [] for row in range(8)}
            at, indices = [0] * 8, [0] * 8
            while any(at[row] < len(xs[row]) for row in range(8)):
                items = []
                for row in range(8):
                    if at[row] < len(xs[row]):
                        size = int(rng.integers(1, 9))
                        chunk = xs[row][at[row] : at[row] + size]
                        at[row] += size
                        items.append(chunk_item(f"{number}-{row}", indices[row], chunk, end=at[row] >= len(xs[row])))
                        indices[row] += 1
                await stream.send(*items)
            await stream.call.done_writing()
            while (item := await stream.receive()) is not None:
                if item.HasField("result"):
                    answers[item.result.session_id].append(array(item.result.tensors[0]))
            for row, x in enumerate(xs):
                wanted = looked_ahead(model, torch.from_numpy(x), 4, 2).numpy()
                assert np.abs(np.concatenate(answers[f"{number}-{row}"]) - wanted).max() <= TOLERANCE

    await asyncio.gather(*(one_stream(number) for number in range(6)))
    statistics = (await CarouselStub(channel).GetModel(pb.GetModelRequest(model="tagger"))).statistics
    assert statistics.rows / statistics.steps > 4
    assert statistics.open_sessions == 48


async def test_bits_do_not_depend_on_batch_mates(channel: grpc.aio.Channel):
    """A session's answers are bit for bit the same alone and beside 30 others of other lengths."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((57, 5)).astype(np.float32)

    async def run(session_id: str, values: np.ndarray, stream: RawStream) -> np.ndarray:
        return await stream_whole(stream, session_id, values, [3] * (len(values) // 3))

    async with RawStream(channel) as alone:
        await alone.ask(open_item("alone", "tagger"))
        lonely = await run("alone", x, alone)

    async def crowd(number: int) -> np.ndarray:
        async with RawStream(channel) as stream:
            await stream.ask(open_item(f"crowd-{number}", "tagger"))
            values = x if number == 15 else rng.standard_normal((3 * int(rng.integers(5, 40)), 5)).astype(np.float32)
            return await run(f"crowd-{number}", values, stream)

    crowded = (await asyncio.gather(*(crowd(number) for number in range(31))))[15]
    assert lonely.tobytes() == crowded.tobytes()


async def test_a_row_that_the_model_refuses_fails_alone(models: Path, tmp_path: Path):
    """A value that only the model can refuse fails its own chunk; its batch-mates are answered, no state has moved."""
    wanted = whole(make(Speaker), torch.arange(8)).numpy()
    shutil.copytree(models / "speaker", tmp_path / "speaker")
    manifest = tmp_path / "speaker" / "1" / "manifest.json"
    parsed = json.loads(manifest.read_text())
    assert parsed["inputs"][0].pop("vocabulary") == 11  # as of a model whose look-up the exporter does not see
    manifest.write_text(json.dumps(parsed))
    config = ServerConfig(models=tmp_path, listen="127.0.0.1:0", drain_timeout_s=0)
    async with (
        serving(config) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        RawStream(channel) as stream,
    ):
        await stream.send(*(open_item(f"{row}", "speaker") for row in range(9)))
        for _ in range(9):
            assert (await stream.receive()).HasField("opened")
        await stream.send(*(chunk_item(f"{row}", 0, np.arange(4), end=False) for row in range(9)))
        for _ in range(9):
            assert (await stream.receive()).HasField("result")
        bad = np.array([4, 5, 99, 7])
        await stream.send(*(chunk_item(f"{row}", 1, bad if row == 4 else np.arange(4, 8)) for row in range(9)))
        for _ in range(9):
            item = await stream.receive()
            if item.HasField("failed"):
                assert (item.failed.session_id, item.failed.index) == ("4", 1)
                assert item.failed.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
                assert "99" in item.failed.status.message
            else:
                assert np.abs(array(item.result.tensors[0]) - wanted[4:]).max() <= TOLERANCE
        item = await stream.ask(chunk_item("4", 1, np.arange(4, 8), end=True))
        assert np.abs(array(item.result.tensors[0]) - wanted[4:]).max() <= TOLERANCE


async def test_an_unknown_token_is_refused_before_it_is_the_sessions(channel: grpc.aio.Channel):
    """Under `full`, where nothing runs before the end, a token outside the vocabulary is told at once, without harm."""
    wanted = whole(make(Speaker), torch.arange(6)).numpy()
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "speaker", policy=policy("full")))
        assert (await stream.ask(chunk_item("s", 0, np.arange(3)))).HasField("result")
        for bad in (np.array([3, 11]), np.array([-1, 3])):
            refused = await stream.ask(chunk_item("s", 1, bad))
            assert refused.failed.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert "0 to 10" in refused.failed.status.message
        answer = await stream.ask(chunk_item("s", 1, np.arange(3, 6), end=True))
        assert np.abs(array(answer.result.tensors[0]) - wanted).max() <= TOLERANCE


async def test_a_session_starts_from_a_given_state(channel: grpc.aio.Channel):
    """`initial_state` puts h and c in before the first frame, and absent ones are zero."""
    model = make(Speaker)
    rng = np.random.default_rng(2)
    h, c = (rng.standard_normal((1, 9)).astype(np.float32) for _ in range(2))
    tokens = torch.arange(10)
    for given in ({"lstm.h_0": h, "lstm.c_0": c}, {"lstm.c_0": c}):
        state = tuple(torch.from_numpy(given.get(name, np.zeros_like(h)))[:, None] for name in ("lstm.h_0", "lstm.c_0"))
        with torch.no_grad():
            wanted = model.linear(model.lstm(model.embedding(tokens[None]), state)[0])[0].numpy()
        async with RawStream(channel) as stream:
            initial = [tensor(value, name) for name, value in given.items()]
            opened = await stream.ask(open_item("", "speaker", initial_state=initial))
            got = await stream_whole(stream, opened.opened.session_id, tokens.numpy(), [4, 6])
            assert np.abs(got - wanted).max() <= TOLERANCE


async def test_a_session_outlives_its_stream(channel: grpc.aio.Channel):
    """After a broken connection `resume` goes on where the session stood, and the last answer is given again."""
    wanted = whole(make(Speaker), torch.arange(10)).numpy()
    async with RawStream(channel) as stream:
        await stream.ask(open_item("kept", "speaker"))
        first = await stream.ask(chunk_item("kept", 0, np.arange(6)))
    async with RawStream(channel) as stream:
        opened = await stream.ask(open_item("kept", "speaker", resume=True))
        assert (opened.opened.next_index, opened.opened.epoch) == (1, 2)
        again = await stream.ask(chunk_item("kept", 0, np.arange(6)))
        assert again == first
        rest = await stream.ask(chunk_item("kept", 1, np.arange(6, 10), end=True))
        assert np.abs(array(rest.result.tensors[0]) - wanted[6:]).max() <= TOLERANCE


async def test_a_newer_stream_fences_the_older(channel: grpc.aio.Channel):
    """When a second stream resumes a session the first is told ABORTED and can move it no more."""
    async with RawStream(channel) as older, RawStream(channel) as newer:
        await older.ask(open_item("shared", "speaker"))
        assert (await newer.ask(open_item("shared", "speaker", resume=True))).opened.epoch == 2
        told = await older.receive()
        assert told.failed.status.code == grpc.StatusCode.ABORTED.value[0]
        refused = await older.ask(chunk_item("shared", 0, np.arange(3)))
        assert refused.failed.status.code == grpc.StatusCode.ABORTED.value[0]
        assert (await newer.ask(chunk_item("shared", 0, np.arange(3)))).HasField("result")


async def test_closing_answers_what_was_sent_before(channel: grpc.aio.Channel):
    """Close leaves with the chunks before it; their answers come first, then Closed, and again Closed for a repeat."""
    async with RawStream(channel) as stream:
        await stream.send(open_item("s", "speaker"), chunk_item("s", 0, np.arange(3)), close_item("s"), close_item("s"))
        kinds = [(await stream.receive()).WhichOneof("item") for _ in range(3)]
        assert kinds == ["opened", "result", "closed"]
        assert (await stream.ask(close_item("s"))).HasField("closed")


async def test_half_close_ends_the_stream_after_its_answers(channel: grpc.aio.Channel):
    """A client that has finished sending gets every answer, and then the stream's end with OK."""
    async with RawStream(channel) as stream:
        await stream.send(
            open_item("s", "tagger"), *(chunk_item("s", index, np.zeros((5, 5), np.float32)) for index in range(20))
        )
        await stream.call.done_writing()
        items = []
        while (item := await stream.receive()) is not None:
            items.append(item.WhichOneof("item"))
        assert items == ["opened"] + ["result"] * 20
        assert await stream.call.code() == grpc.StatusCode.OK


async def test_cancel_in_the_middle_disturbs_nobody(channel: grpc.aio.Channel):
    """A call that is cancelled with chunks in flight leaves its neighbours' answers as they were."""
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    wanted = looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2).numpy()
    async with RawStream(channel) as stays:
        await stays.ask(open_item("stays", "tagger"))
        running = asyncio.create_task(stream_whole(stays, "stays", x, [1] * 64))
        for number in range(10):
            leaves = RawStream(channel)
            await leaves.send(
                open_item(f"leaves-{number}", "tagger"),
                *(chunk_item(f"leaves-{number}", index, x) for index in range(5)),
            )
            await leaves.receive()
            leaves.call.cancel()
        assert np.abs(await running - wanted).max() <= TOLERANCE


async def test_infer_takes_ragged_rows(channel: grpc.aio.Channel):
    """Whole sequences of different length in one request: each row is its own offline answer, and zero after it."""
    model, rng = make(Tagger), np.random.default_rng(4)
    x, lengths = rng.standard_normal((5, 20, 5)).astype(np.float32), [20, 1, 7, 13, 2]
    response = await CarouselStub(channel).Infer(
        pb.InferRequest(model="tagger", tensors=[tensor(x, "x")], lengths=lengths)
    )
    y = array(response.tensors[0])
    for row, length in enumerate(lengths):
        wanted = whole(model, torch.from_numpy(x[row, :length])).numpy()
        assert np.abs(y[row, :length] - wanted).max() <= TOLERANCE
        assert not y[row, length:].any()


async def test_a_fault_in_a_step_fails_its_rows_and_the_model_turns_on(
    channel: grpc.aio.Channel, server: Server, monkeypatch
):
    """Even a bug of the runner's own fails only the chunks it met, says nothing of its inside, and moves no state."""
    model = server.engine.catalogue.get("speaker")
    wanted = whole(make(Speaker), torch.arange(6)).numpy()
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "speaker"))
        monkeypatch.setattr(model.steps._runner, "run", lambda _: {}["a secret"])
        failed = await stream.ask(chunk_item("s", 0, np.arange(3)))
        assert failed.failed.status.code == grpc.StatusCode.INTERNAL.value[0]
        assert "secret" not in failed.failed.status.message
        monkeypatch.undo()
        answers = [await stream.ask(chunk_item("s", index, np.arange(3) + 3 * index)) for index in range(2)]
        got = np.concatenate([array(answer.result.tensors[0]) for answer in answers])
        assert np.abs(got - wanted).max() <= TOLERANCE
