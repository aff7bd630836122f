"""The ONNX files: a lifted model through torch's exporter, then checked for what every graph must have."""

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from carousel_export import viterbi
from carousel_export.eager import Eager
from carousel_export.errors import GraphError, one_line
from carousel_export.lean import lean
from carousel_export.lift import LiftedModel, bind_onnx, lift
from carousel_export.nodes import repeat
from carousel_export.operators import OPSET, TRANSLATIONS
from carousel_export.place import find_place
from carousel_export.quiet import quiet
from carousel_export.runs import grow
from carousel_export.signature import AHEAD, BATCH, LENGTHS, TIME, TIME_AHEAD, Dims, Signature, follows_time
from carousel_export.step import Step, frame_dims, frame_of
from carousel_export.tied import tie

MODEL, LOOKAHEAD = "model.onnx", "lookahead.onnx"
# What torch raises where Python asks for a value that it does not have, as `if` and `.item()` do.
_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "PendingUnbackedSymbolNotFound")


def write_graph(
    path: Path, eager: Eager, signature: Signature, example: Sequence[Tensor], *, ahead: bool = False
) -> None:
    """Write the model's graph, or with `ahead` its lookahead graph, to a self-contained ONNX file.

    Raises `GraphError` where the model's own code is beyond the exporter, or ties an axis to the example's size.
    """
    lifted = lift(eager, signature, bind_onnx)
    dims = taken = input_dims(signature, ahead=ahead)
    tensors = trace_inputs(eager, signature, example, ahead=ahead)
    module: nn.Module = _Lookahead(lifted).eval() if ahead else lifted
    if signature.stepwise:
        module, taken, tensors = Step(lifted).eval(), frame_dims(dims, signature), frame_of(tensors, signature)
    named = {name: Dim(name) for name in (BATCH, TIME, TIME_AHEAD, *signature.sources)}
    shapes = [{axis: named[dim] for axis, dim in enumerate(axes) if dim in named} for axes in taken.values()]
    try:
        # torch prints the unfinished graph of an export that fails; its message says enough.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.onnx.export(
                module,
                tuple(tensors),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(taken),
                output_names=signature.output_names(),
                dynamic_shapes=(tuple(shapes),),
                custom_translation_table={**TRANSLATIONS, **viterbi.TRANSLATIONS},
            )
            assert program is not None, "with dynamo, the exporter returns a program"
            _separate_names(program.model.graph)
            lean(program.model.graph)
            program.save(path, external_data=False)
    except Exception as error:
        raise GraphError(_refusal(eager, path.name, lifted.model, error)) from error
    _check_bounds(program.exported_program, taken, eager)
    if signature.stepwise:
        repeat(path, dims, signature)
    tie(path)
    _check_dims(path, dims, signature)


def _separate_names(graph: ir.Graph) -> None:
    """A value inside, as of a function that was inlined, may have been given the name of one of the graph's outputs."""
    outside = {id(value): value.name for value in (*graph.inputs, *graph.outputs)}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if id(value) not in outside and value.name in outside.values():
                value.name = f"{value.name}.inside"


def input_dims(signature: Signature, *, ahead: bool) -> dict[str, Dims]:
    """The dimensions of each graph input, in order."""
    dims: dict[str, Dims] = {}
    for port in signature.inputs:
        dims[port.name] = port.dims
        dims[port.name + AHEAD] = tuple(TIME_AHEAD if dim == TIME else dim for dim in port.dims)
    dims |= {LENGTHS: (BATCH,), LENGTHS + AHEAD: (BATCH,)}
    dims |= {port.name: port.dims for port in signature.contexts}
    dims |= {state.input: state.dims for state in signature.states}
    return {name: dims[name] for name in signature.input_names(ahead=ahead)}


