"""`carousel tune`: the curve of a shared model on sample data, and the setting that it suggests."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from tests.cli.conftest import Run, one_line, usage
from tests.report.test_report import Page
from tests.support.models import Tagger, looked_ahead, make, whole

FACTORY = """
import torch
from tests.support.models import Tagger, make

def tagger():
    return make(Tagger), torch.randn(3, 6, 5)
"""


@pytest.fixture
def data(tmp_path: Path) -> list[torch.Tensor]:
    """Sequences of 20, 9 and 14 frames, as `data.npz`."""
    torch.manual_seed(2)
    sequences = [torch.randn(length, 5) for length in (20, 9, 14)]
    np.savez(tmp_path / "data.npz", *(x.numpy() for x in sequences))
    return sequences


def settings(done: dict) -> dict[tuple[int, int], dict]:
    return {
        (point["policy"]["block"], point["policy"]["ahead"]): point
        for point in done["points"]
        if point["policy"]["kind"] == "POLICY_KIND_LOOKAHEAD"
    }


def test_the_curve_is_what_eager_says(run_here: Run, models: Path, data: list[torch.Tensor]):
    """Each setting's agreement and errors are those of eager PyTorch; with all that follows ahead, it is offline."""
    asked = ("tune", models / "tagger", "--data", "data.npz", "--json", "--blocks", "1,4", "--aheads", "0,2,32")
    done = run_here(*asked, "--max-cost", 40, "--agreement", 0.5)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert (found["sequences"], found["frames"]) == (3, 43)
    points = settings(found)
    assert set(points) == {(block, ahead) for block in (1, 4) for ahead in (0, 2, 32)}
    model = make(Tagger)
    offline = torch.cat([whole(model, x) for x in data])
    for (block, ahead), point in points.items():
        streamed = torch.cat([looked_ahead(model, x, block, ahead) for x in data])
        agreement = float((streamed.argmax(-1) == offline.argmax(-1)).double().mean())
        assert point["argmax_agreement"] == pytest.approx(agreement)
        assert point["max_abs_difference"] == pytest.approx(float((streamed - offline).abs().max()), abs=2e-6)
        rms = float(((streamed - offline).square().mean() / offline.square().mean()).sqrt())
        assert point["rms_relative_difference"] == pytest.approx(rms, abs=2e-6)
        assert (point["cost"], point["latency_frames"]) == ((block + ahead) / block, block + ahead)
        if ahead == 32:
            assert point["argmax_agreement"] == 1
            assert point["max_abs_difference"] <= 1e-5


def test_the_cheapest_that_reaches_it(run_here: Run, models: Path, data: list[torch.Tensor]):
    """The suggestion has the lowest cost of those that reach the wanted agreement, then the lowest latency."""
    asked = ("tune", models / "tagger", "--data", "data.npz", "--json")
    found = json.loads(run_here(*asked, "--agreement", 0.97).stdout)
    reached = [point for point in settings(found).values() if point["argmax_agreement"] >= 0.97]
    assert 0 < len(reached) < len(settings(found))
    best = min(reached, key=lambda point: (point["cost"], point["latency_frames"]))
    flags = f"--policy lookahead --block {best['policy']['block']} --ahead {best['policy']['ahead']}"
    assert found["best"] == {**best, "flags": flags}
    assert max(point["cost"] for point in found["points"]) <= 9
    closer = json.loads(run_here(*asked, "--rms", 0.01).stdout)["best"]
    assert closer["rms_relative_difference"] <= 0.01
    done = run_here(*asked[:-1], "--agreement", 0.97)
    assert "carry(1)" in done.stdout
    assert done.stdout.rstrip().endswith(flags)


def test_a_plot_is_written(run_here: Run, models: Path, tmp_path: Path, data: list[torch.Tensor]):
    """The page and the drawing have a line for each block, and are well-formed."""
    asked = ("tune", models / "tagger", "--data", "data.npz", "--agreement", 0.5, "--blocks", "1,8")
    for name in ("curve.svg", "curve.html"):
        assert run_here(*asked, "--plot", name).returncode == 0
    drawing = ET.parse(tmp_path / "curve.svg")
    lines = drawing.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * 3  # two charts; carry(1), block 1, block 8
    html = (tmp_path / "curve.html").read_text()
    assert "lookahead(8, 4)" in Page(html).words()
    assert html.count("<svg viewBox") == 2
    assert "neither .html nor .svg" in usage(run_here(*asked, "--plot", "curve.pdf"))


@pytest.fixture
def module(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "mytagger.py").write_text(FACTORY)
    yield
    sys.modules.pop("mytagger", None)


def test_a_factory_and_a_folder(run_here: Run, tmp_path: Path, module: None):
    """A model that was not exported is tuned as well, on a folder of files, a batch in one, up to a limit of frames."""
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "a.npy", np.random.default_rng(1).standard_normal((2, 6, 5)).astype(np.float32))
    np.save(tmp_path / "folder" / "b.npy", np.random.default_rng(2).standard_normal((50, 5)).astype(np.float32))
    asked = ("tune", "mytagger:tagger", "--data", "folder", "--limit", 30, "--json", "--agreement", 0.5)
    done = run_here(*asked, "--blocks", "4", "--aheads", "4")
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert (found["sequences"], found["frames"]) == (3, 30)


def test_what_cannot_be_tuned_is_said_in_a_line(run_here: Run, models: Path, tmp_path: Path, data: list[torch.Tensor]):
    """A causal model, data that do not fit, an unknown output, and an agreement out of reach each fail with a line."""
    np.save(tmp_path / "wide.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "ids.npy", np.zeros(5, np.int64))
    tagger = ("tune", models / "tagger", "--data")
    assert "does not allow lookahead" in one_line(run_here("tune", models / "speaker", "--data", "ids.npy"))
    assert "'x' torch.float32 [5, 4]" in one_line(run_here(*tagger, "wide.npy"))
    assert "'nothing' is no output" in one_line(run_here(*tagger, "data.npz", "--output", "nothing"))
    assert "not MODULE:FACTORY" in usage(run_here("tune", "nowhere", "--data", "data.npz"))
    assert "'1,x' is not whole numbers" in usage(run_here(*tagger, "data.npz", "--blocks", "1,x"))
    done = run_here(*tagger, "data.npz", "--blocks", 1, "--aheads", 0, "--agreement", 1)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no setting reaches agreement 100 %" in done.stderr
