"""Models whose convolutions or pooling have a stride in time, or need several frames: whole sequences, under full."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.client.process import serving
from tests.support.served import assert_near
from tests.support.shared import make_once
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_cli.commands.inspect import command as inspect
from carousel_protos import Bundle
from carousel_protos.v1 import manifest_pb2 as pb
from carousel_server.verify import replay


class Listener(nn.Module):
    """`[batch, time, 5]` → `[batch, frames, 3]`: a layer over time, a bidirectional LSTM, a linear layer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(self.layers(x.mT).mT)[0])


class Reader(nn.Module):
    """CRNN: an image of text, `[batch, time, 5]`, → time-major log-probabilities `[frames, batch, 6]` and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.MaxPool2d((3, 2))
        self.lstm = nn.LSTM(4, 7)
        self.linear = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.pool(self.conv(x.unsqueeze(1)).relu())
        y, (h, _) = self.lstm(seen.permute(2, 0, 1, 3).flatten(2))
        return self.linear(y).log_softmax(2), h[-1]


class Spread(nn.Module):
    """`[batch, time, 5]` → `[batch, 2]`: the deviation of an LSTM's answers over time, which one frame has not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].std(dim=1)


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    return {
        "strided": lambda: Listener(nn.Conv1d(5, 5, 3, stride=2, padding=1), nn.ReLU()),
        "pooled": lambda: Listener(nn.Conv1d(5, 5, 3, padding=1), nn.MaxPool1d(2), nn.Conv1d(5, 5, 2, stride=3)),
        "valid": lambda: Listener(nn.Conv1d(5, 5, 4)),
        "reader": Reader,
        "reflected": lambda: Listener(nn.ReflectionPad1d(2), nn.Conv1d(5, 5, 5)),
        "normed": lambda: Listener(nn.InstanceNorm1d(5)),
        "spread": Spread,
        "pooled alike": lambda: Listener(nn.MaxPool1d(3, stride=1, padding=1)),
    }[name]().eval()


