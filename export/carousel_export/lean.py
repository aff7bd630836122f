"""A graph without the work that its outputs have no use for, and without transpositions that another can take over.

The lookahead graph joins a block and the frames ahead, runs the user's code over both, and cuts the outputs at the
block's end. A cut of what works frame by frame is that work on the cut: moved up to where the parts were joined, it
leaves the frames ahead of the last layer unread, and what computed them is dropped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

# Operators that compute each element from those that broadcasting puts beside it.
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
    "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "Where", "Xor",
})  # fmt: skip
# Operators that mix along the axis `axis` alone, or from it on.
_ALONG = {"Softmax": True, "LogSoftmax": True, "LayerNormalization": False, "RMSNormalization": False}


def lean(graph: ir.Graph) -> None:
    """Rewrite a graph in place to one that computes the same."""
    cutter = _Cutter(graph)
    for node in list(graph):
        if node.op_type == "Slice":
            cutter.move(node)
    for node in list(graph):
        if node.op_type == "Transpose":
            _merge_transposes(graph, node)
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    graph.sort()


@dataclass(frozen=True)
class _Cut:
    """What a Slice keeps: along `axis`, the part before (`head`) or from the size that `size` names on."""

    axis: int
    size: str
    head: bool


@dataclass
class _Cutter:
    """Cuts of joined values as what the parts give."""

    graph: ir.Graph
    # What a value's cut is: a value that is there, or None where it cannot be told.
    made: dict[tuple[ir.Value, _Cut], ir.Value] = field(default_factory=dict)
    hopeless: set[tuple[ir.Value, _Cut]] = field(default_factory=set)

    def move(self, node: ir.Node) -> None:
        """Replace the Slice by its input's parts, where all of what it cuts can be told from them."""
        cut = _read_cut(node)
        source, result = node.inputs[0], node.outputs[0]
        if cut is None or source is None or not self._can(source, cut):
            return
        cut_value = self._make(source, cut)
        if result.is_graph_output():
            # The name is the contract's, and the value may be used elsewhere.
            own = ir.node("Identity", [cut_value])
            self.graph.append(own)
            name, result.name = result.name, None
            own.outputs[0].name = name
            own.outputs[0].shape, own.outputs[0].type = result.shape, result.type
            cut_value = own.outputs[0]
        convenience.replace_all_uses_with(result, cut_value, replace_graph_outputs=True)

    def _can(self, value: ir.Value, cut: _Cut) -> bool:
        if (value, cut) in self.made:
            return True
        if (value, cut) in self.hopeless:
            return False
        node = value.producer()
        if node is not None:
            if _joins(node, cut):
                return True
            parts = _parts(node, cut)
            if parts is not None and all(part is None or self._can(value, part) for value, part in parts):
                return True
        self.hopeless.add((value, cut))
        return False

    def _make(self, value: ir.Value, cut: _Cut) -> ir.Value:
        if (value, cut) in self.made:
            return self.made[value, cut]
        node = value.producer()
        assert node is not None, "asked only for what can be cut"
        if _joins(node, cut):
            part = node.inputs[0 if cut.head else 1]
            assert part is not None, "Concat has no input left out"
            return part
        parts = _parts(node, cut)
        assert parts is not None, "asked only for what can be cut"
        whole = iter(parts)
        inputs = [None if each is None else self._cut_input(*next(whole)) for each in node.inputs]
        copied = ir.node(node.op_type, inputs, {name: attr.value for name, attr in node.attributes.items()})
        self.graph.append(copied)
        (made,) = copied.outputs
        made.type = value.type
        self.made[value, cut] = made
        return made

    def _cut_input(self, value: ir.Value, cut: _Cut | None) -> ir.Value:
        return value if cut is None else self._make(value, cut)


def _read_cut(node: ir.Node) -> _Cut | None:
    """The cut of a Slice at the size of another value's axis; None for any other Slice."""
    if len(node.inputs) < 5 or (source := node.inputs[0]) is None or source.shape is None:
        return None
    start, end, step = (_constant(node.inputs[i]) for i in (1, 2, 4))
    axes = _constant(node.inputs[3])
    if axes is None or len(axes) != 1 or step != (1,):
        return None
    axis = axes[0] % len(source.shape)
    if start == (0,) and (size := _size_of(node.inputs[2])):
        return _Cut(axis, size, head=True)
    if end is not None and end[0] >= 2**31 - 1 and (size := _size_of(node.inputs[1])):
        return _Cut(axis, size, head=False)
    return None


def _constant(value: ir.Value | None) -> tuple[int, ...] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(int(number) for number in np.atleast_1d(tensor.numpy()))


