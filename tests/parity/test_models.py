"""Models as people write them: what the exported graph says is what the model says."""

from pathlib import Path

import pytest
import torch
from tests.parity.oracle import Exported, assert_close, export, int32
from torch import Tensor, nn

import carousel_export as cx
from carousel_protos.v1 import manifest_pb2 as pb

torch.manual_seed(0)
TOKENS = torch.arange(24).reshape(3, 8) % 11


def offline(exported: Exported, *rows: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Each sequence's outputs from a ragged batch under policy full, in onnxruntime and TorchScript alike."""
    lengths = [len(row[0]) for row in rows]
    batch = [nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True)]
    zeros = [torch.zeros_like(s) for s in exported.states(len(rows))]
    onnx, scripted = exported.run("model.onnx", *batch, int32(*lengths), *zeros)
    answers = []
    for row, length in enumerate(lengths):
        found = []
        for port in exported.bundle.manifest.outputs:
            cut = slice(0, length if "time" in port.dims else None)
            assert_close(scripted[port.name][row][cut], onnx[port.name][row][cut])
            found.append(onnx[port.name][row][cut])
        answers.append(found)
    return answers


class Stacked(nn.Module):
    """Two LSTM modules of different sizes in a nested module, a residual, layer norm, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(6, 6, batch_first=True)})
        self.tops = nn.ModuleList([nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True, dropout=0.5)])
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        hidden = x + self.encoder["rnn"](x)[0]
        return {"features": self.norm(self.drop(self.tops[0](hidden)[0])), "hidden": hidden}


def test_several_layers_and_outputs(tmp_path: Path) -> None:
    """Several LSTM modules, nested ones too, each have their states; a dict's keys name the outputs."""
    model = Stacked()
    exported = export(model.eval(), TOKENS, tmp_path)
    manifest = exported.bundle.manifest
    assert [state.input for state in manifest.states] == [
        "encoder.rnn.h_0",
        "encoder.rnn.c_0",
        "tops.0.h_0",
        "tops.0.c_0",
    ]
    assert [port.name for port in manifest.outputs] == ["features", "hidden"]
    model.eval()
    rows = TOKENS[0], TOKENS[1, :3], TOKENS[2, :1]
    with torch.no_grad():
        for row, found in zip(rows, offline(exported, *((row,) for row in rows)), strict=True):
            wanted = model(row[None])
            assert_close(found[0], wanted["features"][0])
            assert_close(found[1], wanted["hidden"][0])


class Twice(nn.Module):
    """One LSTM called twice, the second time on its own answer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.lstm(x)[0])[0]


def test_module_called_twice(tmp_path: Path) -> None:
    """Each call has states of its own, a stream cut anywhere equals the whole, and the weights are in the file once."""
    model = Twice()
    exported = export(model.eval(), torch.randn(6, 2, 5), tmp_path)
    manifest = exported.bundle.manifest
    assert [state.layer for state in manifest.states] == ["lstm", "lstm", "lstm.call1", "lstm.call1"]
    assert [layer.name for layer in manifest.layers] == ["lstm", "lstm.call1"]
    x = torch.randn(30, 5)
    states = [torch.zeros_like(s) for s in exported.states(1)]
    outputs = []
    for part in torch.split(x, [4, 1, 20, 5]):
        found, _ = exported.run("model.onnx", part[None], int32(len(part)), *states)
        states = [found[s.output] for s in manifest.states]
        outputs.append(found["output"][0])
    with torch.no_grad():
        assert_close(torch.cat(outputs), model(x[:, None])[:, 0])
    assert weight_shapes(exported).count((1, 20, 5)) == 2  # W and R


class Tied(nn.Module):
    """Two LSTM modules that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(5, 5, batch_first=True)
        self.b = nn.LSTM(5, 5, batch_first=True)
        for name, _ in list(self.a.named_parameters()):
            setattr(self.b, name, getattr(self.a, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0])[0]


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    """Weights that two modules share are counted once and written once."""
    model = Tied()
    exported = export(model.eval(), torch.randn(2, 6, 5), tmp_path)
    assert weight_shapes(exported).count((1, 20, 5)) == 2
    assert exported.bundle.manifest.parameters == 4 * 5 * (5 + 5 + 2)
    (found,) = offline(exported, (x := torch.randn(7, 5),))
    with torch.no_grad():
        assert_close(found[0], model(x[None])[0])


def weight_shapes(exported: Exported) -> list[tuple[int, ...]]:
    """The shapes of the file's initialisers."""
    import onnx

    return [tuple(each.dims) for each in onnx.load(exported.bundle.file("model.onnx")).graph.initializer]


