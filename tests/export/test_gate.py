"""The parity gate: what differs from eager PyTorch does not become a bundle, and does not pass for one."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import carousel_export as cx
from carousel_protos.bundle import Bundle

torch.set_num_threads(1)
X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A small bidirectional model."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class OtherInOnnx(Net):
    """Answers otherwise while it is exported to ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (3e-5 if torch.compiler.is_exporting() else 0.0)


class OtherInTorchScript(Net):
    """Answers otherwise while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (3e-5 if torch.jit.is_tracing() else 0.0)


class MixesRows(Net):
    """What a row is answered depends on the rows beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OtherInOnnx, ["onnxruntime", "off by 3"]),
        (OtherInTorchScript, ["torchscript", "off by 3"]),
        (MixesRows, ["onnxruntime", "rows of the batch"]),
    ],
)
def test_over_tolerance_there_is_no_bundle(tmp_path: Path, kind: type[Net], words: list[str]) -> None:
    """An exported graph that says something else leaves no bundle; one line says which output, where, by how much."""
    with pytest.raises(cx.ParityError) as failed:
        cx.export(kind().eval(), X, name="net", out=tmp_path)
    line = str(failed.value)
    for word in [*words, "'output'", "carry", "sequence", "frame", "wanted", "got"]:
        assert word in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(2)
    return Net()


@pytest.fixture(scope="module")
def bundle(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return cx.export(net.eval(), X, name="net", out=tmp_path_factory.mktemp("models"))


def test_parity_again(bundle: Bundle, net: Net) -> None:
    """A bundle is proved again against the model that it was made of, and not against another."""
    assert cx.parity(bundle, net.eval())["maximum"] <= 1e-5
    with pytest.raises(cx.ParityError, match="'output'"):
        cx.parity(bundle, Net().eval())
    with pytest.raises(cx.ExportError, match="no layer 'lstm'"):
        cx.parity(bundle, nn.ModuleDict({"rnn": nn.LSTM(5, 4)}).eval())


@pytest.mark.parametrize(("file", "policy"), [("model.onnx", "carry"), ("lookahead.onnx", "lookahead")])
def test_one_changed_weight_is_found(bundle: Bundle, net: Net, tmp_path: Path, file: str, policy: str) -> None:
    """One recurrent weight of one graph that is off by 1e-3 fails the gate under the policy of that graph."""
    folder = tmp_path / "net"
    shutil.copytree(bundle.path, folder)
    graph = onnx.load(folder / file)
    weight = next(each for each in graph.graph.initializer if ".r_" in each.name)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0] += 1e-3
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, folder / file)
    with pytest.raises(cx.ParityError, match=f"onnxruntime under {policy}"):
        cx.parity(Bundle(folder, bundle.manifest), net.eval())


class Loud(Net):
    """Logits over 150, as an untamed linear layer gives them, with an error in the graph relative to their size."""

    def __init__(self, error: float) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.error = error
        with torch.no_grad():
            self.fc.weight *= 1000

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(super().forward(x))
        # A factor of 1 + 4e-6 the exporter takes for 1, and leaves out.
        return y + self.error * y if torch.compiler.is_exporting() else y


def test_tolerance_follows_the_outputs_scale(tmp_path: Path) -> None:
    """Large logits may be off by 1e-5 of the largest of them and by no more; the manifest and the proof say so."""
    bundle = cx.export(Loud(4e-6).eval(), X, name="loud", out=tmp_path)
    proof = json.loads(bundle.file("parity.json").read_text())
    assert bundle.manifest.tolerance.absolute == bundle.manifest.tolerance.relative == 1e-5
    assert max(abs(check["worst"]["wanted"]) for check in proof["checks"]) > 150
    assert proof["maximum"] > 1e-4
    assert proof["share"] == max(check["share"] for check in proof["checks"]) <= 1
    with pytest.raises(cx.ParityError, match="times the tolerance"):
        cx.export(Loud(4e-5).eval(), X, name="louder", out=tmp_path)


def test_given_data_is_tried(net: Net, tmp_path: Path) -> None:
    """Sequences of the caller's own go through the gate, and the look-ahead curve is theirs."""
    made = cx.export(net.eval(), X, name="net", out=tmp_path, data=[torch.randn(11, 5), torch.randn(3, 5)])
    assert '"given data' in made.file("parity.json").read_text()
