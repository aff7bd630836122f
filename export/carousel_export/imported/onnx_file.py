"""An ONNX file that somebody else exported, run as it is, and rewritten to the graph contract around itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, compose, helper, numpy_helper
from torch import Tensor

from carousel_export.errors import ExampleError, GraphError, ModelError, one_line
from carousel_export.graph import MODEL, input_dims
from carousel_export.imported.foreign import Declared, Plan, Scalar, Value
from carousel_export.nodes import DTYPES, ONNX_DTYPES, declare, from_first, repeated, to_first, transpose
from carousel_export.signature import LENGTHS, Port

_PREFIX = "imported/"


class OnnxFile:
    """Raises `ModelError` for a file that onnxruntime does not load, or one with a dtype that a bundle has not."""

    runtime = "onnxruntime"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = onnx.load(path)
            onnx.checker.check_model(self._model)
            self._session = _load(_undeclared(self._model))
        except Exception as error:  # protobuf, onnx and onnxruntime each raise their own
            raise ModelError(f"{path.name} cannot be read as ONNX: {one_line(error)}") from error
        weights = {tensor.name for tensor in self._model.graph.initializer}
        self.inputs = tuple(_value(value) for value in self._model.graph.input if value.name not in weights)
        self.outputs = tuple(_value(value) for value in self._model.graph.output)
        floats = (t for t in self._model.graph.initializer if t.data_type == TensorProto.FLOAT)
        self.parameters = sum(int(np.prod(tensor.dims)) for tensor in floats)

    def run(self, values: Mapping[str, Tensor | Scalar]) -> list[Tensor]:
        """Its outputs. Raises `ExampleError`, in one line, where it fails."""
        feeds = {name: value.contiguous().numpy() for name, value in values.items() if isinstance(value, Tensor)}
        try:
            results = self._session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise ExampleError(f"{self.path.name} fails on {shapes}: {one_line(error)}") from error
        return [torch.from_numpy(result) for result in results]

    def write(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Write model.onnx: the file's own graph, between transpositions, casts and constants."""
        inner = compose.add_prefix(_undeclared(self._model), _PREFIX)
        graph, signature = inner.graph, plan.signature
        weights = {tensor.name for tensor in graph.initializer}
        kept = [value for value in graph.input if value.name in weights]
        for name, constant in plan.constants.items():
            assert isinstance(constant, Tensor), "an ONNX file takes tensors"
            graph.initializer.append(numpy_helper.from_array(constant.numpy(), _PREFIX + name))
        nodes = _repeated(graph, plan) if plan.stepwise else _between(graph, plan)
        del graph.node[:], graph.input[:], graph.output[:]
        graph.node.extend(nodes)
        kinds = {LENGTHS: torch.int32} | {port.name: port.dtype for port in (*signature.inputs, *signature.outputs)}
        kinds |= {name: state.dtype for state in signature.states for name in (state.input, state.output)}
        for name, dims in input_dims(signature, ahead=False).items():
            graph.input.append(declare(name, kinds[name], dims))
        graph.input.extend(kept)
        for name, dims in _output_dims(plan).items():
            graph.output.append(declare(name, kinds[name], dims))
        onnx.checker.check_model(inner)
        onnx.save(inner, folder / MODEL)
        return (MODEL,)


def _repeated(graph: GraphProto, plan: Plan) -> list[NodeProto]:
    """The graph's nodes over time. Raises `GraphError` for a file that takes lengths as well."""
    if plan.lengths is not None:
        raise GraphError(f"{plan.lengths[0]!r} counts frames of a file that takes one a call; give it with --constant")
    return repeated(graph, plan.signature, _PREFIX, {name: plan.axis(name) for name in plan.dims})


def _between(graph: GraphProto, plan: Plan) -> list[NodeProto]:
    """The graph's nodes, with what brings the contract's tensors into the file's axes and back."""
    signature = plan.signature
    before = [transpose(p.name, _PREFIX + p.name, _order(p, fetch=False)) for p in signature.inputs]
    if plan.lengths is not None:
        name, dtype = plan.lengths
        before.append(helper.make_node("Cast", [LENGTHS], [_PREFIX + name], to=ONNX_DTYPES[dtype]))
    before += [
        transpose(s.input, _PREFIX + s.input, from_first(plan.axis(s.input), 1 + len(s.shape)))
        for s in signature.states
    ]
    after = [transpose(_PREFIX + p.name, p.name, _order(p, fetch=True)) for p in signature.outputs]
    after += [
        transpose(_PREFIX + s.output, s.output, to_first(plan.axis(s.output), 1 + len(s.shape)))
        for s in signature.states
    ]
    return [*before, *graph.node, *after]


def _load(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _undeclared(model: ModelProto) -> ModelProto:
    """The same graph, without the sizes that it declares and may not need, a batch's of one, say."""
    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    weights = {tensor.name for tensor in bare.graph.initializer}
    for value in (*bare.graph.input, *bare.graph.output):
        if value.name not in weights and value.type.tensor_type.HasField("shape"):
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
    return bare


def _value(value: onnx.ValueInfoProto) -> Value:
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{value.name!r} is no tensor, and a bundle has nothing else")
    dtype = DTYPES.get(kind := value.type.tensor_type.elem_type)
    if dtype is None:
        name = TensorProto.DataType.Name(kind).lower()
        raise ModelError(f"{value.name!r} is {name}; a bundle has float32, whole numbers and bool")
    dims: Declared | None = None
    if value.type.tensor_type.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
    return Value(value.name, dtype, dims)


def _order(port: Port, *, fetch: bool) -> list[int]:
    """The transposition from the graph's axes to the file's, or with `fetch` back."""
    # As `Port.feed` and `Port.fetch` do it, on the axes' own numbers.
    axes = torch.empty([2 + i for i in range(len(port.dims))])
    moved = port.fetch(axes) if fetch else port.feed(axes)
    return [size - 2 for size in moved.shape]


def _output_dims(plan: Plan) -> dict[str, Any]:
    dims: dict[str, Any] = {port.name: port.dims for port in plan.signature.outputs}
    return dims | {state.output: state.dims for state in plan.signature.states}
