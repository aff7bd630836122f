"""`carousel import`: files of somebody else's, with their state as inputs and outputs, served as any bundle."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.imported import counting, gated
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_protos.v1 import manifest_pb2 as pb
from carousel_server.config import ServerConfig
from carousel_server.errors import LoadError
from carousel_server.serve import serving
from carousel_server.verify import replay


class Stateful(nn.Module):
    """Time-major x [time, batch, 5] and states [layers, batch, 7], as `nn.LSTM` has them; a projection of y."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, 2)
        self.linear = nn.Linear(7, 3)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, (h0, c0))
        return self.linear(y), h, c


class Paired(nn.Module):
    """The same with a pair for the state, the batch first, and a scale that is a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor], scale: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, hx = self.lstm(x * float(scale), hx)
        return y, hx


def write_onnx(
    path: Path, model: nn.Module, example: tuple[Tensor, ...], names: dict[str, dict[int, str]], outputs: list[str]
) -> Path:
    """The file as somebody else writes it: with PyTorch's own older exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            example,
            str(path),
            dynamo=False,
            input_names=[name for name in names if name not in outputs],
            output_names=outputs,
            dynamic_axes=names,
        )
    return path


@pytest.fixture
def onnx_file(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Stateful().eval()
    example = (torch.randn(4, 2, 5), torch.zeros(2, 2, 7), torch.zeros(2, 2, 7))
    axes = {
        "x": {0: "T", 1: "N"},
        "h0": {1: "N"},
        "c0": {1: "N"},
        "y": {0: "T", 1: "N"},
        "hn": {1: "N"},
        "cn": {1: "N"},
    }
    return model, write_onnx(tmp_path / "stateful.onnx", model, example, axes, ["y", "hn", "cn"])


def script(path: Path, model: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model).save(str(path))
    return path


async def stream(models: Path, name: str, x: np.ndarray, sizes: list[int], **settings: Any) -> np.ndarray:
    """The answers to a sequence in chunks, beside a second session that shares the steps."""
    config = ServerConfig(models=models, listen="127.0.0.1:0", drain_timeout_s=0.2, **settings)
    async with serving(config) as server, cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        async with client.session(name) as session, client.session(name) as other:
            parts = []
            for part in np.split(x, np.cumsum(sizes)):
                await other.send(part[::-1].copy())
                parts.append(await session.send(part))
        return np.concatenate(parts)


@pytest.mark.system("16", "an ONNX file of somebody else's: state pairs found, the batch on any axis")
async def test_onnx_file(onnx_file: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Pairs h0 → hn and c0 → cn are found, axes put in order, any cut allowed, and the server answers as eager does."""
    model, file = onnx_file
    bundle = cx.import_model(file, name="stateful", out=tmp_path / "models")
    manifest = bundle.manifest
    assert {state.input: state.output for state in manifest.states} == {"h0": "hn", "c0": "cn"}
    assert [list(state.dims) for state in manifest.states] == [["batch", "2", "7"]] * 2
    assert list(manifest.inputs[0].dims) == ["batch", "time", "5"]
    assert list(manifest.inputs[0].eager_dims) == ["time", "batch", "5"]
    assert manifest.default_policy.kind == pb.POLICY_KIND_CAUSAL
    assert not manifest.ragged
    assert all(case.ok for case in replay(bundle.path))
    x = torch.randn(20, 5)
    with torch.no_grad():
        wanted = model(x[:, None], torch.zeros(2, 1, 7), torch.zeros(2, 1, 7))[0][:, 0]
    got = await stream(tmp_path / "models", "stateful", x.numpy(), [3, 1, 9])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.system("16", "a TorchScript file without its Python class: nested states, a plain number as a constant")
async def test_torchscript_file(tmp_path: Path) -> None:
    """The pair (h, c) is found by its structure, and torch serves it; without torch, the server says what to do."""
    torch.manual_seed(0)
    model = Paired().eval()
    file = script(tmp_path / "paired.pt", model)
    inputs = {
        "x": (torch.float32, ("batch", "time", "5")),
        "hx.0": (torch.float32, ("1", "batch", "7")),
        "hx.1": (torch.float32, ("1", "batch", "7")),
    }
    bundle = cx.import_model(file, name="paired", out=tmp_path / "models", inputs=inputs, constants={"scale": 2})
    manifest = bundle.manifest
    assert {s.input: s.output for s in manifest.states} == {"hx.0": "output_1.0", "hx.1": "output_1.1"}
    x = torch.randn(20, 5)
    with torch.no_grad():
        wanted = model(x[None], (torch.zeros(1, 1, 7), torch.zeros(1, 1, 7)), 2)[0][0]
    got = await stream(tmp_path / "models", "paired", x.numpy(), [3, 1, 9], runtime="torchscript")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert all(case.ok for case in replay(bundle.path, runtime="torchscript"))
    config = ServerConfig(models=tmp_path / "models", listen="127.0.0.1:0", drain_timeout_s=0.2)
    with pytest.raises(LoadError, match="paired has TorchScript and no ONNX; serve it with --runtime torchscript"):
        async with serving(config):
            pass


async def test_states_of_any_shape_and_dtype(tmp_path: Path) -> None:
    """States [batch, 2] and int64 [batch, 1, 2, 1] are carried, and a fixed input is a constant of the bundle."""
    bundle = cx.import_model(counting(tmp_path / "c.onnx"), name="c", out=tmp_path / "models", constants={"sr": 16000})
    assert {s.input: (s.output, s.dtype) for s in bundle.manifest.states} == {
        "s": ("next_s", pb.DATA_TYPE_FLOAT32),
        "n": ("n_out", pb.DATA_TYPE_INT64),
    }
    x = torch.randn(20, 2)
    got = await stream(tmp_path / "models", "c", x.numpy(), [3, 1, 9])
    np.testing.assert_allclose(got, x.cumsum(0) + 16000, rtol=1e-6)


@pytest.mark.system("16", "a file that takes one frame a call is repeated over time, each row to its own length")
async def test_one_frame_a_call(tmp_path: Path) -> None:
    """A file without a time axis streams chunks of any length in ragged batches, equal to calling it frame by frame."""
    bundle = cx.import_model(gated(tmp_path / "g.onnx"), name="g", out=tmp_path / "models")
    assert {s.input: s.output for s in bundle.manifest.states} == {"state": "stateN"}
    assert list(bundle.manifest.inputs[0].dims) == ["batch", "time", "4"]
    assert bundle.manifest.ragged
    x, state, wanted = torch.randn(20, 4), torch.zeros(4), []
    for frame in x:
        state = torch.tanh(frame + state / 2)
        wanted.append(state)
    got = await stream(tmp_path / "models", "g", x.numpy(), [3, 1, 9])
    np.testing.assert_allclose(got, torch.stack(wanted), rtol=0, atol=1e-6)


class Cell(nn.Module):
    """One frame [batch, 5], and states [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.cell(x, (h, c))
        return self.linear(h), h, c


@pytest.mark.system("16", "a TorchScript file that takes one frame a call, likewise")
async def test_one_frame_a_call_in_torchscript(tmp_path: Path) -> None:
    """A TorchScript file without a time axis streams chunks of any length, equal to calling it frame by frame."""
    torch.manual_seed(0)
    model = Cell().eval()
    file = script(tmp_path / "cell.pt", model)
    dims = {"x": "5", "h": "4", "c": "4"}
    bundle = cx.import_model(
        file,
        name="cell",
        out=tmp_path / "models",
        inputs={name: (torch.float32, ("batch", size)) for name, size in dims.items()},
        states={"h": "output_1", "c": "output_2"},
    )
    assert bundle.manifest.ragged
    assert bundle.manifest.default_policy.kind == pb.POLICY_KIND_CAUSAL
    assert all(case.ok for case in replay(bundle.path, runtime="torchscript"))
    x, h, c, wanted = torch.randn(20, 5), torch.zeros(1, 4), torch.zeros(1, 4), []
    with torch.no_grad():
        for frame in x:
            y, h, c = model(frame[None], h, c)
            wanted.append(y[0])
    got = await stream(tmp_path / "models", "cell", x.numpy(), [3, 1, 9], runtime="torchscript")
    np.testing.assert_allclose(got, torch.stack(wanted), rtol=0, atol=1e-6)


class Ragged(nn.Module):
    """Lengths of its own, by which padding is kept out."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 7, batch_first=True)

    def forward(self, x: Tensor, x_len: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.gru(x, h)
        last = (x_len - 1)[:, None, None].expand(-1, 1, 7)
        return y, y.gather(1, last).transpose(0, 1)


async def test_lengths_of_its_own(tmp_path: Path) -> None:
    """An input with the valid frames of each row is found by its name, fed by the server, and lets rows differ."""
    torch.manual_seed(0)
    model = Ragged().eval()
    example = (torch.randn(2, 4, 5), torch.tensor([4, 2]), torch.zeros(1, 2, 7))
    axes = {"x": {0: "N", 1: "T"}, "x_len": {0: "N"}, "h": {1: "N"}, "y": {0: "N", 1: "T"}, "h_out": {1: "N"}}
    file = write_onnx(tmp_path / "r.onnx", model, example, axes, ["y", "h_out"])
    bundle = cx.import_model(file, name="r", out=tmp_path / "models")
    assert bundle.manifest.ragged
    assert {s.input: s.output for s in bundle.manifest.states} == {"h": "h_out"}
    x = torch.randn(20, 5)
    with torch.no_grad():
        wanted = model.gru(x[None])[0][0]
    got = await stream(tmp_path / "models", "r", x.numpy(), [3, 1, 9])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


class Two(nn.Module):
    """States of which nothing says which output follows which."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, (a, b))
        return y, h, c


def test_what_is_not_clear_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two states that could be either way round are one line with the flags to give; told so, they are right."""
    caplog.set_level("INFO", "carousel_export")
    torch.manual_seed(0)
    model = Two().eval()
    file = script(tmp_path / "two.pt", model)
    inputs: dict[str, Any] = {"x": (torch.float32, ("batch", "time", "5"))}
    with pytest.raises(cx.ExampleError, match=r"two.pt does not say what 'a' is; give --input a:DTYPE:DIMS"):
        cx.import_model(file, name="two", out=tmp_path / "models", inputs=inputs)
    inputs |= dict.fromkeys("ab", (torch.float32, ("1", "batch", "7")))
    asked = re.escape("'a' [1, batch, 7]: --state a=OUT, of output_1, output_2")
    with pytest.raises(cx.ExampleError, match=asked):
        cx.import_model(file, name="two", out=tmp_path / "models", inputs=inputs)
    assert not (tmp_path / "models").exists()
    states = {"a": "output_1", "b": "output_2"}
    bundle = cx.import_model(file, name="two", out=tmp_path / "models", inputs=inputs, states=states)
    assert {s.input: s.output for s in bundle.manifest.states} == states
    assert bundle.manifest.default_policy.kind == pb.POLICY_KIND_CAUSAL
    wrong = cx.import_model(
        file, name="wrong", out=tmp_path / "models", inputs=inputs, states={"a": "output_2", "b": "output_1"}
    )
    assert wrong.manifest.default_policy.kind == pb.POLICY_KIND_FULL
    said = "wrong allows carry, full only: in blocks it answers otherwise than on the whole"
    assert said in caplog.messages


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    """A file that is no model is refused in a line, and no bundle is written."""
    for name, said in (("no.onnx", "no.onnx cannot be read as ONNX"), ("no.pt", "no.pt cannot be read as TorchScript")):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(cx.ModelError, match=said) as refused:
            cx.import_model(tmp_path / name, name="m", out=tmp_path / "models")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "models").exists()
