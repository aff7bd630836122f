"""int8 and float16: the same sessions on graphs of other arithmetic, each held to an error of its own."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.support.models import Speaker, Tagger, looked_ahead, make, whole
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_server.config import ServerConfig
from carousel_server.serve import serving
from carousel_server.verify import replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tagger`, bidirectional, and `speaker`, causal, in float32, int8 and float16."""
    models = tmp_path_factory.mktemp("variants")
    torch.manual_seed(2)
    both = ("int8", "float16")
    example = torch.randn(3, 6, 16)
    policy = cx.Lookahead(4, 2)
    cx.export(tagger().eval(), example, name="tagger", out=models, policy=policy, variants=both)
    cx.export(make(Speaker), torch.randint(0, 11, (3, 6)), name="speaker", out=models, variants=both)
    return models


def tagger() -> nn.Module:
    return make(Tagger, features=16, hidden=24)


def proof(bundle: Path) -> dict[str, dict]:
    found = json.loads((bundle / "parity.json").read_text())
    return {entry["variant"]: entry for entry in found["variants"]}


@pytest.mark.system("1", "float16 and int8 variants, chosen by flag or by request, each within its own measured error")
@pytest.mark.parametrize("variant", ["int8", "float16"])
async def test_sessions_of_a_variant(folder: Path, variant: str) -> None:
    """A session of a variant is answered within its tolerance of eager; one in float32 beside it, within 1e-5."""
    model, speaker = tagger(), make(Speaker)
    x, tokens = torch.randn(21, 16), torch.randint(0, 11, (21,))
    wanted, spoken = looked_ahead(model, x, 4, 2), whole(speaker, tokens)
    allowed = {name: proof(folder / name / "1")[variant]["tolerance"] for name in ("tagger", "speaker")}
    config = ServerConfig(models=folder, listen="127.0.0.1:0", drain_timeout_s=0.2)
    async with serving(config) as server, cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        async with (
            client.session("tagger", variant=variant) as other,
            client.session("tagger") as plain,
            client.session("speaker", variant=variant) as causal,
        ):
            parts = [(await other.send(part), await plain.send(part)) for part in np.split(x.numpy(), [5, 6, 14])]
            parts.append((await other.send(end=True), await plain.send(end=True)))
            said = [await causal.send(part) for part in np.split(tokens.numpy(), [1, 9])]
        inferred = await client.infer("speaker", tokens[None].numpy(), variant=variant)
    got, exact = (np.concatenate(column) for column in zip(*parts, strict=True))
    error = np.abs(got - wanted.numpy()).max()
    assert 1e-6 < error <= allowed["tagger"] * max(1, float(wanted.abs().max()))
    assert np.abs(exact - wanted.numpy()).max() < 1e-5
    for answer in (np.concatenate(said), inferred[0]):
        assert np.abs(answer - spoken.numpy()).max() <= allowed["speaker"] * max(1, float(spoken.abs().max()))


async def test_the_flag_is_the_default_and_an_unknown_variant_is_refused(folder: Path) -> None:
    """With `variant` in the settings, a session that names none runs on it; one that the bundle lacks is refused."""
    tokens = torch.randint(0, 11, (1, 9))
    config = ServerConfig(models=folder, listen="127.0.0.1:0", drain_timeout_s=0.2, variant="int8")
    async with serving(config) as server, cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        default = await client.infer("speaker", tokens.numpy())
        int8 = await client.infer("speaker", tokens.numpy(), variant="int8")
        float32 = await client.infer("speaker", tokens.numpy(), variant="float32")
        np.testing.assert_array_equal(default, int8)
        assert np.abs(default - float32).max() > 1e-6
        with pytest.raises(cc.InvalidArgument, match="has no variant 'int4' here; it has float32, int8, float16"):
            await client.infer("speaker", tokens.numpy(), variant="int4")


def test_each_variant_is_measured(folder: Path) -> None:
    """Size, speed and errors by policy are in parity.json; golden replay holds each variant to its own tolerance."""
    for name, policies in (("tagger", 3), ("speaker", 3)):
        bundle = folder / name / "1"
        found = proof(bundle)
        assert found["float16"]["maximum"] < found["int8"]["maximum"]
        for entry in found.values():
            assert len({json.dumps(check["policy"]) for check in entry["checks"]}) >= policies
            assert entry["bytes"] < entry["bytes_float32"]
            assert entry["speed"] > 0
            assert all(0 < c["mean_abs_error"] <= c["max_abs_error"] <= entry["maximum"] for c in entry["checks"])
        replayed = replay(bundle)
        assert {case.variant for case in replayed} == {"float32", "int8", "float16"}
        assert all(case.ok for case in replayed)
        for case in replayed:
            assert case.tolerance == (1e-5 if case.variant == "float32" else found[case.variant]["tolerance"])
        assert "Variants" in (bundle / "report.html").read_text()


