"""Starting, loading, health, reflection, draining."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.support.stream import RawStream, chunk_item, close_item, open_item, reason, rpc_status, tensor

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.config import ServerConfig
from carousel_server.errors import ConfigError, LoadError
from carousel_server.serve import SERVICE, Server, serving

GOOD = np.zeros((3, 5), np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_is_known_for_the_server_and_each_model(channel: grpc.aio.Channel):
    """The standard health service answers for the whole, for the API, and by model name."""
    for service in ("", SERVICE, "tagger", "speaker"):
        assert await health(channel, service) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(channel, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(channel: grpc.aio.Channel):
    """A stock tool finds the API without .proto files."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        break


async def test_the_catalogue_lists_loads_and_unloads(channel: grpc.aio.Channel, models: Path):
    """Models are listed with their state; one that is unloaded is NOT_FOUND until it is loaded again."""
    stub = CarouselStub(channel)
    listed = {model.name: model.state for model in (await stub.ListModels(pb.ListModelsRequest())).models}
    assert listed == {"tagger": pb.MODEL_STATE_SERVING, "speaker": pb.MODEL_STATE_SERVING}
    got = await stub.GetModel(pb.GetModelRequest(model="speaker"))
    assert (got.status.version, got.manifest.inputs[0].name) == ("1", "tokens")

    await stub.UnloadModel(pb.UnloadModelRequest(model="speaker"))
    assert await health(channel, "speaker") == NOT_SERVING
    async with RawStream(channel) as stream:
        item = await stream.ask(open_item("s", "speaker"))
        assert reason(item.failed.status) == "MODEL_NOT_FOUND"
        assert "not loaded" in item.failed.status.message
        loaded = await stub.LoadModel(pb.LoadModelRequest(model="speaker"))
        assert loaded.status.state == pb.MODEL_STATE_SERVING
        assert (await stream.ask(open_item("s", "speaker"))).HasField("opened")
        (retiring,) = (await stub.UnloadModel(pb.UnloadModelRequest(model="speaker"))).models
        assert (retiring.state, retiring.open_sessions) == (pb.MODEL_STATE_RETIRING, 1)


@pytest.mark.parametrize("name", ["../models", "/etc", ".", "tagger/1"])
async def test_a_model_name_is_no_path(channel: grpc.aio.Channel, name: str):
    """A name that would leave the models folder is just unknown."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await CarouselStub(channel).LoadModel(pb.LoadModelRequest(model=name))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def break_weights(bundle: Path) -> None:
    onnx = bundle / "model.onnx"
    onnx.write_bytes(onnx.read_bytes()[:-1] + b"!")


def rewrite_golden(bundle: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Other golden vectors, in a bundle whose checksums are right."""
    path, manifest = bundle / "golden.safetensors", bundle / "manifest.json"
    with safe_open(path, framework="numpy") as golden:
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118
        metadata = golden.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    parsed = json.loads(manifest.read_text())
    entry = next(file for file in parsed["files"] if file["path"] == path.name)
    entry["sha256"] = sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(parsed))


def break_answers(bundle: Path) -> None:
    """Golden vectors that the graphs do not meet."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        changed = next(key for key in tensors if "/out/" in key)
        tensors[changed] = tensors[changed] + np.float32(1e-3)

    rewrite_golden(bundle, change)


def lose_an_answer(bundle: Path) -> None:
    """Golden vectors without the last sequence's output."""
    rewrite_golden(bundle, lambda tensors: tensors.pop(max(key for key in tensors if "/out/" in key)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_weights, "sha256"),
        (break_answers, "off the eager model's answers"),
        (lose_an_answer, "golden.safetensors of speaker lacks output 'output' of full/3; export the model again"),
    ],
)
async def test_a_damaged_model_is_not_served_and_stops_no_other(models: Path, tmp_path: Path, damage, said: str):
    """A bundle with a wrong checksum, or whose golden vectors are not met or not whole, fails alone and says why."""
    shutil.copytree(models, tmp_path / "models")
    damage(tmp_path / "models" / "speaker" / "1")
    config = ServerConfig(models=tmp_path / "models", listen="127.0.0.1:0", drain_timeout_s=0)
    async with serving(config) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        status = (await CarouselStub(channel).GetModel(pb.GetModelRequest(model="speaker"))).status
        assert status.state == pb.MODEL_STATE_FAILED
        assert said in status.reason
        assert await health(channel, "speaker") == NOT_SERVING
        assert await health(channel, "tagger") == SERVING
        async with RawStream(channel) as stream:
            assert (await stream.ask(open_item("s", "tagger"))).HasField("opened")