def trace_inputs(eager: Eager, signature: Signature, example: Sequence[Tensor], *, ahead: bool) -> list[Tensor]:
    """The example at sizes unlike any other of the model's, so that no axis is taken for another."""
    ports = (*signature.inputs, *signature.contexts)
    taken = {int(dim) for port in (*ports, *signature.outputs) for dim in port.dims if dim.isdecimal()}
    taken |= {size for state in signature.states for size in state.shape}
    names = (BATCH, TIME_AHEAD, *signature.sources)
    free = [size for size in eager.free_sizes(len(names) + len(taken), 11) if size not in taken]
    sizes = dict(zip(names, free, strict=False))
    taken |= set(sizes.values())
    # Behind strides, too, frames are several: the exporter takes a size of one for a constant.
    (least,) = signature.lengths([11 + 2 * signature.stride])
    sizes[TIME] = next(size for size in eager.free_sizes(1 + len(taken), least) if size not in taken)
    tensors = {}
    for name, x in zip(signature.arguments, example, strict=True):
        port = next(port for port in ports if port.name == name)
        for suffix in ("", AHEAD) if port.timed else ("",):
            grown = x
            for axis, dim in enumerate(port.eager_dims):
                if dim in sizes:
                    grown = grow(grown, axis, sizes[TIME_AHEAD if (dim, suffix) == (TIME, AHEAD) else dim])
            if BATCH in port.eager_dims:
                tensors[name + suffix] = port.fetch(grown)
            else:
                rest = grown.movedim(port.eager_dims.index(TIME), 0)
                tensors[name + suffix] = torch.stack([rest] * sizes[BATCH])
    for name, time in ((LENGTHS, TIME), (LENGTHS + AHEAD, TIME_AHEAD)):
        tensors[name] = torch.arange(sizes[BATCH], dtype=torch.int32).clamp(max=sizes[time] - 1) + 1
    for state in signature.states:
        tensors[state.input] = state.zeros(sizes[BATCH])
    return [tensors[name].contiguous() for name in signature.input_names(ahead=ahead)]


class _Lookahead(nn.Module):
    """The exporter takes a module's `forward` only."""

    def __init__(self, lifted: LiftedModel) -> None:
        super().__init__()
        self.lifted = lifted

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.lifted.lookahead(*tensors)


def _refusal(eager: Eager, file: str, model: nn.Module, error: BaseException) -> str:
    """Why the exporter failed, in a line: where in whose forward, and what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    where = find_place(error, model)
    if type(error).__name__ in _DATA_DEPENDENT:
        return (
            f"{where or eager.name} depends on the values of a tensor, and a graph is one for all values; choose with "
            "torch.where, and count by sizes, which are known"
        )
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error)):
        return (
            f"{where or eager.name}: there is no ONNX operator for {missing[1]}; compute the same with other functions"
        )
    return (
        f"{eager.name} could not be exported to {file}: {one_line(error)}{f', in {where}' if where else ''}; write its "
        "forward without branches on values and without sizes taken from the example"
    )


def _check_bounds(program: ExportedProgram | None, inputs: dict[str, Dims], eager: Eager) -> None:
    """What forward decides by a size holds in a graph for the sizes that decide as the example's do, and no others."""
    assert program is not None, "with dynamo, there is the program that the graph is of"
    given = set(program.graph_signature.user_inputs)
    tensors = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    for x, dims in zip(tensors, inputs.values(), strict=True):
        for size, dim in zip(x.shape, dims, strict=True):
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            # Without a bound it is a number of its own kind, greater than any.
            if bounds is not None and bounds.upper.is_Integer:
                raise GraphError(
                    f"{eager.name} decides by its input's size, as `if x.shape[…] > {bounds.upper}` does: the graph "
                    f"would be wrong where {dim} is over {bounds.upper}; write forward alike for every size"
                )


def _check_dims(path: Path, inputs: dict[str, Dims], signature: Signature) -> None:
    """Every dynamic dimension is named, and is dynamic: a graph with the example's sizes in it is refused here."""
    outputs = {port.name: port.dims for port in signature.outputs}
    outputs |= {state.output: state.dims for state in signature.states}
    following = {dim for port in signature.outputs for dim in port.dims if follows_time(dim)}
    model = onnx.load(path)
    for values, wanted in ((model.graph.input, inputs), (model.graph.output, outputs)):
        if [value.name for value in values] != list(wanted):
            raise GraphError(
                f"{path.name} has {[v.name for v in values]} where {list(wanted)} are wanted; report this model"
            )
        for value in values:
            dims = value.type.tensor_type.shape.dim
            for dim, name in zip(dims, wanted[value.name], strict=False):
                # The exporter calls it by how it is computed; whether that is what it should be, the gate finds.
                if dim.dim_param and name in following:
                    dim.dim_param = name
            found = tuple(dim.dim_param or str(dim.dim_value) for dim in dims)
            if found != wanted[value.name]:
                raise GraphError(
                    f"{path.name}: {value.name} came out as [{', '.join(found)}] where "
                    f"[{', '.join(wanted[value.name])}] is wanted: forward ties a size to the example's; compute with "
                    "sizes as x.shape gives them, without int() and len(), with functions that take tensors of any "
                    "size, and without Python loops over it (for a CRF there is cx.viterbi_decode)"
                )
    onnx.checker.check_model(model)
    onnx.save(model, path)
