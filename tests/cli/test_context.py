"""Models with contexts from the command line: exported with a link, inspected, served and streamed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.conftest import Run, one_line, usage
from tests.client.process import serving
from tests.support.models import make
from torch import Tensor, nn

SOURCE = """
import torch
from tests.cli.test_context import Reader, Writer
from tests.support.models import make

def reader():
    return make(Reader)

def writer():
    return make(Writer)
"""


class Reader(nn.Module):
    """`[batch, time, 4]` → `[batch, time, 6]`; two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Writer(nn.Module):
    """`[batch, time, 4]` and a memory `[batch, source, 6]` → `[batch, time, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return y + (y @ memory.mT).softmax(-1) @ memory


@pytest.fixture
def module(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "mypair.py").write_text(SOURCE)
    yield
    sys.modules.pop("mypair", None)


INPUTS = ("--input", "x:float32:batch,time,4", "--input", "memory:float32:batch,source,6")


def test_a_linked_model(run: Run, run_here: Run, tmp_path: Path, module: None):
    """A context and its link are given by flags, shown by `inspect`, and the context is streamed from a file."""
    assert run_here("export", "mypair:reader", "--name", "reader", "--out", "out", *INPUTS[:2]).returncode == 0
    asked = ("export", "mypair:writer", "--name", "writer", "--out", "out", *INPUTS)
    assert "not INPUT=MODEL:OUTPUT" in usage(run_here(*asked, "--link", "memory"))
    assert "export it first" in one_line(run_here(*asked, "--link", "memory=nobody:output"))
    assert run_here(*asked, "--link", "memory=reader:output").returncode == 0
    shown = run_here("inspect", "out/writer").stdout
    assert "memory is what reader answers as output" in shown
    assert "[batch, source, 6]" in shown
    x, memory = torch.randn(9, 4), torch.randn(5, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "memory.npy", memory.numpy())
    with serving(tmp_path / "out") as server:
        streamed = ("stream", "writer", "x.npy", "--target", server.address, "--chunk", 4, "--output", "y.npy")
        done = run(*streamed, "--context", "memory=memory.npy")
        assert done.returncode == 0, done
        with torch.no_grad():
            wanted = make(Writer)(x[None], memory[None])[0]
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=0, atol=1e-5)
        assert "wanted ['memory']" in one_line(run(*streamed))
        assert "cannot be read" in one_line(run(*streamed, "--context", "memory=none.npy"))


def test_figures_are_shown(run: Run, models: Path):
    """`inspect` shows the parameters of each layer and those that train, state bytes, FLOPs under look-ahead, sizes."""
    shown = run("inspect", models / "tagger").stdout
    first, second = 2 * 4 * 7 * (5 + 7 + 2), 2 * 4 * 7 * (14 + 7 + 2)
    flops = 2 * (2 * 4 * 7 * (5 + 7) + 2 * 4 * 7 * (14 + 7)) + 2 * 14 * 3
    assert f"{first + second + 45:,} parameters, {first + second + 45:,} trainable" in shown
    assert f"{first:,} + {second:,}" in shown
    assert f"state of a session {4 * 2 * 4 * 7:,} bytes" in shown
    assert f"FLOPs for a frame {flops:,}, {flops * 1.5:,.0f} under lookahead(4, 2)" in shown
    sizes = sum(file.stat().st_size for file in (models / "tagger" / "1").iterdir() if file.name != "manifest.json")
    assert f"{sizes:,}" in shown
