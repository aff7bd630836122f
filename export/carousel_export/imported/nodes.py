"""ONNX nodes around somebody else's graph: axes moved, and a graph of one frame repeated over time."""

from collections.abc import Sequence

import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from carousel_export.errors import GraphError
from carousel_export.imported.foreign import Plan
from carousel_export.signature import BATCH, LENGTHS

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
_STEP = "step/"


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


def repeated(graph: GraphProto, plan: Plan, prefix: str) -> list[NodeProto]:
    """The graph, which takes one frame a call, as the body of a Scan over time; a row's states stop at its length.

    Raises `GraphError` for a file that takes lengths as well.
    """
    if plan.lengths is not None:
        raise GraphError(f"{plan.lengths[0]!r} counts frames of a file that takes one a call; give it with --constant")
    signature = plan.signature
    counter = _STEP + "frame"
    inputs = [helper.make_tensor_value_info(counter, TensorProto.INT32, [])]
    body = [helper.make_node("Less", [counter, LENGTHS], [_STEP + "running"])]
    outputs = [helper.make_tensor_value_info(counter + ".next", TensorProto.INT32, [])]
    last = [helper.make_node("Add", [counter, _STEP + "one"], [counter + ".next"])]
    constants = [_constant(_STEP + "one", 1), _constant(_STEP + "start", 0)]
    for state in signature.states:
        inputs.append(declare(_STEP + state.input, state.dtype, state.dims))
        outputs.append(declare(_STEP + state.output, state.dtype, state.dims))
        rank = 1 + len(state.shape)
        body.append(transpose(_STEP + state.input, prefix + state.input, from_first(plan.axis(state.input), rank)))
        after, mask, shape = (f"{_STEP}{state.output}.{part}" for part in ("after", "running", "shape"))
        last += [
            transpose(prefix + state.output, after, to_first(plan.axis(state.output), rank)),
            _shape(shape, [-1] + [1] * (rank - 1)),
            helper.make_node("Reshape", [_STEP + "running", shape], [mask]),
            helper.make_node("Where", [mask, after, _STEP + state.input], [_STEP + state.output]),
        ]
    for port in signature.inputs:
        frame = (BATCH, *port.dims[2:])
        inputs.append(declare(_STEP + port.name, port.dtype, frame))
        body.append(transpose(_STEP + port.name, prefix + port.name, from_first(plan.axis(port.name), len(frame))))
    for port in signature.outputs:
        frame = (BATCH, *port.dims[2:])
        outputs.append(declare(_STEP + port.name, port.dtype, frame))
        last.append(transpose(prefix + port.name, _STEP + port.name, to_first(plan.axis(port.name), len(frame))))
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


def _constant(name: str, value: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT32, [], [value]))


def _shape(name: str, dims: Sequence[int]) -> NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [len(dims)], list(dims))
    )
