"""`carousel doctor`: what the machine is, and what a server makes of it."""

import re
from pathlib import Path

import pytest
from tests.cli.conftest import Run, usage

from carousel_server.config import Threading
from carousel_server.machine import Machine, choose


def machine(cores: int, quota: float | None = None) -> Machine:
    return Machine("some", cores, quota, 2**33, None)


def test_threads_follow_the_cores_that_may_be_used() -> None:
    """Half of the usable cores, at least one, compute a call; a quota counts, and a flag goes before."""
    for cores, quota, threads in ((1, None, 1), (2, None, 1), (16, None, 8), (64, 4.0, 2), (4, 0.5, 1)):
        assert choose(machine(cores, quota), Threading()).threads == threads
    assert choose(machine(16), Threading(threads=3, loop="asyncio")).threads == 3
    assert choose(machine(16), Threading(loop="asyncio")).loop == "asyncio"


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({"cpu.max": "150000 100000\n", "memory.max": "1048576\n"}, 1.5, 2**20),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 4.0, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": f"{2**62}\n"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_the_control_group(
    tmp_path: Path, files: dict[str, str], quota: float | None, limit: int | None
) -> None:
    """Both versions' files are read, and a group without limits has none."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = Machine.look(tmp_path)
    assert (found.quota, found.memory_limit) == (quota, limit)


def test_doctor_tells_each_choice_with_its_flag(run: Run) -> None:
    """The machine, onnxruntime and every choice are printed; what was asked for is said to be asked for."""
    done = run("doctor", "--threads", 3, "--loop", "asyncio")
    assert done.returncode == 0, done.stderr
    for word in ("cores", "memory", "CPUExecutionProvider", "--threads", "--spinning", "--loop", "taskset"):
        assert word in done.stdout
    assert re.search(r"threads in a model call +│ 3 +│ as asked", done.stdout)
    assert re.search(r"event loop +│ asyncio +│ as asked", done.stdout)


def test_doctor_measures_a_bundle(run: Run, models: Path) -> None:
    """Both thread counts, two calls at once and spinning are measured on the bundle, and one line recommends."""
    done = run("doctor", "--measure", models / "tagger")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +(\d) │ +(\d) │ (on|off) +│ +(\d+) │ (full|a call each 20 ms) +│ +([\d,]+) │", done.stdout)
    assert {(threads, at_once, spinning) for threads, at_once, spinning, *_ in rows} >= {
        ("1", "1", "off"),
        ("2", "1", "off"),
        ("1", "2", "off"),
        ("2", "1", "on"),
    }
    assert all(int(row[-1].replace(",", "")) > 0 for row in rows)
    assert re.search(r"^recommended: --threads \d --(no-)?spinning \(.+\)$", done.stdout, re.MULTILINE)


def test_doctor_refuses_what_serve_refuses(run: Run) -> None:
    """Threads below zero are a usage error, one line that says what is wanted."""
    assert "threads is -1: it must be 0 or greater" in usage(run("doctor", "--threads", -1))
