"""What a bundle holds, and what is left when there is none."""

import copy
import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import carousel_export as cx
from carousel_protos.bundle import Bundle, BundleError
from carousel_protos.v1 import manifest_pb2 as pb
from carousel_server.config import Limits

torch.set_num_threads(1)


class Tagger(nn.Module):
    """A tagger over token ids."""

    def __init__(self, *, bidirectional: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 4, 2, batch_first=True, bidirectional=bidirectional, dropout=0.5)
        self.fc = nn.Linear(8 if bidirectional else 4, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(self.lstm(self.embedding(tokens))[0])}


TOKENS = torch.arange(12).reshape(2, 6) % 11
LABELS = ["noun", "verb", "other"]


@pytest.fixture(scope="module")
def model() -> Tagger:
    torch.manual_seed(5)
    return Tagger()


@pytest.fixture(scope="module")
def bundle(model: Tagger, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("models")
    made = cx.export(
        model.eval(),
        TOKENS,
        name="tagger",
        out=folder,
        policy=cx.Lookahead(3, 2),
        labels=LABELS,
        metadata={"language": "nl"},
    )
    return Bundle.open(made.path)


def test_manifest(bundle: Bundle) -> None:
    """The manifest has the model's tensors and states with their axes, its policies, layers, labels and versions."""
    manifest = bundle.manifest
    (tokens,), (logits,) = manifest.inputs, manifest.outputs
    assert (tokens.name, tokens.dtype, list(tokens.dims)) == ("tokens", pb.DATA_TYPE_INT64, ["batch", "time"])
    assert (logits.name, logits.dtype, list(logits.dims)) == ("logits", pb.DATA_TYPE_FLOAT32, ["batch", "time", "3"])
    assert [(s.input, s.output, list(s.dims), s.layer) for s in manifest.states] == [
        ("lstm.h_0", "lstm.h_n", ["batch", "4", "4"], "lstm"),
        ("lstm.c_0", "lstm.c_n", ["batch", "4", "4"], "lstm"),
    ]
    assert manifest.default_policy == pb.Policy(kind=pb.POLICY_KIND_LOOKAHEAD, block=3, ahead=2)
    kinds = [pb.POLICY_KIND_CARRY, pb.POLICY_KIND_LOOKAHEAD, pb.POLICY_KIND_FULL]
    assert [policy.kind for policy in manifest.policies] == kinds
    assert manifest.default_policy in manifest.policies
    (layer,) = manifest.layers
    assert (layer.name, layer.kind, layer.num_layers, layer.num_directions) == ("lstm", "LSTM", 2, 2)
    assert layer.parameters == 2 * 4 * 4 * (6 + 4 + 2) + 2 * 4 * 4 * (8 + 4 + 2)
    assert manifest.parameters == layer.parameters + 11 * 6 + 8 * 3 + 3
    assert manifest.ragged
    assert list(manifest.labels["logits"].values) == LABELS
    assert dict(manifest.metadata) == {"language": "nl"}
    assert manifest.made_with["torch"] == torch.__version__
    assert manifest.tolerance.absolute == 1e-5
    files = {"golden.safetensors", "lookahead.onnx", "model.onnx", "model.pt", "parity.json", "report.html"}
    assert {file.path for file in manifest.files} == files


@pytest.mark.parametrize("file", ["model.onnx", "lookahead.onnx"])
def test_dynamic_dimensions_are_named(bundle: Bundle, file: str) -> None:
    """Every batch and time axis of every input and output has its dim_param, in the contract's order."""
    graph = onnx.load(bundle.file(file)).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    ahead = {"lengths_ahead": ["batch"], "tokens_ahead": ["batch", "time_ahead"]} if file == "lookahead.onnx" else {}
    state = ["batch", 4, 4]
    assert dims == ahead | {
        "tokens": ["batch", "time"],
        "lengths": ["batch"],
        "lstm.h_0": state,
        "lstm.c_0": state,
        "logits": ["batch", "time", 3],
        "lstm.h_n": state,
        "lstm.c_n": state,
    }
    order = ["tokens", "tokens_ahead", "lengths", "lengths_ahead", "lstm.h_0", "lstm.c_0"]
    assert [value.name for value in graph.input] == [name for name in order if name in dims]
    assert [value.name for value in graph.output] == ["logits", "lstm.h_n", "lstm.c_n"]


@pytest.mark.parametrize(("file", "nodes"), [("model.onnx", 2), ("lookahead.onnx", 7)])
def test_fused_nodes_with_constant_weights(bundle: Bundle, file: str, nodes: int) -> None:
    """One LSTM node a layer (with look-ahead four, in the last three), its weights constants, as quantisers need."""
    graph = onnx.load(bundle.file(file)).graph
    constants = {each.name for each in graph.initializer}
    found = [node for node in graph.node if node.op_type == "LSTM"]
    assert len(found) == nodes
    assert all(set(node.input[1:4]) <= constants for node in found)


def test_torchscript_holds_weights_once(bundle: Bundle) -> None:
    """The two methods of the TorchScript file share its weights: it has as many bytes of them as the model."""
    with zipfile.ZipFile(bundle.file("model.pt")) as archive:
        sizes = [each.file_size for each in archive.infolist() if "/constants/" in each.filename]
    weights = 4 * bundle.manifest.parameters
    assert weights <= sum(sizes) < 1.2 * weights


def test_golden_cases(bundle: Bundle, model: Tagger) -> None:
    """Each allowed policy has a case with sequences of several lengths, one frame among them, and eager's answers."""
    with safe_open(bundle.file("golden.safetensors"), framework="pt") as file:
        cases = {case["name"]: case for case in json.loads(file.metadata()["cases"])}
        assert {"carry-5", "lookahead-3-2", "full"} <= set(cases)
        assert cases["lookahead-3-2"]["policy"] == {"kind": "POLICY_KIND_LOOKAHEAD", "block": 3, "ahead": 2}
        lengths = []
        for i in range(cases["full"]["sequences"]):
            tokens = file.get_tensor(f"full/{i}/in/tokens")
            lengths.append(len(tokens))
            with torch.no_grad():
                wanted = copy.deepcopy(model).eval()(tokens[None])["logits"][0]
            torch.testing.assert_close(file.get_tensor(f"full/{i}/out/logits"), wanted, rtol=0, atol=1e-6)
        assert 1 in lengths
        assert len(set(lengths)) >= 3
        assert file.get_tensor("carry-5/1/initial/lstm.h_0").any()


def test_parity_report(bundle: Bundle) -> None:
    """parity.json has every policy in both runtimes within tolerance, and the look-ahead curve of the model."""
    proof = json.loads(bundle.file("parity.json").read_text())
    tried = {(c["policy"]["kind"], c["policy"]["block"], c["policy"]["ahead"]) for c in proof["checks"]}
    assert {("POLICY_KIND_LOOKAHEAD", *pair) for pair in [(3, 2), (8, 8), (1, 0), (3, 5), (5, 1)]} <= tried
    assert {("POLICY_KIND_CARRY", 0, 0), ("POLICY_KIND_FULL", 0, 0)} <= tried
    assert {c["runtime"] for c in proof["checks"]} == {"onnxruntime", "torchscript"}
    assert {c["output"] for c in proof["checks"]} == {"logits", "lstm.h_n", "lstm.c_n"}
    assert proof["maximum"] == max(c["max_abs_error"] for c in proof["checks"]) <= proof["tolerance"] == 1e-5
    assert max(len(series["frame"]) for series in proof["error_over_time"]) == 640
    assert [(entry["sequence"], entry["call"]) for entry in proof["longest"]] == [(640, 520), (640, 5), (640, 640)]
    assert proof["longest"][0]["call"] > Limits().max_block_frames
    assert proof["lookahead_curve"][0]["policy"] == {"kind": "POLICY_KIND_CARRY", "block": 1, "ahead": 0}
    page = bundle.file("report.html").read_text()
    assert "logits" in page
    assert re.search(r"carry 640 and 520;\s+lookahead\(3, 2\) 640 and 5;\s+full 640 and 640\.", page)
    listed = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    assert {name for name, digest in listed.items() if digest in page} == listed.keys() - {"report.html"}
    curve = {(point["policy"]["block"], point["policy"]["ahead"]) for point in proof["lookahead_curve"]}
    assert {(block, ahead) for block in (1, 8) for ahead in (0, 1, 2, 4, 8, 16)} <= curve


def test_files_have_one_mode(bundle: Bundle) -> None:
    """Every file of a bundle can be read by whom the others can be read by."""
    assert len({file.stat().st_mode for file in bundle.path.iterdir()}) == 1


def test_the_callers_model_is_untouched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training mode, weights, gradients and hooks are as before; what the copy does otherwise is said."""
    model = Tagger(bidirectional=False).train()
    model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {path: sorted(module.__dict__) for path, module in model.named_modules()}
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    with caplog.at_level(logging.INFO, logger="carousel_export"):
        cx.export(model.eval(), TOKENS, name="tagger", out=tmp_path)
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.fc.parameters()] == [False, True]
    assert type(model.lstm) is nn.LSTM
    assert {path: sorted(module.__dict__) for path, module in model.named_modules()} == attributes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert "dropout=0.5 is inactive" in caplog.text


def test_versions_count_up(bundle: Bundle, model: Tagger, tmp_path: Path) -> None:
    """Without a version the next number is taken; what is there is never written over; a bad name is refused."""
    target = tmp_path / "tagger" / "1"
    target.mkdir(parents=True)
    with pytest.raises(BundleError, match="there already"):
        cx.export(model.eval(), TOKENS, name="tagger", out=tmp_path, version="1")
    with pytest.raises(BundleError, match="not allowed"):
        cx.export(model.eval(), TOKENS, name="../tagger", out=tmp_path)
    assert bundle.manifest.version == "1"


def test_a_place_that_cannot_be_written_to_is_found_out_first(model: Tagger, tmp_path: Path) -> None:
    """A folder that cannot be made, or a file in its place, is refused before the model is run at all."""

    class Unrun(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it was run")

    (tmp_path / "taken").write_text("a file")
    for out in (Path("/proc/nope"), tmp_path / "taken", tmp_path / "taken" / "deeper"):
        with pytest.raises(BundleError, match=r"cannot be written to .*; give a folder for models"):
            cx.export(Unrun().eval(), TOKENS, name="tagger", out=out)


def test_what_is_refused_leaves_no_folder(model: Tagger, tmp_path: Path) -> None:
    """Folders that an export made are gone again when it fails, and those that were there stay."""
    (tmp_path / "models").mkdir()
    for out in ("models", "models/deep/er"):
        with pytest.raises(cx.ExportError):
            cx.export(model.eval(), TOKENS, name="tagger", out=tmp_path / out, policy=cx.Causal())
        assert [*tmp_path.rglob("*")] == [tmp_path / "models"]


@pytest.mark.parametrize("field", ["inputs", "outputs", "policies", "graphs"])
def test_a_manifest_that_lacks_something_is_refused(bundle: Bundle, tmp_path: Path, field: str) -> None:
    """A manifest without inputs, outputs, policies or graphs, or without the graph of a policy, is no bundle's."""
    copied = Path(shutil.copytree(bundle.path, tmp_path / "1"))
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, field: []}))
    with pytest.raises(BundleError, match=f"manifest.json names no {field}; export the model again"):
        Bundle.open(copied)
    (copied / "manifest.json").write_text(json.dumps({**manifest, "graphs": manifest["graphs"][:1]}))
    with pytest.raises(BundleError, match="no float32 graph for POLICY_KIND_LOOKAHEAD"):
        Bundle.open(copied)