async def test_a_new_version_serves_new_sessions(models: Path, tmp_path: Path):
    """Once loaded, a newer version takes the sessions that name none; older ones stay where they are."""
    shutil.copytree(models, tmp_path / "models")
    config = ServerConfig(models=tmp_path / "models", listen="127.0.0.1:0", drain_timeout_s=0)
    async with serving(config) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:  # noqa: SIM117
        async with RawStream(channel) as stream:
            assert (await stream.ask(open_item("old", "tagger"))).opened.version == "1"
            shutil.copytree(models / "tagger" / "1", tmp_path / "models" / "tagger" / "10")
            loaded = await CarouselStub(channel).LoadModel(pb.LoadModelRequest(model="tagger"))
            assert loaded.status.version == "10"
            assert (await stream.ask(open_item("new", "tagger"))).opened.version == "10"
            assert (await stream.ask(open_item("named", "tagger", version="1"))).opened.version == "1"
            assert (await stream.ask(chunk_item("old", 0, GOOD))).HasField("result")


async def test_drain_lets_live_streams_finish(config: ServerConfig):
    """On stop: health turns, streams are told, new sessions are refused, and a live session ends in its own time."""
    server = Server(replace(config, drain_timeout_s=20))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel, RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        stopping = asyncio.create_task(server.stop())
        told = await stream.receive()
        assert told.HasField("going_away")
        assert await health(channel, "tagger") == NOT_SERVING
        refused = await stream.ask(open_item("late", "tagger"))
        assert reason(refused.failed.status) == "DRAINING"
        for index in range(5):
            answer = await stream.ask(chunk_item("s", index, GOOD, end=index == 4))
            assert answer.result.index == index
        assert not stopping.done()
        assert (await stream.ask(close_item("s"))).HasField("closed")
        await asyncio.wait_for(stopping, 5)


async def test_drain_has_a_deadline(config: ServerConfig):
    """A session that never ends delays the stop by the drain time and no more."""
    server = Server(config)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel, RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        await asyncio.wait_for(server.stop(), 5)


def test_sigterm_drains_a_real_process(models: Path):
    """A server process says where it listens, ends by itself after SIGTERM with code 0, and leaves no traceback."""
    program = (
        "import logging, sys, pathlib; logging.basicConfig(level=20);"
        "from carousel_server import config, serve;"
        "serve.run(config.ServerConfig(models=pathlib.Path(sys.argv[1]), listen='127.0.0.1:0', drain_timeout_s=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(models)], stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stderr.readline()]
        while "serving tagger" not in lines[-1] and lines[-1]:
            lines.append(process.stderr.readline())
        assert any("listening on 127.0.0.1:" in line for line in lines), lines
        os.kill(process.pid, signal.SIGTERM)
        rest = process.communicate(timeout=20)[1]
        assert process.returncode == 0, rest
        assert "stopped" in rest
        assert "Traceback" not in rest
    finally:
        process.kill()


def test_the_server_imports_no_torch():
    """A serving host needs no torch: nothing that the server imports brings it in."""
    program = "import sys, carousel_server.serve, carousel_server.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"listen": "8001"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"models": Path("/nowhere")}, "no model folder"),
        ({"device": "tpu"}, "'cpu' or 'cuda'"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"threads": -1}, "threads"),
    ],
)
def test_settings_that_cannot_work_are_refused(models: Path, settings: dict[str, object], said: str):
    """A bad setting is one clear line before anything starts."""
    with pytest.raises(ConfigError, match=said):
        ServerConfig(**{"models": models, **settings})