class Alone(nn.Module):
    """One sequence of token ids at a time, no batch."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=batch_first)
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embedding(tokens))[0]).log_softmax(-1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_model(tmp_path: Path, batch_first: bool) -> None:
    """A model of one sequence at a time is served in batches, each row as alone; the manifest keeps its own axes."""
    model = Alone(batch_first=batch_first)
    exported = export(model.eval(), TOKENS[0], tmp_path)
    (port,) = exported.bundle.manifest.inputs
    assert list(port.eager_dims) == ["time"]
    assert list(port.dims) == ["batch", "time"]
    rows = TOKENS[0], TOKENS[1, :3], TOKENS[2, :5]
    with torch.no_grad():
        for row, found in zip(rows, offline(exported, *((row,) for row in rows)), strict=True):
            assert_close(found[0], model(row))


class TwoInputs(nn.Module):
    """Time-major floats and ids; its own zeros as the initial state; sizes read off the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.lstm = nn.LSTM(5, 4, 2)

    def forward(self, x: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
        self.lstm.flatten_parameters()
        zeros = x.new_zeros(self.lstm.num_layers, x.size(1), self.lstm.hidden_size)
        y, _ = self.lstm(torch.cat([x, self.embedding(speaker)], dim=2), (zeros, zeros))
        return y, y.argmax(-1)


def test_two_inputs_time_major(tmp_path: Path) -> None:
    """Several inputs, an integer output, sizes that coincide, and zeros given by the model itself."""
    model = TwoInputs()
    exported = export(model.eval(), (torch.randn(2, 2, 2), torch.tensor([[0, 1], [2, 3]])), tmp_path)
    manifest = exported.bundle.manifest
    assert [list(port.eager_dims) for port in manifest.inputs] == [["time", "batch", "2"], ["time", "batch"]]
    rows = [(torch.randn(n, 2), torch.randint(0, 4, (n,))) for n in (6, 1, 3)]
    with torch.no_grad():
        for (x, speaker), found in zip(rows, offline(exported, *rows), strict=True):
            wanted = model(x[:, None], speaker[:, None])
            assert_close(found[0], wanted[0][:, 0])
            assert torch.equal(found[1], wanted[1][:, 0])


def test_a_bare_lstm(tmp_path: Path) -> None:
    """An `nn.LSTM` is a model: its h_n and c_n are outputs with one value a sequence, right in a ragged batch."""
    model = nn.LSTM(3, 4, batch_first=True)
    exported = export(model.eval(), torch.randn(2, 5, 3), tmp_path, output_names=["y", "h", "c"])
    assert exported.bundle.manifest.ragged
    rows = [(torch.randn(n, 3),) for n in (6, 1, 3)]
    with torch.no_grad():
        for (x,), found in zip(rows, offline(exported, *rows), strict=True):
            y, (h, c) = model(x[None])
            for got, wanted in zip(found, (y[0], h[:, 0], c[:, 0]), strict=True):
                assert_close(got, wanted)


class Last(nn.Module):
    """The last frame's answer, as a classifier of whole sequences has it."""

    def __init__(self, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


def test_last_frame(tmp_path: Path) -> None:
    """`y[:, -1]` streams as a running answer, in ragged batches too; with a backward direction, offline only."""
    manifest = export(Last().eval(), torch.randn(2, 6, 5), tmp_path / "a").bundle.manifest
    assert manifest.default_policy.kind == pb.POLICY_KIND_CAUSAL
    assert list(manifest.outputs[0].dims) == ["batch", "4"]
    assert manifest.ragged
    manifest = export(Last(bidirectional=True).eval(), torch.randn(2, 6, 5), tmp_path / "b").bundle.manifest
    assert [policy.kind for policy in manifest.policies] == [pb.POLICY_KIND_FULL]


class Normalised(nn.Module):
    """A norm over time and features before the LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.norm(x.transpose(1, 2)).transpose(1, 2))[0]


class Attended(nn.Module):
    """Attention over time after the LSTM, in plain functions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return self.fc((y @ y.transpose(1, 2)).softmax(-1) @ y)


@pytest.mark.parametrize(
    ("model", "policy", "named"),
    [(Normalised(), cx.Lookahead(8, 8), "norm (GroupNorm)"), (Attended(), cx.Causal(), "forward before fc (Linear)")],
)
def test_other_layers_that_mix_time(tmp_path: Path, model: nn.Module, policy: cx.Policy, named: str) -> None:
    """A layer that mixes time is found out and named, a policy that it makes wrong is refused, and full is offered."""
    with pytest.raises(cx.PolicyError) as refused:
        cx.export(model.eval(), torch.randn(2, 6, 5), name="model", out=tmp_path, policy=policy)
    assert named in str(refused.value)
    assert not list(tmp_path.iterdir())
    manifest = export(model.eval(), torch.randn(2, 6, 5), tmp_path).bundle.manifest
    assert [allowed.kind for allowed in manifest.policies] == [pb.POLICY_KIND_FULL]
    assert manifest.ragged == (type(model) is Attended)


class Prefixes(nn.Module):
    """Layers of which one's name is a prefix of another's, made and called in another order than their names'."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn_b = nn.LSTM(5, 3, batch_first=True)
        self.rnn = nn.LSTM(3, 3, batch_first=True)
        self.rnn_a = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn_a(self.rnn(self.rnn_b(x)[0])[0])[0]


def test_states_are_paired_by_entry_not_by_name(tmp_path: Path) -> None:
    """States stand in the order of the calls, and each follows its own layer through a stream."""
    model = Prefixes()
    exported = export(model.eval(), torch.randn(2, 6, 5), tmp_path)
    manifest = exported.bundle.manifest
    assert [s.input for s in manifest.states] == [f"{n}.{s}_0" for n in ("rnn_b", "rnn", "rnn_a") for s in "hc"]
    x = torch.randn(12, 5)
    states = [torch.zeros_like(s) for s in exported.states(1)]
    for part in x:
        found, _ = exported.run("model.onnx", part[None, None], int32(1), *states)
        states = [found[s.output] for s in manifest.states]
    with torch.no_grad():
        below, (h_b, _) = model.rnn_b(x[None])
        middle, (h, _) = model.rnn(below)
        wanted, (_, c_a) = model.rnn_a(middle)
    assert_close(found["output"][0, -1], wanted[0, -1])
    for got, state in ((found["rnn_b.h_n"], h_b), (found["rnn.h_n"], h), (found["rnn_a.c_n"], c_a)):
        assert_close(got[0], state[:, 0])
