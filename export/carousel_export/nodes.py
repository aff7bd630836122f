"""ONNX nodes around a graph: axes moved, and a graph of one frame repeated over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, compose, helper

from carousel_export.signature import BATCH, LENGTHS, Dims, Signature

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
ONNX_DTYPES = {dtype: kind for kind, dtype in DTYPES.items()}
_STEP, _FRAME = "step/", "frame/"


def transpose(source: str, target: str, order: Sequence[int]) -> NodeProto:
    """A transposition, or an identity where the order stays."""
    if list(order) == sorted(order):
        return helper.make_node("Identity", [source], [target])
    return helper.make_node("Transpose", [source], [target], perm=list(order))


def from_first(axis: int, rank: int) -> list[int]:
    """The order that moves the first axis to `axis`."""
    return [*range(1, axis + 1), 0, *range(axis + 1, rank)]


def to_first(axis: int, rank: int) -> list[int]:
    """The order that moves `axis` to the front."""
    return [axis, *(i for i in range(rank) if i != axis)]


def declare(name: str, dtype: torch.dtype, dims: Sequence[str]) -> ValueInfoProto:
    """An input or output: sizes, and names for what may grow."""
    return helper.make_tensor_value_info(
        name, ONNX_DTYPES[dtype], [int(dim) if dim.isdecimal() else dim for dim in dims]
    )


def repeated(graph: GraphProto, signature: Signature, prefix: str, axes: Mapping[str, int]) -> list[NodeProto]:
    """The graph, which takes one frame a call, as the body of a Scan over time; a row's states stop at its length.

    The graph's tensors are those of the signature with `prefix` before their names, a frame's without time. `axes` says
    where the batch is in each of them but the contexts, where it is first.
    """
    counter = _STEP + "frame"
    inputs = [helper.make_tensor_value_info(counter, TensorProto.INT32, [])]
    body = [helper.make_node("Less", [counter, LENGTHS], [_STEP + "running"])]
    outputs = [helper.make_tensor_value_info(counter + ".next", TensorProto.INT32, [])]
    last = [helper.make_node("Add", [counter, _STEP + "one"], [counter + ".next"])]
    constants = [_constant(_STEP + "one", 1), _constant(_STEP + "start", 0)]
    body += [helper.make_node("Identity", [port.name], [prefix + port.name]) for port in signature.contexts]
    for state in signature.states:
        inputs.append(declare(_STEP + state.input, state.dtype, state.dims))
        outputs.append(declare(_STEP + state.output, state.dtype, state.dims))
        rank = 1 + len(state.shape)
        body.append(transpose(_STEP + state.input, prefix + state.input, from_first(axes[state.input], rank)))
        after, mask, shape = (f"{_STEP}{state.output}.{part}" for part in ("after", "running", "shape"))
        last += [
            transpose(prefix + state.output, after, to_first(axes[state.output], rank)),
            _shape(shape, [-1] + [1] * (rank - 1)),
            helper.make_node("Reshape", [_STEP + "running", shape], [mask]),
            helper.make_node("Where", [mask, after, _STEP + state.input], [_STEP + state.output]),
        ]
    for port in signature.inputs:
        frame = (BATCH, *port.dims[2:])
        inputs.append(declare(_STEP + port.name, port.dtype, frame))
        body.append(transpose(_STEP + port.name, prefix + port.name, from_first(axes[port.name], len(frame))))
    for port in signature.outputs:
        frame = (BATCH, *port.dims[2:])
        outputs.append(declare(_STEP + port.name, port.dtype, frame))
        last.append(transpose(prefix + port.name, _STEP + port.name, to_first(axes[port.name], len(frame))))
    scan = helper.make_node(
        "Scan",
        [_STEP + "start", *(state.input for state in signature.states), *(port.name for port in signature.inputs)],
        [_STEP + "end", *(state.output for state in signature.states), *(port.name for port in signature.outputs)],
        body=helper.make_graph([*body, *graph.node, *last], "step", inputs, outputs),
        num_scan_inputs=len(signature.inputs),
        scan_input_axes=[1] * len(signature.inputs),
        scan_output_axes=[1] * len(signature.outputs),
    )
    return [*constants, scan]


def repeat(path: Path, dims: Mapping[str, Dims], signature: Signature) -> None:
    """Rewrite a file, the graph of one frame with the signature's names, to the graph contract over time.

    `dims` are the dimensions of what the contract's graph takes, in order.
    """
    model = compose.add_prefix(onnx.load(path), _FRAME)
    graph = model.graph
    states = [name for state in signature.states for name in (state.input, state.output)]
    axes = dict.fromkeys([*(port.name for port in (*signature.inputs, *signature.outputs)), *states], 0)
    nodes = repeated(graph, signature, _FRAME, axes)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    kinds = {port.name: port.dtype for port in (*signature.inputs, *signature.contexts)} | {LENGTHS: torch.int32}
    kinds |= {state.input: state.dtype for state in signature.states}
    graph.input.extend(declare(name, kinds[name], axes) for name, axes in dims.items())
    graph.output.extend(declare(port.name, port.dtype, port.dims) for port in signature.outputs)
    graph.output.extend(declare(state.output, state.dtype, state.dims) for state in signature.states)
    onnx.save(model, path)


def _constant(name: str, value: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT32, [], [value]))


def _shape(name: str, dims: Sequence[int]) -> NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [len(dims)], list(dims))
    )
