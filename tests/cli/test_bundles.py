"""`carousel export`, `inspect`, `verify` and `serve`, on bundles that the command itself makes."""

import hashlib
import json
import pickle
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tests.cli.conftest import Run, one_line, usage

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=6):
        super().__init__()
        self.rnn = nn.LSTM(4, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])

def net():
    torch.manual_seed(3)
    return Net()

def with_example():
    return net(), torch.randn(3, 6, 4)

def broken():
    raise RuntimeError("first line" + chr(10) + "second line")

def number():
    return 3

value = 3
"""
INPUT = ("--input", "x:float32:batch,time,4")


@pytest.fixture
def module(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "mynet.py").write_text(MODULE)
    yield
    sys.modules.pop("mynet", None)


def test_export_verify_and_inspect(run: Run, run_here: Run, tmp_path: Path, module: None):
    """A model in the current folder is exported with a checkpoint, proved, shown, and proved again."""
    other = torch.nn.Module()
    other.rnn, other.linear = torch.nn.LSTM(4, 6, batch_first=True), torch.nn.Linear(6, 2)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    done = run("export", "mynet:net", "--name", "net", "--out", "out", "--checkpoint", "weights.pt", *INPUT)
    assert done.returncode == 0, done
    assert "out/net/1/report.html" in done.stdout
    assert "onnxruntime, max |error|" in done.stdout
    done = run("inspect", "out/net")
    assert done.returncode == 0, done
    for shown in (
        "net version 1, 302 parameters",
        "causal (default)",
        "rnn.h_0 → rnn.h_n",
        "[batch, time, 4]",
        "model.onnx",
    ):
        assert shown in done.stdout
    done = run_here("verify", "out/net/1", "--eager", "mynet:net", "--checkpoint", "weights.pt")
    assert done.returncode == 0, done
    assert "causal" in done.stdout
    assert "parity with mynet:net" in done.stdout
    # Without the checkpoint it is another model.
    done = run_here("verify", "out/net/1", "--eager", "mynet:net")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    assert "wanted" in done.stderr


def test_a_factory_may_give_the_example(run_here: Run, tmp_path: Path, module: None):
    """A factory that returns example inputs needs no --input, and a policy is taken as the default."""
    asked = ("export", "mynet:with_example", "--name", "net", "--version", "v7")
    done = run_here(*asked, "--policy", "full", env={"CAROUSEL_OUT": "out"})
    assert done.returncode == 0, done
    assert "full (default)" in run_here("inspect", "out/net/v7").stdout


def test_what_cannot_be_exported_is_said_in_a_line(run_here: Run, tmp_path: Path, module: None):
    """A wrong factory, checkpoint or input fails with a line that names it, and leaves no bundle."""
    to = ("--name", "net", "--out", "out")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    assert "cannot import nowhere: ModuleNotFoundError" in one_line(run_here("export", "nowhere:net", *to, *INPUT))
    assert "mynet has no function value" in one_line(run_here("export", "mynet:value", *to, *INPUT))
    assert "RuntimeError: first line second line" in one_line(run_here("export", "mynet:broken", *to, *INPUT))
    assert "returned a int" in one_line(run_here("export", "mynet:number", *to, *INPUT))
    asked = ("export", "mynet:net", *to)
    message = one_line(run_here(*asked, *INPUT, "--checkpoint", "evil.pt"))
    assert "evil.pt is no file of tensors alone" in message
    assert "torch.save(model.state_dict(), …)" in message
    message = one_line(run_here(*asked, "--input", "x:float32:batch,time,5"))
    assert "Net fails on inputs torch.float32 [3, 7, 5]" in message
    assert "give what it takes" in message
    message = one_line(run_here("export", "mynet:net", "--name", "net", "--out", "/proc/nope", *INPUT))
    assert "/proc/nope/net cannot be written to" in message
    assert "not MODULE:FACTORY" in usage(run_here("export", "mynet", *to))
    assert "say what the model takes with --input" in usage(run_here(*asked))
    assert "not NAME:DTYPE:DIMS" in usage(run_here(*asked, "--input", "x:float99:batch,time,4"))
    assert "Missing option '--out'" in usage(run_here("export", "mynet:net", "--name", "net"))
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*/*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: {}, "it lacks 6 of 6 tensors (rnn.weight_ih_l0); give the checkpoint of this very model"),
        (
            lambda own: {**{f"module.{name}": tensor for name, tensor in own.items()}, "scale": torch.ones(1)},
            "it lacks 6 of 6 tensors (rnn.weight_ih_l0) and it has 7 others (module.rnn.weight_ih_l0); give the",
        ),
        (
            lambda own: {**own, "linear.weight": torch.zeros(2, 7)},
            "its linear.weight is [2, 7] and the model's is [2, 6]; make the model with the sizes",
        ),
        (
            lambda own: {"epoch": 3, "state_dict": {**own, "loss.weight": torch.ones(1)}},
            "under 'state_dict' it has 1 others (loss.weight); give the checkpoint of this very model",
        ),
        (
            lambda own: {"model": own, "average": own},
            "it has tensors under 'model' and 'average'; save those that are meant, torch.save(checkpoint['model'], …)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_why(run_here: Run, tmp_path: Path, module: None, change, said: str):
    """Tensors that are lacking, foreign, of another size or one level down are named, with what to do, in one line."""
    own = torch.nn.Module()
    own.rnn, own.linear = torch.nn.LSTM(4, 6, batch_first=True), torch.nn.Linear(6, 2)
    torch.save(change(own.state_dict()), tmp_path / "other.pt")
    asked = ("export", "mynet:net", "--name", "net", "--out", "out", *INPUT, "--checkpoint", "other.pt")
    assert f"other.pt does not fit Net: {said}" in one_line(run_here(*asked))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: {"epoch": 3, "state_dict": own}, "the tensors under 'state_dict' are taken"),
        (
            lambda own: {f"module.{name}": tensor for name, tensor in own.items()},
            "its tensors are taken, without 'module.' before their names",
        ),
        (
            lambda own: {"state_dict": {f"model.{name}": tensor for name, tensor in own.items()}, "lr": {"rate": 0.1}},
            "the tensors under 'state_dict' are taken, without 'model.' before their names",
        ),
    ],
)
def test_a_trainers_checkpoint_is_unwrapped(
    run_here: Run, tmp_path: Path, module: None, caplog: pytest.LogCaptureFixture, change, said: str
):
    """Tensors that a trainer keeps one level down or under a prefix are loaded, which a line says, and are proven."""
    torch.manual_seed(9)
    own = torch.nn.Module()
    own.rnn, own.linear = torch.nn.LSTM(4, 6, batch_first=True), torch.nn.Linear(6, 2)
    torch.save(own.state_dict(), tmp_path / "plain.pt")
    torch.save(change(own.state_dict()), tmp_path / "wrapped.pt")
    done = run_here("export", "mynet:net", "--name", "net", "--out", "out", *INPUT, "--checkpoint", "wrapped.pt")
    assert done.returncode == 0, done
    assert f"wrapped.pt: {said}" in caplog.messages
    done = run_here("verify", "out/net/1", "--eager", "mynet:net", "--checkpoint", "plain.pt")
    assert done.returncode == 0, done


def test_a_file_of_anything_is_no_checkpoint(run_here: Run, tmp_path: Path, module: None):
    """A file that torch cannot make sense of at all is one line too."""
    (tmp_path / "junk.pt").write_bytes(b"hello")
    asked = ("export", "mynet:net", "--name", "net", "--out", "out", *INPUT, "--checkpoint", "junk.pt")
    assert "junk.pt cannot be read as a checkpoint" in one_line(run_here(*asked))
    assert not (tmp_path / "out").exists()


def test_a_pickled_model_is_no_checkpoint(run_here: Run, tmp_path: Path, module: None):
    """A whole pickled model is refused, with the way to save its weights, and without torch's way to trust it."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    asked = ("export", "mynet:net", "--name", "net", "--out", "out", *INPUT, "--checkpoint", "whole.pt")
    message = one_line(run_here(*asked))
    assert "whole.pt is no file of tensors alone" in message
    assert "save the weights with torch.save(model.state_dict(), …)" in message
    assert "trust" not in message


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.fixture
def bundle(models: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(models / "tagger" / "1", tmp_path / "tagger" / "1"))


