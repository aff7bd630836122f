"""What a model's forward did on one input: every torch call it made, the modules without cells as one call each."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from carousel_export.errors import ModelError
from carousel_export.loops.program import tensors_of

# A call's target: a torch function, or a module's path.
Target = Callable[..., Any] | str


# What makes a Python number of a tensor.
_READS = frozenset(
    getattr(Tensor, name) for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy")
)


@dataclass(eq=False)
class Call:
    """One call, its arguments with `Value`s where tensors stood. `target` is None for an input or a constant."""

    target: Target | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    # The leaves of what it returned, as they were then.
    results: list[Any] = field(default_factory=list)
    # The path of a parameter or buffer, or which input it is.
    path: str | int = ""
    # The tensor that it wrote into.
    wrote: Tensor | None = None

    @property
    def values(self) -> list["Value"]:
        """The tensors among its arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]


@dataclass(frozen=True)
class Value:
    """A tensor: a leaf of what a call returned."""

    call: Call
    leaf: int = 0

    @property
    def result(self) -> Tensor:
        """The tensor itself."""
        tensor: Tensor = self.call.results[self.leaf]
        return tensor


@dataclass(frozen=True)
class Trace:
    """A run: `cells` has the calls of each cell by its path, in order; `outputs` is the model's result."""

    cells: dict[str, list[Call]]
    outputs: Any


def trace(model: nn.Module, cells: Sequence[str], arguments: Sequence[Any]) -> Trace:
    """Run the model, and note the calls of torch functions and of modules without cells; raises what forward raises."""
    recorder = _Recorder(model, cells)
    for i, x in enumerate(tensors_of(arguments)):
        recorder.note(Call(None, path=i), x)
    with torch.no_grad(), recorder.watching(model, cells):
        outputs = model(*arguments)
    tree = pytree.tree_map(lambda leaf: recorder.value(leaf) if isinstance(leaf, Tensor) else leaf, outputs)
    return Trace(recorder.cells, tree)


def reaches(calls: Iterable[Call], wanted: Callable[[Call], bool]) -> bool:
    """Whether any of the calls is wanted, or was computed from one that is."""
    seen: set[Call] = set()
    waiting = list(calls)
    while waiting:
        call = waiting.pop()
        if wanted(call):
            return True
        if call not in seen:
            seen.add(call)
            waiting += [value.call for value in call.values]
    return False


def written(base: Tensor, index: Any, value: Tensor) -> Tensor:
    """`base[index] = value`, as a function: what `base` is afterwards."""
    result = base.clone()
    result[index] = value
    return result


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, cells: Sequence[str]) -> None:
        super().__init__()
        self.cells: dict[str, list[Call]] = {path: [] for path in cells}
        self._paths = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self._values: dict[int, Value] = {}
        self._pausing = False
        # So that no other tensor takes the id of one of these.
        self._alive: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._pausing:
            return func(*args, **(kwargs or {}))
        if func in _READS and self._of_inputs(self.value(args[0])):
            raise ModelError(
                "forward reads a number out of a tensor, as a branch on values does, in a model with cells; write its "
                "loop with tensor operations alone"
            )
        if func is Tensor.__iter__:
            return iter(self._run(torch.unbind, args, {}))
        if func is Tensor.__setitem__:
            base, index, value = args
            taken = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=base.dtype)
            func(base, index, taken)
            call = self._call(written, (base, index, taken), {})
            call.wrote = base
            self.note(call, base)
            return None
        if func is Tensor.__getitem__ and (steps := _steps(*args)):
            x = args[0]
            for step in steps:
                x = self._run(func, (x, step), {})
            return x
        return self._run(func, args, kwargs or {})

    @contextmanager
    def watching(self, model: nn.Module, cells: Sequence[str]) -> Iterator[None]:
        """Within, calls are noted: of the cells and the modules without cells as one each, of all else as it comes."""
        within = {path.rpartition(".")[0] for path in cells}
        within |= {parent[:i] for parent in within for i, letter in enumerate(parent) if letter == "."} | {""}
        opaque = {path: module for path, module in model.named_modules() if path not in within}
        for path, module in opaque.items():
            module.__dict__["forward"] = functools.partial(self._module, path, module)
        try:
            with self:
                yield
        finally:
            for module in opaque.values():
                del module.__dict__["forward"]

    def value(self, tensor: Tensor) -> Value:
        """Which call's tensor it is; a parameter, a buffer or any other constant where no call returned it."""
        if id(tensor) not in self._values:
            self.note(Call(None, path=self._paths.get(id(tensor), "")), tensor)
        return self._values[id(tensor)]

    def note(self, call: Call, result: Any) -> None:
        """Keep what a call returned as it is now, so that its tensors are known as its values from here on."""
        self._alive.append((result, call.wrote))
        with self._paused():
            call.results = pytree.tree_map_only(Tensor, Tensor.clone, pytree.tree_leaves(result))
        for leaf, tensor in enumerate(pytree.tree_leaves(result)):
            if isinstance(tensor, Tensor):
                self._values[id(tensor if call.wrote is None else call.wrote)] = Value(call, leaf)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Within, nothing is noted."""
        before, self._pausing = self._pausing, True
        try:
            yield
        finally:
            self._pausing = before

    def _of_inputs(self, value: Value) -> bool:
        """Whether a tensor has anything to do with the model's inputs; a parameter's numbers are the model's own."""
        return reaches([value.call], lambda call: isinstance(call.path, int))

    def _module(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._paused():
                return type(module).forward(module, *args, **kwargs)

        return run(*args, **kwargs) if self._pausing else self._run(run, args, kwargs, path=path)

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any, path: str | None = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with self._paused():
            versions = [x._version for x in given]  # noqa: SLF001 - there is no other way to see a write
        call = self._call(func if path is None else path, args, kwargs)
        result = func(*args, **kwargs)
        returned = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not returned:
            return result
        with self._paused():
            changed = {id(x): x for x, was in zip(given, versions, strict=True) if x._version != was}  # noqa: SLF001
        if changed:
            call.wrote = changed.pop(id(returned[0]), None)
            if changed or call.wrote is None:
                what = path or getattr(func, "__name__", "a call")
                raise ModelError(
                    f"{what} writes into a tensor that it is given, and Carousel cannot follow that in a model with "
                    "cells; return a new tensor"
                )
        if path in self.cells:
            self.cells[path].append(call)
        # Dropout in evaluation mode, say, hands on what it was given.
        if call.wrote is not None or not all(any(one is other for other in given) for one in returned):
            self.note(call, result)
        return result if call.wrote is None else call.wrote

    def _call(self, target: Target, args: Any, kwargs: Any) -> Call:
        def name(leaf: Any) -> Any:
            return (
                self.value(leaf) if isinstance(leaf, Tensor) else list(leaf) if isinstance(leaf, torch.Size) else leaf
            )

        args, kwargs = pytree.tree_map(name, (tuple(args), dict(kwargs)))
        return Call(target, args, kwargs)


def _steps(x: Tensor, index: Any) -> list[Any]:
    """`x[:, t, :10]` as `x[:, t]` and then `[:, :10]`: which frame, then which part of it; empty where it is one."""
    if not isinstance(index, tuple) or any(isinstance(item, Tensor | list | bool) for item in index):
        return []
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = x.dim() - sum(item is not None and item is not Ellipsis for item in index)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    entries = tuple(item if isinstance(item, int) else slice(None) for item in index if item is not None)
    rest = tuple(item for item in index if not isinstance(item, int))
    if not any(isinstance(item, int) for item in index) or all(item == slice(None) for item in rest):
        return []
    return [entries, rest]