async def test_a_port_in_use_is_told(config: ServerConfig, server: Server):
    """A second server on the same port is refused with the address in the message."""
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        await Server(replace(config, listen=f"127.0.0.1:{server.port}")).start()


async def test_cuda_where_there_is_none_is_told(config: ServerConfig):
    """`--device cuda` on a host without it serves nothing silently on the CPU: the start fails and says why."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    with pytest.raises(LoadError, match="onnxruntime-gpu"):
        await Server(replace(config, device="cuda")).start()


async def test_an_empty_folder_is_served_and_is_not_healthy(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """With nothing to serve the server waits for LoadModel, says what it misses, and reports NOT_SERVING."""
    config = ServerConfig(models=tmp_path, listen="127.0.0.1:0", drain_timeout_s=0)
    async with serving(config) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await health(channel, "") == NOT_SERVING
        assert "no bundle under" in caplog.text


async def test_health_follows_loading_and_unloading(channel: grpc.aio.Channel):
    """With its last model unloaded the server as a whole is NOT_SERVING, and SERVING again once one is loaded."""
    stub = CarouselStub(channel)
    for name in ("tagger", "speaker"):
        await stub.UnloadModel(pb.UnloadModelRequest(model=name))
    assert await health(channel, "") == NOT_SERVING
    await stub.LoadModel(pb.LoadModelRequest(model="tagger"))
    assert await health(channel, "") == SERVING


async def test_unloading_answers_the_requests_that_wait(channel: grpc.aio.Channel, server: Server, monkeypatch):
    """An Infer that runs while its model is unloaded is answered, and the next one is told that it is not loaded."""
    runner = server.engine.catalogue.get("tagger").steps._runner
    run = runner.run

    def slowly(step):
        time.sleep(0.3)
        return run(step)

    monkeypatch.setattr(runner, "run", slowly)
    stub = CarouselStub(channel)
    request = pb.InferRequest(model="tagger", tensors=[tensor(GOOD[None], "x")])
    waiting = [stub.Infer(request) for _ in range(3)]
    await asyncio.sleep(0.1)
    await stub.UnloadModel(pb.UnloadModelRequest(model="tagger"))
    for call in waiting:
        assert len((await call).tensors) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(request)
    assert reason(rpc_status(caught.value)) == "MODEL_NOT_FOUND"


async def test_drain_answers_requests_that_run_and_refuses_new_ones(config: ServerConfig, monkeypatch):
    """An Infer under way at the stop is answered; a new one, and a load, are UNAVAILABLE; a late stream is told."""
    server = Server(replace(config, drain_timeout_s=20))
    await server.start()
    runner = server.engine.catalogue.get("tagger").steps._runner
    run = runner.run

    def slowly(step):
        time.sleep(1.5)
        return run(step)

    monkeypatch.setattr(runner, "run", slowly)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = CarouselStub(channel)
        request = pb.InferRequest(model="tagger", tensors=[tensor(GOOD[None], "x")])
        running = asyncio.ensure_future(stub.Infer(request))
        await asyncio.sleep(0.3)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.1)
        for refused in (stub.Infer(request), stub.LoadModel(pb.LoadModelRequest(model="tagger"))):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert reason(rpc_status(caught.value)) == "DRAINING"
        async with RawStream(channel) as late:
            assert (await late.receive()).HasField("going_away")
        assert len((await running).tensors) == 1
        await asyncio.wait_for(stopping, 10)


async def test_what_is_served_needs_its_folder_no_more(models: Path, tmp_path: Path):
    """With the models folder gone for a moment, loaded models are opened and listed as before."""
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    config = ServerConfig(models=folder, listen="127.0.0.1:0", drain_timeout_s=0)
    async with serving(config) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:  # noqa: SIM117
        async with RawStream(channel) as stream:
            folder.rename(tmp_path / "away")
            assert (await stream.ask(open_item("s", "tagger"))).HasField("opened")
            assert len((await CarouselStub(channel).ListModels(pb.ListModelsRequest())).models) == 2