def test_a_changed_file_is_found_out(run: Run, bundle: Path):
    """A file that is not what was exported is refused by `inspect` and `verify`."""
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    for command in ("inspect", "verify"):
        assert "its sha256 differs" in one_line(run(command, bundle))
    assert "no bundle at" in one_line(run("inspect", bundle.parent.parent))


def test_verify_fails_over_tolerance(run: Run, bundle: Path):
    """A host that answers otherwise than eager PyTorch did fails, and the output, policy and figure are named."""
    path = bundle / "golden.safetensors"
    with safe_open(path, "numpy") as golden:
        metadata = golden.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("full") and "/out/" in name)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] += 0.125
    save_file(tensors, path, metadata)
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = next(file for file in manifest["files"] if file["path"] == path.name)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = run("verify", bundle)
    assert done.returncode == 1
    assert "OVER" in done.stdout
    assert done.stderr.startswith("Error: output output under full in float32 is off by 1.25e-01")
    assert done.stderr.count("\n") == 1


def test_serve_says_what_is_wrong(run: Run, models: Path):
    """A setting that cannot work is a usage error; a port in use fails with a line."""
    assert "Missing option '--models'" in usage(run("serve"))
    assert "does not exist" in usage(run("serve", "--models", "nowhere"))
    assert "must be HOST:PORT" in usage(run("serve", "--models", models, "--listen", "8001"))
    assert "max_batch is 0" in usage(run("serve", "--models", models, env={"CAROUSEL_MAX_BATCH": "0"}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = one_line(run("serve", "--models", models, "--listen", address))
        assert f"cannot listen on {address}" in message
        assert "give another --listen HOST:PORT" in message
