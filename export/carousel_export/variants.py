"""Variants: a bundle's ONNX files in other arithmetic, int8 or float16, with the same inputs, outputs and states."""

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto
from onnx_ir.passes.common import DeduplicateInitializersPass

from carousel_export.errors import ExportError, GraphError, one_line

VARIANTS = ("int8", "float16")
FLOAT32 = "float32"
# Of recurrent nodes, onnxruntime's dynamic quantisation knows this one alone.
_QUANTIZED = {"LSTM": "DynamicQuantizeLSTM"}
_FLOAT_ONLY = ("GRU", "RNN")


def check_variants(variants: Iterable[str]) -> tuple[str, ...]:
    """Each once, in order. Raises `ExportError` for one that is not known."""
    asked = tuple(dict.fromkeys(variants))
    if unknown := [variant for variant in asked if variant not in VARIANTS]:
        raise ExportError(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    return asked


def variant_file(file: str, variant: str) -> str:
    """`model.onnx` in a variant: `model.int8.onnx`."""
    return file if variant == FLOAT32 else f"{file.removesuffix('.onnx')}.{variant}.onnx"


def write_variant(folder: Path, file: str, variant: str) -> str:
    """Write `file` of `folder` in a variant, beside it; in words, which recurrent nodes changed.

    int8: weights are stored as int8 and activations quantised as they come, over the whole batch. float16: weights and
    arithmetic are float16, and the graph's own inputs, outputs and states stay float32. Raises `GraphError` where
    onnxruntime's converter fails or leaves an LSTM as it was.
    """
    model = onnx.load(folder / file)
    try:
        changed = _quantize(model) if variant == "int8" else _halve(model)
        # Shapes and types of all that lies between, which onnxruntime would refuse later and less plainly.
        onnx.checker.check_model(changed, full_check=True)
        onnx.save(changed, folder / variant_file(file, variant))
    except Exception as error:  # the converters raise whatever they meet
        raise GraphError(
            f"{file} could not be turned to {variant}: {one_line(error)}; export without --variant {variant}"
        ) from error
    before, after = _count(model.graph), _count(changed.graph)
    if variant != "int8":
        return "weights and arithmetic in float16, inputs, outputs and states in float32"
    quantized = after[_QUANTIZED["LSTM"]]
    if quantized < before["LSTM"]:
        raise GraphError(
            f"{file}: onnxruntime quantised {quantized} of {before['LSTM']} LSTM nodes; export without --variant int8"
        )
    said = [f"{quantized} of {before['LSTM']} LSTM nodes quantised"] if before["LSTM"] else []
    kept = [f"{before[kind]} {kind}" for kind in _FLOAT_ONLY if before[kind]]
    if kept:
        said.append(f"{' and '.join(kept)} nodes stay float32, which onnxruntime does not quantise")
    if before["Scan"] or before["Loop"]:
        said.append("what a loop repeats stays float32")
    return "; ".join(said) or "matrix products quantised; there is no LSTM node"


def _quantize(model: ModelProto) -> ModelProto:
    from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415 -- slow to import, and seldom wanted

    own = _copy(model)
    _unshare(own.graph)
    # The quantiser transposes weights of a Gemm and leaves their shapes as they stood; they are inferred anew.
    del own.graph.value_info[:]
    with _muted(), tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.onnx"
        quantize_dynamic(own, target)
        changed = ir.from_proto(onnx.load(target))
    DeduplicateInitializersPass(size_limit=sys.maxsize)(changed)
    written: ModelProto = ir.to_proto(changed)
    return written


def _halve(model: ModelProto) -> ModelProto:
    path = sys.path.copy()
    # This package puts its own folder on the module path when it is imported, and the quantiser finds modules there.
    import onnxruntime.quantization  # noqa: PLC0415, F401 -- as above
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415 -- as above

    sys.path[:] = path
    own = _copy(model)
    _separate(own.graph, {value.name for value in (*own.graph.input, *own.graph.output)})
    changed = ir.from_proto(convert_float_to_float16(own, keep_io_types=True))
    # The converter puts its casts last, and a node stands after those that it takes from.
    changed.graph.sort()
    written: ModelProto = ir.to_proto(changed)
    return written


def _copy(model: ModelProto) -> ModelProto:
    """The converters write into what they are given."""
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied


def _unshare(graph: GraphProto) -> None:
    """Give each LSTM node weights of its own: the quantiser transposes them once for each node that takes them."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    used: set[str] = set()
    for number, node in enumerate(node for node in graph.node if node.op_type in _QUANTIZED):
        for i in (1, 2):
            name = node.input[i]
            if name in used and name in weights:
                copied = onnx.TensorProto()
                copied.CopyFrom(weights[name])
                copied.name = node.input[i] = f"{name}.copy{number}"
                graph.initializer.append(copied)
            used.add(name)


def _separate(graph: GraphProto, taken: set[str]) -> None:
    """Rename what inner graphs call as the graph's own inputs or outputs: the converter takes the one for the other."""
    for node in graph.node:
        for inner in _graphs(node):
            local = {value.name for value in inner.input} | {name for each in inner.node for name in each.output}
            _rename(inner, {name: f"{name}.inner" for name in local & taken})
            _separate(inner, taken)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
        for inner in _graphs(node):
            _rename(inner, names)


def _graphs(node: NodeProto) -> list[GraphProto]:
    """A loop's or a branch's body."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _count(graph: GraphProto) -> Counter[str]:
    """Nodes by operator, those of inner graphs too."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[node.op_type] += 1
        for inner in _graphs(node):
            counts += _count(inner)
    return counts


@contextmanager
def _muted() -> Iterator[None]:
    """Without the quantiser's advice to the root logger to run a step that is for image models."""

    def wanted(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root, kept = logging.getLogger(), logging.NullHandler()
    root.addFilter(wanted)
    # With no handler at all, its advice would put one on the root logger, for good.
    root.addHandler(kept)
    try:
        yield
    finally:
        root.removeHandler(kept)
        root.removeFilter(wanted)
