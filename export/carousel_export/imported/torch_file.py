"""A TorchScript file without its Python class, run as it is, and traced anew behind the graph contract."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import optimized_execution  # type: ignore[attr-defined]  # public, and not in its list
from torch.utils import _pytree as pytree

from carousel_export.errors import ExampleError, GraphError, ModelError, one_line
from carousel_export.graph import input_dims
from carousel_export.imported.foreign import Plan, Scalar, Value, to_contract, to_file
from carousel_export.quiet import quiet
from carousel_export.scripted import repeated
from carousel_export.signature import BATCH, LENGTHS, TIME, Dims
from carousel_export.torchscript import TORCHSCRIPT

_SIZES = {BATCH: 3, TIME: 11}
_NUMBERS = ("int", "float", "bool")


class TorchFile:
    """`given` are the dtype and the axes of the tensors that it takes, which the file does not say.

    Raises `ModelError` for a file that torch does not load, or whose `forward` takes something else than tensors,
    tuples of them and numbers.
    """

    runtime = "torch"

    def __init__(self, path: Path, given: Mapping[str, torch.dtype]) -> None:
        self.path = path
        try:
            with quiet():
                self._module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{path.name} cannot be read as TorchScript: {one_line(error)}") from error
        self._module.eval()
        # Each argument of forward with the names of its tensors: its own, or `hx.0` and `hx.1` for a pair.
        self._arguments: dict[str, tuple[str, ...]] = {}
        values = []
        for argument in self._module.forward.schema.arguments[1:]:
            kind = _unwrapped(argument.type)
            if kind.kind() == "TupleType":
                names = tuple(f"{argument.name}.{i}" for i in range(len(kind.elements())))
            elif kind.kind() == "TensorType" or str(kind) in _NUMBERS:
                names = (argument.name,)
            else:
                raise ModelError(
                    f"{path.name}: argument {argument.name!r} of forward is {kind}; it has to be a tensor, a tuple of "
                    "tensors or a number"
                )
            if argument.has_default_value() and not any(name in given for name in names):
                continue
            self._arguments[argument.name] = names
            values += [Value(name, given.get(name), None, number=str(kind) in _NUMBERS) for name in names]
        self.inputs = tuple(values)
        self.outputs: tuple[Value, ...] = ()
        self.parameters = sum(parameter.numel() for parameter in self._module.parameters())

    def run(self, values: Mapping[str, Tensor | Scalar]) -> list[Tensor]:
        """Its outputs. Raises `ExampleError`, in one line, where it fails."""
        try:
            with torch.no_grad(), optimized_execution(False):
                result = self.call(values)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in values.items() if isinstance(x, Tensor))
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise ExampleError(f"{self.path.name} fails on {shapes}: {last}") from error
        if not self.outputs:
            self.outputs = tuple(_outputs(result))
        return list(pytree.tree_leaves(result))

    def call(self, values: Mapping[str, Any]) -> Any:
        """The module's result as it returns it."""
        arguments = {}
        for name, parts in self._arguments.items():
            found = tuple(values[part] for part in parts)
            arguments[name] = found[0] if parts == (name,) else found
        return self._module(**arguments)

    def write(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Write model.pt: the file's own module behind a forward by the contract."""
        if plan.stepwise and plan.lengths is not None:
            raise GraphError(
                f"{plan.lengths[0]!r} counts frames of a file that takes one a call; give it with --constant"
            )
        example = _example(plan)
        try:
            with quiet(), torch.no_grad():
                contract = _Contract(self, plan)
                module = repeated(_Frame(contract), plan.signature, example) if plan.stepwise else contract
                traced = torch.jit.trace(module, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
                torch.jit.save(traced, folder / TORCHSCRIPT)
        except Exception as error:
            raise GraphError(
                f"{self.path.name} could not be traced to the axes of a bundle: {one_line(error)}; export it again "
                "with the batch and time as they come"
            ) from error
        return (TORCHSCRIPT,)


class _Contract(nn.Module):
    """The module with the contract's inputs and outputs. A script module in a trace keeps its own control flow."""

    def __init__(self, file: TorchFile, plan: Plan) -> None:
        super().__init__()
        self.imported = file._module  # noqa: SLF001 - a submodule, so that it is saved with this one
        self._file = file
        self.plan = plan

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = pytree.tree_leaves(self._file.call(to_file(self.plan, tensors)))
        return tuple(to_contract(self.plan, self._file, results))


class _Frame(nn.Module):
    """The contract's module on one frame: inputs `[batch, …]` and states → outputs `[batch, …]` and states."""

    def __init__(self, contract: _Contract) -> None:
        super().__init__()
        self.contract = contract

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        signature = self.contract.plan.signature
        count, outputs = len(signature.inputs), len(signature.outputs)
        unused = torch.ones(1, dtype=torch.int32)  # a file of one frame takes no lengths
        results = self.contract(*(x.unsqueeze(1) for x in tensors[:count]), unused, *tensors[count:])
        return (*(y.squeeze(1) for y in results[:outputs]), *results[outputs:])


def _example(plan: Plan) -> list[Tensor]:
    signature = plan.signature
    kinds = {port.name: port.dtype for port in signature.inputs} | {LENGTHS: torch.int32}
    kinds |= {state.input: state.dtype for state in signature.states}

    def make(name: str, dims: Dims) -> Tensor:
        shape = [_SIZES.get(dim) or int(dim) for dim in dims]
        return torch.full(shape, _SIZES[TIME] if name == LENGTHS else 1, dtype=kinds[name])

    return [make(name, dims) for name, dims in input_dims(signature, ahead=False).items()]


def _unwrapped(kind: Any) -> Any:
    """An optional argument is given here."""
    return kind.getElementType() if kind.kind() == "OptionalType" else kind


def _outputs(result: Any) -> Iterator[Value]:
    """Names for what a module returns: its keys, or `output_0`, and `output_1.0` within a tuple."""
    leaves = pytree.tree_flatten_with_path(result)[0]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ModelError(f"forward returns a {type(leaf).__name__}; it has to return tensors")
        keys = [re.sub(r"[^A-Za-z0-9_]", "", str(key)) for key in path]
        name = ".".join([f"output_{keys[0]}" if keys[0].isdecimal() else keys[0], *keys[1:]]) if keys else "output"
        yield Value(name, leaf.dtype, None)
