"""What `carousel export` is given: input that it can make no bundle of, and lengths."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.conftest import Run, one_line

from carousel_protos import Bundle

MODULE = """
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]

class Branches(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Packs(Net):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

class Unpaired(Net):
    def forward(self, x):
        return self.rnn(pack_padded_sequence(x, torch.full((x.shape[0],), x.shape[1]), batch_first=True))[0].data

def one_row():
    return Net().eval(), torch.randn(1, 6, 4)

def double():
    return Net().eval().double()

def nan():
    net = Net().eval()
    nn.init.constant_(net.rnn.bias_ih_l0, torch.nan)
    return net
"""
INPUT = ("--input", "x:float32:batch,time,4")
REFUSED = {
    "branch": (("badnet:Branches", *INPUT), "Branches: return super().forward(x if x.sum() > 0 else -x) (badnet.py:"),
    "unpaired packing": (("badnet:Unpaired", *INPUT), "give it to pad_packed_sequence first"),
    "batch of one": (("badnet:one_row",), "'x' [1, 6, 4] has a batch of 1 (axis 0)"),
    "float64 weights": (("badnet:double", *INPUT), "rnn.weight_ih_l0 is torch.float64; export the model in float32"),
    "float64 input": (("badnet:Net", "--input", "x:float64:batch,time,4"), "'x' is torch.float64; give it in float32"),
    "NaN weights": (("badnet:nan", *INPUT), "rnn.bias_ih_l0 has values that are not finite"),
}


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "badnet.py").write_text(MODULE)
    yield
    sys.modules.pop("badnet", None)


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_and_no_bundle(run_here: Run, tmp_path: Path, case: str) -> None:
    """Each is one line that names the place and the way out, exit code 1, and no folder of a bundle."""
    arguments, said = REFUSED[case]
    assert said in one_line(run_here("export", *arguments, "--name", "net", "--out", "out"))
    assert not (tmp_path / "out").exists()


def test_a_factorys_model_is_set_to_evaluation_mode(run: Run) -> None:
    """A factory may return its model in training mode: the command sets evaluation mode, and prints that it did."""
    done = run("export", "badnet:Net", *INPUT, "--name", "net", "--out", "out")
    assert done.returncode == 0, done
    assert done.stderr.splitlines() == [
        "badnet:Net gives a model in training mode: it is set to evaluation mode, as by model.eval()"
    ]


def test_lengths_are_drawn(run_here: Run, tmp_path: Path) -> None:
    """An input that is named as lengths is drawn as some, and is then the session's."""
    lengths = ("--input", "lengths:int64:batch")
    done = run_here("export", "badnet:Packs", *INPUT, *lengths, "--name", "net", "--out", "out")
    assert done.returncode == 0, done
    manifest = Bundle.open(tmp_path / "out" / "net" / "1").manifest
    assert list(manifest.arguments) == ["x", "lengths"]
    assert [port.name for port in (*manifest.inputs, *manifest.contexts)] == ["x"]
