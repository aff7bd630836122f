"""The `carousel` command as users run it: a process in a folder of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from click.testing import CliRunner
from tests.client.conftest import Mixer
from tests.client.process import CAROUSEL, serving
from tests.support.models import Speaker, make
from tests.support.shared import make_once

import carousel_export as cx
from carousel_cli.main import main

LABELS = [f"word{number}" for number in range(11)]


class Run(Protocol):
    def __call__(
        self, *arguments: object, env: Mapping[str, str] | None = ..., **options: Any
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `carousel` with the arguments, in `tmp_path`."""

    def carousel(
        *arguments: object,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        command = [CAROUSEL, *map(str, arguments)]
        options = {"text": True, "capture_output": True, "timeout": 60, "cwd": tmp_path, **options}
        return subprocess.run(command, check=False, env={**os.environ, "COLUMNS": "160", **(env or {})}, **options)

    return carousel


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run` inside this process, for what would import torch each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def carousel(
        *arguments: object, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        done = CliRunner().invoke(main, words, env={"COLUMNS": "160", **(env or {})}, catch_exceptions=False, **options)
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return carousel


@pytest.fixture(scope="session")
def cli_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models`, `talker` (`speaker` with labels) and `mixer` (two inputs, two outputs)."""

    def make_models(folder: Path) -> None:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        cx.export(make(Speaker), torch.randint(0, 11, (3, 6)), name="talker", out=folder, labels=LABELS)
        example = (torch.randn(6, 3, 4), torch.randint(0, 6, (6, 3)))
        names = {"input_names": ["x", "ids"], "output_names": ["frames", "summary"]}
        cx.export(make(Mixer), example, name="mixer", out=folder, **names)

    return make_once(tmp_path_factory, "cli", make_models)


@pytest.fixture(scope="session")
def address(cli_models: Path) -> Iterator[str]:
    with serving(cli_models) as server:
        yield server.address


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that failed: exit code 1, one line on stderr, nothing on stdout."""
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def usage(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that was used wrongly: exit code 2."""
    assert (done.returncode, done.stdout) == (2, ""), done
    return done.stderr.splitlines()[-1]
