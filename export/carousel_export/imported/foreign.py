"""A file as a function of tensors: what both kinds of file have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from carousel_export.errors import ExampleError
from carousel_export.signature import BATCH, TIME, Dims, Port, Signature

# A dimension as a file declares it: a size, a symbol, or nothing.
Declared = tuple[int | str | None, ...]
Scalar = int | float | bool


@dataclass(frozen=True)
class Value:
    """An input or output of the file; None: the file does not say."""

    name: str
    dtype: torch.dtype | None
    dims: Declared | None
    # A plain number and no tensor, as TorchScript has them.
    number: bool = False

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The axes without a size."""
        return tuple(axis for axis, dim in enumerate(self.dims or ()) if not isinstance(dim, int))

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.dims) if self.dims is not None else "…"
        return f"{self.name!r} [{dims}]"


class Foreign(Protocol):
    """A loaded file."""

    path: Path
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    parameters: int

    @property
    def runtime(self) -> str:
        """What runs it here: "onnxruntime" or "torch"."""

    def run(self, values: Mapping[str, Tensor | Scalar]) -> list[Tensor]:
        """Its outputs. Raises `ExampleError`, in one line, where it fails."""

    def write(self, folder: Path, plan: "Plan") -> tuple[str, ...]:
        """Write what a bundle has of it by the graph contract; the files' names, those of ONNX first."""


@dataclass(frozen=True)
class Plan:
    """How the file's tensors and the contract's go together.

    `dims` names the axes of every input and output that is a tensor of the contract, in the file's own order, "batch"
    and, where there is one, "time" among sizes; where there is none, the signature's ports have time behind the batch.
    """

    signature: Signature
    dims: Mapping[str, Dims]
    constants: Mapping[str, Tensor | Scalar]
    # The file's own input for the valid frames of each row, and its dtype.
    lengths: tuple[str, torch.dtype] | None = None
    # The file takes one frame a call and has no time axis; the contract's graph repeats it.
    stepwise: bool = False

    def axis(self, name: str) -> int:
        """Where the batch is in a tensor of the file."""
        return self.dims[name].index(BATCH)


def to_contract(plan: Plan, foreign: Foreign, results: Sequence[Tensor]) -> list[Tensor]:
    """The file's outputs in the contract's order and axes; those of one frame as a stream of one."""
    by_name = dict(zip((value.name for value in foreign.outputs), results, strict=True))
    if plan.stepwise:
        outputs = [by_name[p.name].movedim(plan.axis(p.name), 0).unsqueeze(1) for p in plan.signature.outputs]
    else:
        outputs = [port.fetch(by_name[port.name]) for port in plan.signature.outputs]
    return outputs + [by_name[state.output].movedim(plan.axis(state.output), 0) for state in plan.signature.states]


def to_file(plan: Plan, tensors: Sequence[Tensor]) -> dict[str, Tensor | Scalar]:
    """The file's inputs, from the contract's inputs, lengths and states; where it is stepwise, those of one frame."""
    signature = plan.signature
    count = len(signature.inputs)
    values: dict[str, Tensor | Scalar] = dict(plan.constants)
    for port, x in zip(signature.inputs, tensors[:count], strict=True):
        values[port.name] = x[:, 0].movedim(0, plan.axis(port.name)) if plan.stepwise else port.feed(x)
    if plan.lengths is not None:
        name, dtype = plan.lengths
        values[name] = tensors[count].to(dtype)
    for state, x in zip(signature.states, tensors[count + 1 :], strict=True):
        values[state.input] = x.movedim(0, plan.axis(state.input))
    return values


def port(value: Value, dims: Dims, *, stepwise: bool = False) -> Port:
    """A tensor of the file as the signature has it; `stepwise`: it is one frame's."""
    assert value.dtype is not None, "a plain number is a constant"
    if dims.count(BATCH) != 1 or dims.count(TIME) > 1:
        raise ExampleError(f"{value.name!r} has the axes {', '.join(dims)}; one is batch, and one at most is time")
    if stepwise:
        dims = (BATCH, TIME, *(dim for dim in dims if dim != BATCH))
    return Port(value.name, value.dtype, dims, dims)
