"""`carousel models` against real servers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.cli.conftest import Run, one_line, usage
from tests.client.process import serving

import carousel_client as cc

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])


@pytest.fixture
def own_models(models: Path, tmp_path: Path) -> Path:
    """`speaker` in versions 1 and 2, of the same weights, and `tagger`."""
    shutil.copytree(models, tmp_path / "models")
    shutil.copytree(models / "speaker" / "1", tmp_path / "models" / "speaker" / "2")
    return tmp_path / "models"


@pytest.fixture
def target(own_models: Path) -> Iterator[str]:
    with serving(own_models, retire_timeout_s=77) as server:
        yield server.address


def states(run_here: Run, target: str) -> dict[str, str]:
    listed = json.loads(run_here("models", "list", "--json", "--target", target).stdout)
    return {f"{each['model']}/{each['version']}": each["state"] for each in listed}


def test_a_version_is_loaded_retired_and_gone_from_the_shell(run_here: Run, target: str):
    """Versions are listed with their sessions, loaded beside others, retired with a deadline, and moved from."""
    at = ("--target", target)
    assert states(run_here, target) == {"speaker/1": "available", "speaker/2": "serving", "tagger/1": "serving"}
    done = run_here("models", "load", "speaker", "--version", 1, *at)
    assert done.stdout == "speaker/1 is serving\n"
    with cc.connect(target) as client, client.session("speaker", session_id="a", version="1") as session:
        session.send(TOKENS[:4])
        done = run_here("models", "unload", "speaker", "--version", 1, *at)
        assert done.stdout.startswith("speaker/1 is retiring: 1 sessions have 7")
        assert done.stdout.endswith(" s to finish\n")
        table = run_here("models", "list", *at).stdout
        assert [word for word in ("retiring", "1 sessions have 7", "tagger", "serving") if word not in table] == []
        done = run_here("models", "unload", "speaker", "--version", 1, "--deadline", 50, "--move", "--to", 2, *at)
        assert done.stdout == "speaker/1 is available\nsessions moved: 1, staying: 0\n"
        session.send(TOKENS[4:])
        (listed,) = client.sessions()
        assert listed.version == "2"
    told = json.loads(run_here("models", "unload", "tagger", "--deadline", 0, "--json", *at).stdout)
    assert told == {
        "models": [
            {
                "model": "tagger",
                "version": "1",
                "state": "available",
                "sessions": 0,
                "reason": "",
                "deadline_unix_ms": None,
            }
        ],
        "moved": 0,
        "staying_sessions": 0,
        "staying": [],
    }


def test_what_cannot_be_loaded_or_moved_is_one_line(run: Run, own_models: Path, target: str):
    """A damaged version, a model that is not there, a move to nowhere, a deadline that is none: a clear line each."""
    at = ("--target", target)
    onnx = own_models / "speaker" / "1" / "model.onnx"
    onnx.write_bytes(onnx.read_bytes()[:-9])
    assert "its sha256 differs" in one_line(run("models", "load", "speaker", "--version", 1, *at))
    assert "there is no model 'nobody'" in one_line(run("models", "load", "nobody", *at))
    assert "no other is served; load it first" in one_line(
        run("models", "unload", "speaker", "--version", 2, "--move", *at)
    )
    assert "--to goes with --move" in usage(run("models", "unload", "speaker", "--to", 2, *at))
    assert "is not in the range" in usage(run("models", "unload", "speaker", "--deadline", -1, *at))
    assert "nobody listens there" in one_line(run("models", "list", "--target", "127.0.0.1:1"))
