"""A loop re-rolled: the model as a straight list of steps over whole sequences, for any batch and time."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.errors import ModelError
from carousel_export.signature import BATCH, TIME


@dataclass(frozen=True)
class Register:
    """A tensor of a running program: a leaf of what a step returned; step −1: the model's inputs."""

    step: int
    leaf: int = 0


@dataclass(frozen=True)
class Size:
    """A whole number that follows the inputs' sizes: factor × (batch, time or both multiplied) + offset."""

    factor: int
    of: tuple[str, ...]
    offset: int

    def value(self, sizes: Mapping[str, int]) -> int:
        """The number at these sizes."""
        result = self.factor
        for name in self.of:
            result = result * sizes[name]
        return result + self.offset


@dataclass(frozen=True)
class Framed:
    """A call's argument that has a value for each frame, `[time, batch, …]`."""

    tensor: Any


@dataclass(frozen=True)
class Batched:
    """An argument of such a call that has one value for all frames, `[batch, …]`."""

    tensor: Any


@dataclass(frozen=True)
class Step:
    """One call: of a torch function, of a module by its path, or, without a target, a constant or a parameter's path.

    `framewise`: "direct" where the call takes `[time, batch, …]` as it takes `[batch, …]`, "folded" where time goes
    into the batch for it, "" for a call outside of loops. `copies`: it writes into its arguments, and is given copies.
    """

    target: Callable[..., Any] | str | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    constant: Tensor | str | None = None
    framewise: str = ""
    copies: bool = False


@dataclass(frozen=True)
class Program:
    """Steps in order, and the model's result with `Register`s in it. It never changes, and its copies are itself."""

    steps: tuple[Step, ...]
    outputs: Any

    def __deepcopy__(self, _memo: object) -> "Program":
        return self


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among a model's arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves(list(arguments)) if isinstance(leaf, Tensor)]


def filled(arguments: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The arguments with other tensors."""
    given = iter(tensors)
    found: list[Any] = pytree.tree_map_only(Tensor, lambda _: next(given), list(arguments))
    return found


class Rolled(nn.Module):
    """A model whose loops over cells have become recurrent layers; its modules stand where the user's model has them.

    `axes` gives for each size's name the input and the axis that have it.
    """

    def __init__(self, model: nn.Module, program: Program, axes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in copy.copy(model).__dict__.items() if name != "forward"})
        self._program = program
        self._axes = dict(axes)
        # What the user calls it.
        self.written_as = type(model)

    def forward(self, *arguments: Any) -> Any:
        """The model's own result."""
        inputs = tensors_of(arguments)
        sizes = {name: inputs[i].shape[axis] for name, (i, axis) in self._axes.items()}
        results: list[list[Any]] = []

        def fill(leaf: Any) -> Any:
            match leaf:
                case Register(-1, i):
                    return inputs[i]
                case Register(step, i):
                    return results[step][i]
                case Framed(tensor) | Batched(tensor):
                    return type(leaf)(fill(tensor))
                case Size():
                    return leaf.value(sizes)
                case slice():
                    return slice(fill(leaf.start), fill(leaf.stop), fill(leaf.step))
            return leaf

        for step in self._program.steps:
            args, kwargs = pytree.tree_map(fill, (step.args, dict(step.kwargs or {})))
            results.append(pytree.tree_leaves(self._run(step, args, kwargs)))
        return pytree.tree_map(fill, self._program.outputs)

    def _run(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if step.target is None:
            return self._tensor(step.constant) if isinstance(step.constant, str) else step.constant
        target = self.get_submodule(step.target) if isinstance(step.target, str) else step.target
        return run_framewise(target, args, kwargs, copies=step.copies, folded=step.framewise == "folded")

    def _tensor(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(owner), name)
        return tensor


def run_framewise(target: Callable[..., Any], args: Any, kwargs: Any, *, copies: bool, folded: bool) -> Any:
    """A call as a step makes it; `folded`: with time and batch as one axis, as if there were time × batch rows."""
    framed = next((leaf.tensor for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Framed)), None)
    time, batch = (0, 0) if framed is None or not folded else framed.shape[:2]

    def unwrap(leaf: Any) -> Any:
        match leaf:
            case Framed(tensor):
                return tensor.flatten(0, 1) if folded else tensor
            case Batched(tensor):
                return tensor.expand(time, *tensor.shape).flatten(0, 1) if folded else tensor
        return leaf

    args, kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if copies:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    result = target(*args, **kwargs)
    return pytree.tree_map_only(Tensor, lambda y: y.unflatten(0, (time, batch)), result) if folded else result


def generalise(programs: Sequence[Program], sizes: Sequence[Mapping[str, int]], name: str) -> Program:
    """The program that is each of the given ones at its sizes. Raises `ModelError` where there is none."""
    leaves = [pytree.tree_flatten([_tree(program), program.outputs])[0] for program in programs]
    specs = [pytree.tree_flatten([_tree(program), program.outputs])[1] for program in programs]
    if any(spec != specs[0] for spec in specs):
        raise ModelError(
            f"{name} does other things at {sizes[0]} than at {sizes[-1]}; write its loop without branches on the frame"
        )
    fitted = [fit(values, sizes, name) for values in zip(*leaves, strict=True)]
    steps, outputs = pytree.tree_unflatten(fitted, specs[0])
    return Program(
        tuple(
            replace(step, args=args, kwargs=kwargs)
            for step, (_, args, kwargs) in zip(programs[0].steps, steps, strict=True)
        ),
        outputs,
    )


def _tree(program: Program) -> list[Any]:
    """The steps as a tree, in which slices are open and what may not differ is a leaf like any other."""
    return [
        ((step.target, step.constant, step.framewise, step.copies), step.args, step.kwargs or {})
        for step in program.steps
    ]


def fit(values: Sequence[Any], sizes: Sequence[Mapping[str, int]], name: str) -> Any:
    """What stands in one place of a program at each of the sizes, as one value or `Size`; `ModelError` if none fits."""
    first = values[0]
    if all(type(value) is type(first) for value in values):
        if isinstance(first, Tensor):
            if all(value.shape == first.shape and torch.equal(value, first) for value in values):
                return first
        elif isinstance(first, slice):
            parts = [[getattr(value, part) for value in values] for part in ("start", "stop", "step")]
            return slice(*(fit(part, sizes, name) for part in parts))
        elif all(value == first for value in values):
            return first
        elif type(first) is int:
            for of in ((BATCH,), (TIME,), (BATCH, TIME)):
                at = [Size(1, of, 0).value(size) for size in sizes]
                factor = (values[1] - first) // (at[1] - at[0]) if at[1] != at[0] else 0
                found = Size(factor, of, first - factor * at[0])
                if all(found.value(size) == value for size, value in zip(sizes, values, strict=True)):
                    return found
    raise ModelError(
        f"{name} has {first!r:.60} in its loop where it has {values[-1]!r:.60} at other sizes; take sizes from the "
        "inputs alone, and do the same in every frame"
    )
