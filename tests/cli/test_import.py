"""`carousel import`."""

from pathlib import Path

from tests.cli.conftest import Run
from tests.support.imported import counting

from carousel_protos import Bundle


def test_import(tmp_path: Path, run_here: Run) -> None:
    """`carousel import` makes the bundle and shows the proof; its flags for states and constants are checked."""
    file = counting(tmp_path / "c.onnx")
    done = run_here("import", file, "--name", "c", "--out", "models", "--constant", "sr=16000", "--state", "s=next_s")
    assert done.returncode == 0, done.stderr
    assert "Parity with c.onnx, run as it came by onnxruntime" in " ".join(done.stdout.split())
    assert Bundle.open(tmp_path / "models" / "c" / "1").manifest.metadata["imported from"] == "c.onnx"
    refused = run_here("import", file, "--name", "c", "--out", "models")
    assert refused.returncode == 1
    assert "'sr' is a single value; give it with --constant sr=VALUE" in refused.stderr
    assert run_here("import", file, "--name", "c", "--out", "models", "--state", "s").returncode == 2
