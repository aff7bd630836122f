"""Files as somebody else writes them."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def counting(path: Path) -> Path:
    """An ONNX file: y is the sum of x so far, plus sr; its states are s [batch, 2] and n int64 [batch, 1, 2, 1]."""
    shape = {"x": ["batch", "frames", 2], "s": ["batch", 2], "n": ["batch", 1, 2, 1], "sr": []}
    kinds = {"n": TensorProto.INT64, "sr": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), v) for k, v in shape.items()]
    outs = {"y": shape["x"], "next_s": shape["s"], "n_out": shape["n"]}
    outputs = [
        helper.make_tensor_value_info(k, TensorProto.INT64 if k == "n_out" else TensorProto.FLOAT, v)
        for k, v in outs.items()
    ]
    nodes = [
        helper.make_node("CumSum", ["x", "one"], ["sum"]),
        helper.make_node("Unsqueeze", ["s", "axes"], ["before"]),
        helper.make_node("Add", ["sum", "before"], ["running"]),
        helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["running", "rate"], ["y"]),
        helper.make_node("Gather", ["running", "last"], ["next_s"], axis=1),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Gather", ["size", "one"], ["count"]),
        helper.make_node("Add", ["n", "count"], ["n_out"]),
    ]
    values = {"one": ([], [1]), "axes": ([1], [1]), "last": ([], [-1])}
    weights = [helper.make_tensor(k, TensorProto.INT64, dims, v) for k, (dims, v) in values.items()]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def gated(path: Path) -> Path:
    """An ONNX file that takes one frame a call: y = state' = tanh(x + state / 2) of [batch, 4], state [1, batch, 4]."""
    shape = {"input": ["batch", 4], "state": [1, "batch", 4], "output": ["batch", 4], "stateN": [1, "batch", 4]}
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shape.items()}
    nodes = [
        helper.make_node("Mul", ["state", "half"], ["before"]),
        helper.make_node("Add", ["input", "before"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["stateN"]),
        helper.make_node("Squeeze", ["stateN", "first"], ["output"]),
    ]
    weights = [helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])]
    weights.append(helper.make_tensor("first", TensorProto.INT64, [1], [0]))
    inputs, outputs = ([info[name] for name in names] for names in (("input", "state"), ("output", "stateN")))
    graph = helper.make_graph(nodes, "gated", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
