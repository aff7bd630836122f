"""The TorchScript file: the lifted model traced, frozen and saved, with a method for each graph."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from carousel_export.eager import Eager
from carousel_export.errors import GraphError, one_line
from carousel_export.graph import trace_inputs
from carousel_export.lift import LiftedLSTM, RunLayer, layer_weights, lift
from carousel_export.lstm import ragged_lstm
from carousel_export.quiet import quiet
from carousel_export.signature import Signature

TORCHSCRIPT = "model.pt"
WHOLE_METHOD, LOOKAHEAD_METHOD = "forward", "lookahead"


def write_torchscript(
    path: Path, eager: Eager, signature: Signature, example: Sequence[Tensor], *, lookahead: bool
) -> None:
    """Write the model as TorchScript, with the method `lookahead` where that is allowed.

    Raises `GraphError` where the model's own code cannot be traced.
    """
    lifted = lift(eager, signature, _bind_torchscript)
    methods = {WHOLE_METHOD: tuple(trace_inputs(signature, example, ahead=False))}
    if lookahead:
        methods[LOOKAHEAD_METHOD] = tuple(trace_inputs(signature, example, ahead=True))
    try:
        with quiet(), torch.no_grad():
            # The gate tests what was loaded again, at more shapes than the tracer's own check would.
            traced = torch.jit.trace_module(lifted, methods, check_trace=False)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced, preserved_attrs=[name for name in methods if name != WHOLE_METHOD])
            torch.jit.save(frozen, path)
    except Exception as error:
        raise GraphError(
            f"{eager.name} could not be traced to TorchScript: {one_line(error)}; write its forward with tensor "
            "operations"
        ) from error


@functools.cache
def _scripted() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    with quiet():
        return torch.jit.script(ragged_lstm)


def _bind_torchscript(layers: dict[str, LiftedLSTM]) -> None:
    for module in layers.values():
        module.run_layer = _scripted_layer(module)


def _scripted_layer(module: LiftedLSTM) -> RunLayer:
    def run(
        layer: int, direction: str, x: Tensor, lengths: Tensor, h_0: Tensor | None, c_0: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = [tensor for side in layer_weights(module, layer, direction) for tensor in side]
        return _scripted()(x, lengths, h_0, c_0, weights, bool(module.bias), direction)

    return run
