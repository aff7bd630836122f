"""Flags, environment and config file; the address that the command cannot reach shows which one was taken."""

import os
from pathlib import Path

import pytest
from tests.cli.conftest import Run, one_line, usage


def test_a_flag_goes_before_the_environment_and_that_before_the_file(run: Run, tmp_path: Path):
    """The value is the flag's, without it the environment's, without that the file's, and else the default."""
    (tmp_path / "carousel.toml").write_text('[stream]\ntarget = "127.0.0.1:3"\nchunk = 5\n')
    config = ("--config", "carousel.toml")
    env = {"CAROUSEL_TARGET": "127.0.0.1:2"}
    assert "127.0.0.1:3 " in one_line(run(*config, "stream", "m", "x.npy"))
    assert "127.0.0.1:3 " in one_line(run("stream", "m", "x.npy", env={"CAROUSEL_CONFIG": "carousel.toml"}))
    assert "127.0.0.1:2 " in one_line(run(*config, "stream", "m", "x.npy", env=env))
    assert "127.0.0.1:1 " in one_line(run(*config, "stream", "m", "x.npy", "--target", "127.0.0.1:1", env=env))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[streem]\ntarget = "x:1"\n', "unknown table [streem]; did you mean stream?"),
        ('[stream]\ntargt = "x:1"\n', "unknown key targt in [stream]; did you mean target?"),
        ("[serve]\nmax_batch = 1\n", "unknown key max_batch in [serve]; did you mean max-batch?"),
        ("[verify]\nzzz = 1\n", "unknown key zzz in [verify]; there are checkpoint, device, eager"),
        ('stream = "x"\n', "stream must be a table"),
        ("[serve]\nmax-batch = [1]\n", "max-batch in [serve] is [1]; it must be a string or a number"),
        ("[serve]\nmax-batch = true\n", "max-batch in [serve] is True; it must be a string or a number"),
        ("[stream]\nlabels = 1\n", "labels in [stream] is 1; it must be true or false"),
        ('[export]\ninput = "x"\n', "input in [export] is 'x'; it must be a list of strings"),
        ("[stream\n", "cannot be read as TOML"),
    ],
)
def test_a_config_file_with_something_unknown_is_refused(run: Run, tmp_path: Path, text: str, message: str):
    """A table, key or value that no subcommand has is a usage error that names it, and the nearest that there is."""
    (tmp_path / "carousel.toml").write_text(text)
    assert message in usage(run("--config", "carousel.toml", "inspect", "."))


def test_malformed_values_are_usage_errors(run: Run, tmp_path: Path):
    """A value that an option does not take is a usage error wherever it came from, and names the option."""
    (tmp_path / "carousel.toml").write_text('[stream]\nchunk = "many"\n')
    assert "Invalid value for '--chunk'" in usage(run("stream", "m", "x.npy", env={"CAROUSEL_CHUNK": "many"}))
    assert "Invalid value for '--chunk'" in usage(run("stream", "m", "x.npy", "--chunk", "0"))
    assert "Invalid value for '--chunk'" in usage(run("--config", "carousel.toml", "stream", "m", "x.npy"))
    assert "Invalid value for '--config'" in usage(run("inspect", ".", env={"CAROUSEL_CONFIG": "nowhere.toml"}))


def test_help_lists_every_command(run: Run):
    """`carousel --help` lists the commands."""
    done = run("--help")
    assert done.returncode == 0
    for command in ("export", "import", "inspect", "verify", "serve", "stream", "token", "tune"):
        assert f"  {command} " in done.stdout


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of an installation without extras: what only they provide cannot be imported."""
    absent = (
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "safetensors",
        "jinja2",
        "uvloop",
        "grpc_health",
        "grpc_reflection",
    )
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(f"""
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
""")
    # Before what is there: the code under test may be on the path that way.
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "bare"), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_missing_extra_is_named(run: Run, bare: dict[str, str], models: Path):
    """On a bare installation a command that needs an extra says so in one line; `inspect` and help need none."""
    bundle = models / "tagger" / "1"
    asked = ("export", "m:f", "--name", "n", "--out", "out")
    assert "pip install '.[export]'" in one_line(run(*asked, env=bare))
    assert "pip install '.[server]'" in one_line(run("serve", "--models", models, env=bare))
    assert "pip install '.[server]'" in one_line(run("verify", bundle, env=bare))
    assert run("inspect", bundle, env=bare).returncode == 0
    assert run("--help", env=bare).returncode == 0
    assert "127.0.0.1:1 " in one_line(run("stream", "m", "x.npy", "--target", "127.0.0.1:1", env=bare))