def test_every_lstm_node_is_quantised(folder: Path) -> None:
    """Both graphs have as many quantised LSTM nodes as float32 ones, and weights that nodes share are there once."""
    for file in ("model", "lookahead"):
        before, after = (onnx.load(folder / "tagger/1" / f"{file}{kind}.onnx").graph for kind in ("", ".int8"))
        nodes = [node for node in after.node if node.op_type == "DynamicQuantizeLSTM"]
        assert len(nodes) == sum(node.op_type == "LSTM" for node in before.node) > 0
        weights, quantised = (
            [tensor for tensor in graph.initializer if len(tensor.dims) == 3 and tensor.data_type == dtype]
            for graph, dtype in ((before, onnx.TensorProto.FLOAT), (after, onnx.TensorProto.INT8))
        )
        assert len(quantised) == len(weights) > 0


class Wide(nn.Module):
    """Weights of which one is so large that the others are nothing beside it in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.linear = nn.Linear(6, 3)
        with torch.no_grad():
            self.linear.weight[:, 1:] *= 10
            self.lstm.weight_ih_l0[0, 0] = 3e3

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])


def test_an_error_over_the_bound_is_refused_unless_asked(tmp_path: Path) -> None:
    """An int8 model that is another one is refused in one line, and no bundle is written; it can be allowed."""
    torch.manual_seed(1)
    model, example = Wide().eval(), torch.randn(2, 6, 4)
    with pytest.raises(cx.ParityError, match=r"int8: output 'output' is off by .* over 0.1; export without --variant"):
        cx.export(model.eval(), example, name="wide", out=tmp_path, variants=["int8"])
    assert not list(tmp_path.iterdir())
    bundle = cx.export(model.eval(), example, name="wide", out=tmp_path, variants=["int8"], variant_error=5.0)
    assert all(case.ok for case in replay(bundle.path))
    with pytest.raises(cx.ExportError, match="there is no variant 'int4'; there are int8, float16"):
        cx.export(model.eval(), example, name="wide", out=tmp_path, variants=["int4"])


def test_gru_stays_float32_in_int8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GRU and RNN nodes are not quantised, and the export says so."""
    torch.manual_seed(1)
    example = torch.randn(2, 6, 4)
    with caplog.at_level("INFO", "carousel_export"):
        cx.export(
            nn.GRU(4, 6, batch_first=True).eval(),
            example,
            name="gru",
            out=tmp_path,
            variants=["int8"],
            output_names=["y", "h"],
        )
    assert "1 GRU nodes stay float32, which onnxruntime does not quantise" in caplog.text


class Projected(nn.Module):
    """`proj_size`, which is a Scan in ONNX, whose inner graph has an `x` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, 2, proj_size=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Gated(nn.Module):
    """Two layers of bidirectional GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, 2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


@pytest.mark.parametrize("model", [Projected(), Gated()], ids=["proj_size", "gru"])
def test_float16_of_other_layers(tmp_path: Path, model: nn.Module) -> None:
    """Layers without an LSTM node of their own have a float16 variant too, right under every policy on this host."""
    bundle = cx.export(model.eval(), torch.randn(2, 3, 5), name="model", out=tmp_path, variants=["float16"])
    replayed = [case for case in replay(bundle.path) if case.variant == "float16"]
    assert {case.policy.partition("(")[0] for case in replayed} >= {"carry", "full"}
    assert all(case.ok and case.tolerance < 5e-3 for case in replayed)


class LastFrame(nn.Module):
    """`[batch, time, 6]` → `[batch, 4]`: a linear layer on an LSTM's last answer, which is a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 9, batch_first=True)
        self.linear = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0][:, -1])


def test_int8_of_one_answer_a_sequence(tmp_path: Path) -> None:
    """A linear layer on one value a sequence, whose weights the quantiser turns over, has an int8 variant too."""
    bundle = cx.export(make(LastFrame), torch.randn(3, 6, 6), name="last", out=tmp_path, variants=("int8",))
    assert [graph.variant for graph in bundle.manifest.graphs] == ["float32", "int8"]
    assert 0 < proof(bundle.path)["int8"]["maximum"] < 0.1
