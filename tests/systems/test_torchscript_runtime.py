"""The same server on a bundle's TorchScript."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole

import carousel_client as cc
from carousel_protos import Bundle, newest_version
from carousel_server.config import ServerConfig
from carousel_server.engine.runtime import RunError, load_runtimes
from carousel_server.serve import Server

RUNTIMES = [
    pytest.param(runtime, marks=pytest.mark.settings(runtime=runtime)) for runtime in ("onnxruntime", "torchscript")
]


def cut(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Chunks of these sizes, as many as the sequence has."""
    ends = np.cumsum(sizes)
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True) if end - size < len(x)]


async def streamed(
    client: cc.aio.Client, model: str, x: torch.Tensor, sizes: list[int], policy: cc.Policy
) -> np.ndarray:
    """The whole answer to a sequence that was sent in chunks of these sizes."""

    async def chunks():
        for part in cut(x, sizes):
            yield part.numpy()

    async with client.session(model, policy=policy) as session:
        return np.concatenate([y async for y in session.stream(chunks())])


@pytest.mark.system("17", "TorchScript served: the same engine, the same answers")
@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_both_runtimes_answer_as_eager_does(server: Server, runtime: str) -> None:
    """Under each policy, sessions that share steps are answered as eager PyTorch answers them, in either runtime."""
    torch.manual_seed(3)
    tagger, speaker = make(Tagger), make(Speaker)
    x, tokens = torch.randn(21, 5), torch.randint(0, 11, (21,))
    sizes = [3, 1, 9, 8]
    wanted = [
        ("tagger", x, cc.Lookahead(4, 2), looked_ahead(tagger, x, 4, 2)),
        ("tagger", x, cc.Carry(None), carried(tagger, x, sizes)),
        ("tagger", x, cc.Full(), whole(tagger, x)),
        ("tagger", x[:7], cc.Lookahead(4, 2), looked_ahead(tagger, x[:7], 4, 2)),
        ("speaker", tokens, cc.Causal(), whole(speaker, tokens)),
        ("speaker", tokens[:5], cc.Causal(), whole(speaker, tokens[:5])),
    ]
    async with cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        streams = [streamed(client, name, part, sizes, policy) for name, part, policy, _ in wanted]
        got = await asyncio.gather(*streams)
        batch = await client.infer("tagger", torch.stack([x, x.flip(0)]).numpy(), lengths=[21, 6])
    for (_, _, _, answer), found in zip(wanted, got, strict=True):
        np.testing.assert_allclose(found, answer, rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch[0], whole(tagger, x), rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch[1, :6], whole(tagger, x.flip(0)[:6]), rtol=0, atol=1e-5)


def test_values_that_the_model_refuses_are_told_from_faults(models: Path) -> None:
    """An id beyond the embedding is the input's fault, in torch's own words; a tensor of another dtype is not."""
    bundle = Bundle.open(newest_version(models / "speaker"))
    runtime = load_runtimes(bundle, device="cpu", threads=1, kind="torchscript")["model.onnx"]
    states = {name: np.zeros((1, 1, 9), np.float32) for name in ("lstm.h_0", "lstm.c_0")}
    feeds = {"tokens": np.array([[4, 99]]), "lengths": np.array([2], np.int32), **states}
    with pytest.raises(RunError, match="index out of range") as refused:
        runtime.run(feeds)
    assert refused.value.rejected
    with pytest.raises(RunError) as failed:
        runtime.run({**feeds, "tokens": np.zeros((1, 2), np.float32)})
    assert not failed.value.rejected
    assert "\n" not in str(failed.value)


LOADED = """
import asyncio, sys
from pathlib import Path
from carousel_server.config import ServerConfig
from carousel_server.serve import serving

async def main():
    async with serving(ServerConfig(models=Path(sys.argv[1]), listen="127.0.0.1:0", runtime=sys.argv[2])) as server:
        served = [entry.model is not None for entry in server.engine.catalogue.entries()]
    print(all(served), "torch" in sys.modules, "onnxruntime" in sys.modules)

asyncio.run(main())
"""


@pytest.mark.parametrize(("runtime", "said"), [("onnxruntime", "True False True"), ("torchscript", "True True False")])
def test_only_the_chosen_library_is_imported(models: Path, runtime: str, said: str) -> None:
    """A server that serves has imported its runtime's library, and not the other's: torch never by default."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(models), runtime], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[0] == said


def test_missing_torch_is_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch, the server is refused before it starts, with the line that installs it."""
    from carousel_server import config
    from carousel_server.errors import ConfigError

    monkeypatch.setattr(config, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--runtime torchscript needs torch: .*pip install '\.\[export\]'"):
        ServerConfig(models=models, runtime="torchscript")
