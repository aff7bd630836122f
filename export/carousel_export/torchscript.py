"""The TorchScript file: the lifted model traced, frozen and saved, with a method for each graph."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from carousel_export.eager import Eager
from carousel_export.errors import GraphError, one_line
from carousel_export.graph import trace_inputs
from carousel_export.lift import LiftedLayer, RunLayer, lift
from carousel_export.operators import ragged
from carousel_export.quiet import quiet
from carousel_export.recurrent import States, places_of, states_of, weights_of
from carousel_export.scripted import repeated
from carousel_export.signature import Signature
from carousel_export.step import Step

TORCHSCRIPT = "model.pt"
WHOLE_METHOD, LOOKAHEAD_METHOD = "forward", "lookahead"


def write_torchscript(
    path: Path, eager: Eager, signature: Signature, example: Sequence[Tensor], *, lookahead: bool
) -> None:
    """Write the model as TorchScript, with the method `lookahead` where that is allowed.

    Raises `GraphError` where the model's own code cannot be traced.
    """
    lifted = lift(eager, signature, _bind_torchscript)
    methods = {WHOLE_METHOD: tuple(trace_inputs(eager, signature, example, ahead=False))}
    if lookahead:
        methods[LOOKAHEAD_METHOD] = tuple(trace_inputs(eager, signature, example, ahead=True))
    try:
        with quiet(), torch.no_grad():
            module: nn.Module = lifted
            if signature.stepwise:
                module = repeated(Step(lifted), signature, methods[WHOLE_METHOD])
            # The gate tests what was loaded again, at more shapes than the tracer's own check would.
            traced = torch.jit.trace_module(module, methods, check_trace=False)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced, preserved_attrs=[name for name in methods if name != WHOLE_METHOD])
            torch.jit.save(frozen, path)
    except Exception as error:
        raise GraphError(
            f"{eager.name} could not be traced to TorchScript: {one_line(error)}; write its forward with tensor "
            "operations"
        ) from error


@functools.cache
def _scripted() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    with quiet():
        return torch.jit.script(ragged)


def _bind_torchscript(layers: dict[str, LiftedLayer]) -> None:
    for module in layers.values():
        module.run_layer = _scripted_layer(module)


def _scripted_layer(module: LiftedLayer) -> RunLayer:
    def run(layer: int, direction: str, x: Tensor, lengths: Tensor, states: States | None) -> tuple[Tensor, States]:
        places = places_of(module, direction)
        weights = [tensor for place in places for tensor in weights_of(module, layer, place)]
        starts = states or [x.new_zeros(len(places), x.size(1), state.size) for state in states_of(module)]
        y, ended = _scripted()(module.mode, x, lengths, list(starts), weights, bool(module.bias), direction)
        return y, tuple(ended)

    return run
