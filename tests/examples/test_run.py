"""The example runs from end to end, as `make run` does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_main_job_ends_by_itself_and_leaves_nothing_running(tmp_path: Path) -> None:
    """Export, proof, server and every policy's streams succeed; `full` is as offline; versions stay, processes end."""
    older = tmp_path / "models" / "pinyin" / "1"
    older.mkdir(parents=True)
    (older / "manifest.json").write_text("{}")
    example = subprocess.Popen(
        [sys.executable, "-m", "examples.pinyin.run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = example.communicate()
    assert example.returncode == 0, output
    assert re.search(r"^full +100\.00 % +0 ", output, re.MULTILINE), output
    assert re.search(r"^lookahead\(8, 8\) +100\.00 % ", output, re.MULTILINE), output
    assert (match := re.search(r"^largest error against eager PyTorch (\S+), allowed 1e-05", output, re.MULTILINE))
    assert float(match[1]) <= 1e-5
    assert "chóng qìng" in output
    assert {path.name for path in older.parent.iterdir()} == {"1", "2"}
    assert (older / "manifest.json").is_file()
    assert (older.parent / "2" / "report.html").is_file()
    with pytest.raises(ProcessLookupError):  # the server was in the same process group
        os.killpg(example.pid, 0)
