"""Exported graphs do no work that nobody reads, and a rewritten graph computes the same bits."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import carousel_export as cx
from carousel_export.lean import lean


class Residual(nn.Module):
    """Two layers with what people put around them: an embedding, a residual, a norm, an activation, an argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.LSTM(6, 3, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(6, 3, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        y, _ = self.first(x)
        y, _ = self.second(self.norm(x + y).relu())
        scores = self.linear(x * y.tanh()).log_softmax(-1)
        return scores, scores.argmax(-1)


def test_look_ahead_computes_what_the_block_needs(tmp_path: Path) -> None:
    """Over the frames ahead the last layer runs backwards alone, and what follows it does not run at all."""
    torch.manual_seed(0)
    bundle = cx.export(Residual().eval(), torch.randint(0, 11, (3, 7)), name="residual", out=tmp_path)
    graph = onnx.load(bundle.file("lookahead.onnx")).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["LSTM"] == 4 + 3
    sized = {node.output[0] for node in graph.node if node.op_type == "Shape" and node.input[0] == "tokens"}
    assert not [node for node in graph.node if node.op_type == "Slice" and sized & set(node.input)]
    assert not [node for node in graph.node if node.op_type == "Concat" and "tokens_ahead" in node.input]


class Single(nn.Module):
    """One layer, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])


def test_carry_has_one_transposition_a_tensor(tmp_path: Path) -> None:
    """A bidirectional layer's two directions are put side by side and made batch first in one transposition."""
    torch.manual_seed(0)
    bundle = cx.export(Single().eval(), torch.randn(2, 6, 5), name="one", out=tmp_path)
    graph = onnx.load(bundle.file("model.onnx")).graph
    # x, h_0 and c_0 in, y, h_n and c_n out.
    assert Counter(node.op_type for node in graph.node)["Transpose"] == 6


FRAMES = ("batch", "time", 4)


def cut_graph(path: Path, nodes: list[onnx.NodeProto], rank: int = 3, *, kind: int = TensorProto.FLOAT) -> Path:
    """x and x_ahead joined to `j`, the nodes from `j` to `z`, and z's frames before those of x_ahead as `y`."""
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((4, 4)), "v": rng.standard_normal(4)}
    body = [
        helper.make_node("Concat", ["x", "x_ahead"], ["j"], axis=1),
        *nodes,
        helper.make_node("Shape", ["x"], ["t"], start=1, end=2),
        helper.make_node("Slice", ["z", "zero", "t", "one", "one"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, FRAMES),
        helper.make_tensor_value_info("x_ahead", TensorProto.FLOAT, ("batch", "time_ahead", 4)),
    ]
    y = helper.make_tensor_value_info("y", kind, FRAMES[:rank])
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [i]) for i, name in enumerate(("zero", "one"))]
    constants += [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(body, "cut", inputs, [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def leaned(path: Path) -> ir.Model:
    model = ir.load(path)
    lean(model.graph)
    ir.save(model, path.with_suffix(".lean.onnx"))
    return model


def node(kind: str, *names: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, names[:-1], names[-1:], **attributes)


CHAINS = {
    "elementwise": [node("Add", "j", "v", "a"), node("Tanh", "a", "b"), node("Mul", "b", "j", "z")],
    "product": [node("MatMul", "j", "w", "a"), node("Relu", "a", "z")],
    "time first": [
        node("Transpose", "j", "a", perm=[1, 0, 2]),
        node("MatMul", "a", "w", "b"),
        node("Transpose", "b", "z", perm=[1, 0, 2]),
    ],
    "norm": [node("LayerNormalization", "j", "v", "a", axis=-1), node("Softmax", "a", "z", axis=2)],
}


def run(path: Path, time: int, ahead: int) -> np.ndarray:
    rng = np.random.default_rng(time)
    feeds = {"x": rng.standard_normal((3, time, 4)), "x_ahead": rng.standard_normal((3, ahead, 4))}
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {name: value.astype(np.float32) for name, value in feeds.items()})
    return y


@pytest.mark.parametrize("chain", CHAINS)
def test_a_cut_moves_to_where_the_parts_were_joined(tmp_path: Path, chain: str) -> None:
    """Work frame by frame is done on the block alone, and the bits stay."""
    path = cut_graph(tmp_path / "cut.onnx", CHAINS[chain])
    kinds = Counter(each.op_type for each in leaned(path).graph)
    assert not kinds["Concat"]
    assert not kinds["Slice"]
    for time, ahead in ((5, 2), (1, 3), (4, 0)):
        np.testing.assert_array_equal(run(path.with_suffix(".lean.onnx"), time, ahead), run(path, time, ahead))


MIXING = {
    "sum so far": [node("CumSum", "j", "one", "z")],
    "softmax over time": [node("Softmax", "j", "z", axis=1)],
    "mean over time": [node("ReduceMean", "j", "one", "a"), node("Sub", "j", "a", "z")],
    "product over time": [
        node("Transpose", "j", "a", perm=[0, 2, 1]),
        node("MatMul", "j", "a", "b"),
        node("MatMul", "b", "j", "z"),
    ],
}


@pytest.mark.parametrize("mixing", MIXING)
def test_a_cut_stays_behind_what_mixes_frames(tmp_path: Path, mixing: str) -> None:
    """Where frames ahead have a part in the block's answer, they keep it."""
    path = cut_graph(tmp_path / "cut.onnx", MIXING[mixing])
    leaned(path)
    y = run(path.with_suffix(".lean.onnx"), 5, 2)
    np.testing.assert_array_equal(y, run(path, 5, 2))