def _size_of(value: ir.Value | None) -> str | None:
    """The name of the dimension that a value holds the size of, as `Shape` of one axis gives it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Shape" or (source := node.inputs[0]) is None or source.shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(source.shape))
    dim = source.shape[start]
    return dim.value if end - start == 1 and isinstance(dim, ir.SymbolicDim) else None


def _joins(node: ir.Node, cut: _Cut) -> bool:
    """Whether the node put two parts together where the cut is, the first of the cut's size."""
    if node.op_type != "Concat" or len(node.inputs) != 2 or (first := node.inputs[0]) is None or first.shape is None:
        return False
    return node.attributes.get_int("axis") % len(first.shape) == cut.axis and _dim(first, cut.axis) == cut.size


def _parts(node: ir.Node, cut: _Cut) -> list[tuple[ir.Value, _Cut | None]] | None:
    """The node's inputs with the cuts of which it makes its output's, None for one to be taken whole; None: it cannot.

    Inputs that are left out are left out here.
    """
    if node.domain or len(node.outputs) != 1:
        return None
    inputs = [value for value in node.inputs if value is not None]
    shape = node.outputs[0].shape
    if shape is None or any(value.shape is None for value in inputs):
        return None
    axes = list(_axes(node, cut.axis, inputs))
    if len(axes) != len(inputs):
        return None
    return [
        (value, None if axis is None else _Cut(axis, cut.size, cut.head))
        for value, axis in zip(inputs, axes, strict=True)
    ]


def _axes(node: ir.Node, axis: int, inputs: Sequence[ir.Value]) -> Iterator[int | None]:
    """Of each input, the axis that the output's `axis` is made of, or None where it has none; fewer: not known."""
    kind, first, result = node.op_type, inputs[0], node.outputs[0]
    assert first.shape is not None, "checked before"
    assert result.shape is not None, "checked before"
    rank = len(result.shape)
    if kind in _ELEMENTWISE:
        yield from _broadcast(result, axis, inputs)
    elif kind == "Transpose":
        yield list(node.attributes.get_ints("perm", range(rank)[::-1]))[axis]
    elif kind in _ALONG:
        along = node.attributes.get_int("axis", -1) % rank
        if axis < along or (axis > along and _ALONG[kind]):
            yield from (axis, *[None] * (len(inputs) - 1))
    elif kind == "Concat" and node.attributes.get_int("axis") % rank != axis:
        yield from [axis] * len(inputs)
    elif kind == "MatMul" and len(first.shape) == rank > axis + 1:
        # Above the last two axes both sides have it, unless the right one is a plain matrix.
        if axis == rank - 2 or len(inputs[1].shape or ()) == 2:
            yield from (axis, None)
    elif kind == "Gather" and node.attributes.get_int("axis", 0) == 0 and axis < len(inputs[1].shape or ()):
        yield from (None, axis)
    elif kind in ("ArgMax", "ArgMin"):
        along = node.attributes.get_int("axis", 0) % len(first.shape)
        kept = axis < along or bool(node.attributes.get_int("keepdims", 1))
        if axis != along or not kept:
            yield axis if kept else axis + 1


def _broadcast(result: ir.Value, axis: int, inputs: Sequence[ir.Value]) -> Iterator[int | None]:
    assert result.shape is not None, "checked before"
    for value in inputs:
        assert value.shape is not None, "checked before"
        own = axis - (len(result.shape) - len(value.shape))
        if own < 0 or value.shape[own] == 1:
            yield None
        elif _dim(value, own) == _dim(result, axis):
            yield own


def _dim(value: ir.Value, axis: int) -> str:
    dim = value.shape[axis] if value.shape is not None else None
    return str(dim.value if isinstance(dim, ir.SymbolicDim) else dim)


def _merge_transposes(graph: ir.Graph, last: ir.Node) -> None:
    """Y `[time, directions, batch, size]`, its directions put side by side and then made batch first: in one move."""
    reshape = last.inputs[0].producer() if last.inputs[0] is not None else None
    if reshape is None or reshape.op_type != "Reshape" or list(last.attributes.get_ints("perm", ())) != [1, 0, 2]:
        return
    source, shape = reshape.inputs
    first = source.producer() if source is not None else None
    sizes = _constant(shape)
    if first is None or first.op_type != "Transpose" or list(first.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
        return
    if sizes is None or sizes[:2] != (0, 0) or len(sizes) != 3:
        return
    (result,) = last.outputs
    if result.is_graph_output():
        return
    moved = ir.node("Transpose", first.inputs, {"perm": [2, 0, 1, 3]})
    flat = ir.node("Reshape", [moved.outputs[0], shape])
    graph.extend([moved, flat])
    flat.outputs[0].shape, flat.outputs[0].type = result.shape, result.type
    convenience.replace_all_uses_with(result, flat.outputs[0])
