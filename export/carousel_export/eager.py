"""The caller's model as eager PyTorch runs it: a private copy, and the recurrent calls that it makes."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from carousel_export.calling import Calling, Seen, Trace, draws, find_calling, find_dropped
from carousel_export.crf import return_tensors
from carousel_export.errors import ExampleError, ExportError, ModelError, one_line
from carousel_export.fold import copy_module, fold
from carousel_export.packing import Given, Packed, Packing, repack, unpack
from carousel_export.recurrent import Layer, States, as_hx, as_states, find_cells, find_recurrent, kind_of

log = logging.getLogger(__name__)

# Answers a recurrent call in the module's stead: (call name, module, input, the model's own states or None) → y and the
# states at its end.
Handler = Callable[[str, Layer, Tensor, States | None], tuple[Tensor, States]]


def plain(_call: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
    """The handler that leaves a recurrent call as it is."""
    return run_layer(module, x, hx)


def run_layer(module: Layer, x: Tensor, states: States | None) -> tuple[Tensor, States]:
    """What eager PyTorch answers from these states (None: from zero)."""
    y, ended = type(module).forward(module, x, None if states is None else as_hx(states))
    return y, as_states(ended)


class Loops(Protocol):
    """A model that loops over cells, as its user wrote it."""

    def run(
        self,
        inputs: Sequence[Tensor],
        handler: Handler,
        memory: MutableMapping[str, States],
        block: int | None,
        *,
        plain: bool,
    ) -> list[Tensor]:
        """The outputs, from the states in `memory`; see `loops.written`."""


class Eager:
    """A copy of the caller's model, in evaluation mode on the CPU, whose recurrent calls can be watched and answered.

    Raises `ModelError`, naming the module, for a model that cannot be exported whatever its inputs are.
    """

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
            raise ModelError(f"what was given is of type {type(model).__name__}; give the torch.nn.Module itself")
        try:
            self.module = copy_module(model).cpu()
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be copied ({one_line(error)}); make its tensors parameters or buffers"
            ) from error
        _check_mode(model)
        _check_weights(self.module)
        fold(self.module)
        # The names of the parameters that training would change.
        self.trainable = frozenset(
            name for name, each in self.module.named_parameters(remove_duplicate=False) if each.requires_grad
        )
        self.module.requires_grad_(False)
        return_tensors(self.module)
        # Whether it ran on some inputs: it then fails on others for their number of frames or rows.
        self._ran = False
        self.recurrent = find_recurrent(self.module)
        self.kind = type(self.module)
        # Cells are in loops; `without_loops` makes layers of them, and then `written` is the model with the loops.
        self.cells = find_cells(self.module)
        self.written: Loops | None = None
        self.calling = Calling()
        # Whether it packs by lengths in a list.
        self.lists_lengths = False
        for path, layer in self.recurrent.items():
            if layer.dropout:
                log.info("%s: dropout=%g is inactive, as in evaluation mode", path or self.name, layer.dropout)

    @property
    def name(self) -> str:
        """The model's class."""
        return self.kind.__name__

    def free_sizes(self, count: int, least: int = 2) -> list[int]:
        """Primes from `least` on that are no size of the model's tensors: axes of these sizes tell themselves apart."""
        taken = {size for tensor in (*self.module.parameters(), *self.module.buffers()) for size in tensor.shape}
        free = (n for n in itertools.count(least) if n not in taken and all(n % k for k in range(2, isqrt(n) + 1)))
        return list(itertools.islice(free, count))

    def find_calling(
        self, arguments: Sequence[Any], names: Sequence[str]
    ) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
        """Find out how the model is called, from an example of its arguments; returns those that are inputs, and names.

        Raises what `calling.find_calling` raises, and `ExampleError` where the model fails on the example.
        """
        first, second = draws(arguments)
        found = find_calling(arguments, names, first, [self._trace(first), self._trace(second)])
        self.calling = found
        places = found.layout or range(len(arguments))
        inputs = [i for i, place in enumerate(places) if isinstance(place, int)]
        return tuple(arguments[i] for i in inputs), tuple(names[i] for i in inputs)

    def restore_calling(self, calling: Calling, inputs: Sequence[Tensor]) -> None:
        """Take up what a bundle says of how the model is called; `inputs` are any that it runs on."""
        self.calling = calling
        self.calling = replace(calling, dropped=find_dropped(calling, self._trace(inputs)))

    def _trace(self, inputs: Sequence[Any]) -> Trace:
        calls: list[Seen] = []

        def watch(call: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
            y, ended = run_layer(module, x, hx)
            # Unlike anything else in the model: over one frame, y is h.
            marked = tuple(torch.rand_like(state) for state in ended)
            calls.append(Seen(call, hx, marked))
            return y, marked

        packing = Packing()
        results = pytree.tree_leaves(self.run_tree(inputs, watch, packing))
        return Trace(tuple(calls), tuple(packing.given), tuple(results))

    def run(
        self,
        inputs: Sequence[Tensor],
        handler: Handler = plain,
        lengths: Tensor | None = None,
        states: Mapping[str, States] | None = None,
    ) -> list[Tensor]:
        """The model's outputs, flattened, with every recurrent call answered by `handler`.

        `lengths` `[batch]` are those of the rows, whole ones where it is absent; `states`, by call, stand among
        the arguments for code that sees them beside those calls. Raises `ExampleError` where the model fails on
        the inputs.
        """
        return pytree.tree_leaves(self.run_tree(inputs, handler, Packing(lengths), states))

    def run_tree(
        self,
        inputs: Sequence[Any],
        handler: Handler = plain,
        packing: Packing | None = None,
        states: Mapping[str, States] | None = None,
    ) -> Any:
        """The model's outputs as it returns them; else as `run`."""
        counts: Counter[str] = Counter()
        packing = packing or Packing()

        def answer(
            path: str,
            module: Layer,
            input: Tensor | Packed,  # noqa: A002 - torch's name
            hx: Tensor | States | None = None,
        ) -> tuple[Tensor | Packed, Tensor | States]:
            call = call_name(path, module, counts[path])
            counts[path] += 1
            # A state that is passed in stands for the session's, whatever its value.
            start = None if hx is None or call in self.calling.passed else as_states(hx)
            y, ended = handler(call, module, unpack(module, input), start)
            return repack(module, call, input, y), as_hx(ended)

        for path, module in self.recurrent.items():
            # An instance's own `forward` comes before its class's, and hooks of the caller's still run around it.
            module.__dict__["forward"] = functools.partial(answer, path, module)
        try:
            with torch.no_grad(), packing:
                arguments = self.calling.arguments(inputs, packing.lengths, states)
                outputs = self.calling.results(self.module(*arguments))
        except ExportError:
            raise
        except Exception as error:
            tensors = [x for x in pytree.tree_leaves(list(inputs)) if isinstance(x, Tensor)]
            shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
            way = "write its forward for any number of frames and rows" if self._ran else "give what it takes"
            raise ExampleError(f"{self.name} fails on inputs {shapes}: {one_line(error)}; {way}") from error
        else:
            self._ran = True
            return outputs
        finally:
            for module in self.recurrent.values():
                del module.__dict__["forward"]

    def packed(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> tuple[Given, ...]:
        """What it packs with on these inputs; else as `run`."""
        packing = Packing(lengths)
        self.run_tree(inputs, plain, packing)
        return tuple(packing.given)

    def run_untouched(self, inputs: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """The model's outputs, flattened, with nothing answered in PyTorch's stead, packing neither."""
        calling = self.calling.for_rows(1 if lengths is None else len(lengths))
        try:
            with torch.no_grad():
                return pytree.tree_leaves(calling.results(self.module(*calling.arguments(inputs, lengths))))
        except Exception as error:
            raise ModelError(
                f"{self.name} fails where it packs whole sequences: {one_line(error)}; pack by the input's own lengths"
            ) from error

    def try_run(self, inputs: Sequence[Tensor], handler: Handler = plain) -> list[Tensor] | None:
        """`run`, or None where the model fails on such inputs: for experiments."""
        try:
            return self.run(inputs, handler)
        except ExampleError:
            return None


def call_name(path: str, module: Layer, count: int) -> str:
    """What a module's call is called in a bundle: its path, and from the second call on which call it is."""
    name = path or kind_of(module).name.lower()
    return f"{name}.call{count}" if count else name


def _check_mode(module: nn.Module) -> None:
    """A part in training mode may be meant, as dropout is for sampling; nothing would say that it is off."""
    kind = type(module).__name__
    if module.training:
        raise ModelError(f"{kind} is in training mode; call model.eval() before it is exported")
    for path, part in module.named_modules():
        if part.training:
            raise ModelError(
                f"{path} ({type(part).__name__}) of {kind} is in training mode; call model.eval() before it is exported"
            )


def _check_weights(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ModelError(f"{name} has no shape yet; run the model once, then export it")
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}; export the model in float32: model.float()")
        # A buffer may hold infinities, as a mask does.
        if bool(tensor.isnan().any()) or (isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all())):
            raise ModelError(
                f"{name} has values that are not finite (NaN or infinity); load a checkpoint that is whole"
            )