# The modules that the note names, the extent as (stride, offset), and the least frames.
REDUCED = {
    "strided": (["layers.0 (Conv1d)"], (2, 1), 1),
    "pooled": (["layers.1 (MaxPool1d)", "layers.2 (Conv1d)"], (6, 2), 4),
    "valid": (["layers.0 (Conv1d)"], (1, -3), 4),
    "reader": (["pool (MaxPool2d)"], (3, 0), 3),
}
SHORT = {"reflected": ("layers.0 (ReflectionPad1d)", 3), "normed": ("layers.0 (InstanceNorm1d)", 2), "spread": ("", 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def export(folder: Path) -> None:
        for name in (*REDUCED, *SHORT):
            outputs = ["log_probabilities", "score"] if name == "reader" else ["y"]
            cx.export(make(name), torch.randn(2, 14, 5), name=name, out=folder, output_names=outputs)

    return make_once(tmp_path_factory, "reduced", export)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[cc.Client]:
    with serving(folder) as server, cc.connect(server.address) as connected:
        yield connected


def alone(name: str, row: Tensor) -> Tensor:
    """What eager PyTorch answers a sequence, without the batch."""
    with torch.no_grad():
        y = make(name)(row[None])
    return y[0][:, 0] if name == "reader" else y[0]


@pytest.mark.system("14", "a stride in time (CRNN): whole sequences, the layer named, an output with a time of its own")
@pytest.mark.parametrize("name", REDUCED)
def test_a_stride_in_time(client: cc.Client, name: str) -> None:
    """Under full, sessions of any length and rows of any batch get eager's answer, whose size the manifest says."""
    manifest = client.model(name).manifest
    modules, (stride, offset), least = REDUCED[name]
    assert [policy.kind for policy in manifest.policies] == [pb.POLICY_KIND_FULL]
    assert not manifest.ragged
    assert all(module in manifest.notes[0] for module in modules)
    assert [(e.name, e.stride, e.offset) for e in manifest.extents] == [("time_out", stride, offset)]
    assert list(manifest.outputs[0].dims)[:2] == ["batch", "time_out"]
    assert max(1, manifest.least_frames) == least

    rows = [torch.randn(length, 5) for length in (least, least + 1, 16, 23, 23)]
    for row, answers in zip(rows, _sessions(client, name, rows), strict=True):
        assert all(answer is None for answer in answers[:-1])
        assert_near(answers[-1], alone(name, row))

    lengths = [len(row) for row in rows]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=9.0)
    batch = _first(client.infer(name, padded.numpy(), lengths=lengths))
    batch = batch.swapaxes(0, 1) if name == "reader" else batch
    for row, got in zip(rows, batch, strict=True):
        entries = (len(row) + offset) // stride
        assert_near(got[:entries], alone(name, row))
        assert not got[entries:].any()
    whole = torch.randn(3, 17, 5)
    with torch.no_grad():
        assert_near(_first(client.infer(name, whole.numpy())), _first(make(name)(whole)))


@pytest.mark.system("14", "models that need several frames: the least is found, and fewer are refused")
@pytest.mark.parametrize("name", SHORT)
def test_short_sequences_are_refused(client: cc.Client, name: str) -> None:
    """From the least frames on eager's answer comes; with fewer, a line says the least, and the session goes on."""
    manifest = client.model(name).manifest
    module, least = SHORT[name]
    assert manifest.least_frames == least
    assert f"{module or 'the code of Spread.forward'} needs at least {least} frames" in manifest.notes
    assert [policy.kind for policy in manifest.policies] == [pb.POLICY_KIND_FULL]
    rows = [torch.randn(length, 5) for length in (least, least + 1, 19)]
    for row, answers in zip(rows, _sessions(client, name, rows), strict=True):
        assert_near(answers[-1], alone(name, row))
    short = torch.randn(2, 6, 5).numpy()
    with pytest.raises(cc.InvalidArgument, match=f"row 1 has {least - 1} frames.* at least {least}"):
        client.infer(name, short, lengths=[6, least - 1])
    with client.session(name) as session:
        if least > 2:
            session.send(rows[0][:1].numpy())
        with pytest.raises(cc.InvalidArgument, match=f"after {least - 1} frames.* at least {least}"):
            session.send(rows[0][1 if least > 2 else 0 : least - 1].numpy(), end=True)
        rest = rows[-1] if least == 2 else torch.cat([rows[0][:1], rows[-1]])
        assert_near(session.send(rows[-1].numpy(), end=True), alone(name, rest))


@pytest.mark.parametrize("name", ["pooled", "reader", "reflected"])
def test_verified_and_shown(folder: Path, name: str) -> None:
    """The gate ran from the least frames on, the bundle verifies again with and without eager, and inspect says why."""
    path = folder / name / "1"
    least = REDUCED[name][2] if name in REDUCED else SHORT[name][1]
    proof = json.loads((path / "parity.json").read_text())
    assert any(f"one sequence of {least} frames, the least" in check["what"] for check in proof["checks"])
    assert cx.parity(Bundle.open(path), make(name))["share"] <= 1
    assert all(replayed.ok for replayed in replay(path))
    shown = CliRunner().invoke(inspect, [str(path)], catch_exceptions=False).output
    assert f"a sequence has at least {least} frames" in shown
    for module in REDUCED[name][0] if name in REDUCED else [SHORT[name][0]]:
        assert module in shown
    if name == "pooled":
        assert "time_out is (time + 2) / 6" in shown


def test_pooling_that_keeps_time(tmp_path: Path) -> None:
    """Pooling for the largest with a stride of one keeps time, so that its output has a value for each frame."""
    manifest = cx.export(make("pooled alike"), torch.randn(2, 14, 5), name="pooled", out=tmp_path).manifest
    assert list(manifest.outputs[0].dims) == ["batch", "time", "3"]
    assert manifest.notes[0].startswith("layers.0 (MaxPool1d) mixes frames")


def _sessions(client: cc.Client, name: str, rows: list[Tensor]) -> list[list[np.ndarray]]:
    """Each row's answers from sessions that run at once, in chunks of 3 frames."""

    def stream(row: Tensor) -> list[np.ndarray]:
        with client.session(name) as session:
            return [_first(answer) for answer in session.stream([chunk.numpy() for chunk in torch.split(row, 3)])]

    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(stream, rows))


def _first(answer: Any) -> Any:
    """The first output of a model with several, or the only one."""
    if isinstance(answer, dict):
        return answer["log_probabilities"]
    return answer[0] if isinstance(answer, tuple) else answer
