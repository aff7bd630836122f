"""The size that the project promises: 128 sessions of a two-layer bidirectional LSTM 512→256 at once."""

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tests.support.models import Tagger, looked_ahead, make
from tests.support.stream import RawStream, array, chunk_item, open_item, policy

import carousel_export as cx
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.config import ServerConfig
from carousel_server.serve import serving

SESSIONS, FRAMES, CHUNK = 128, 30, 10


@pytest.mark.timeout(240)
async def test_128_bidirectional_sessions_share_steps_and_equal_their_own_eager_runs(tmp_path: Path):
    """128 concurrent streams, more than 8 rows a step on average, each answer within 1e-5 of its own eager run."""
    model = make(Tagger, features=512, hidden=256, classes=32)
    cx.export(model.eval(), torch.randn(3, 6, 512), name="large", out=tmp_path)
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((SESSIONS, FRAMES, 512)).astype(np.float32)
    config = ServerConfig(models=tmp_path, listen="127.0.0.1:0", drain_timeout_s=0)
    async with serving(config) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:

        async def run(number: int) -> np.ndarray:
            async with RawStream(channel) as stream:
                await stream.ask(open_item(f"{number}", "large", policy=policy("lookahead", 8, 4)))
                answers = []
                for index in range(FRAMES // CHUNK):
                    frames = xs[number, index * CHUNK : (index + 1) * CHUNK]
                    last = (index + 1) * CHUNK == FRAMES
                    item = await stream.ask(chunk_item(f"{number}", index, frames, end=last))
                    answers.append(array(item.result.tensors[0]))
                return np.concatenate(answers)

        got = await asyncio.gather(*(run(number) for number in range(SESSIONS)))
        statistics = (await CarouselStub(channel).GetModel(pb.GetModelRequest(model="large"))).statistics
    for number in range(SESSIONS):
        wanted = looked_ahead(model, torch.from_numpy(xs[number]), 8, 4).numpy()
        assert np.abs(got[number] - wanted).max() <= 1e-5
    assert statistics.rows / statistics.steps > 8
