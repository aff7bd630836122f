"""What a model costs: parameters, state and floating-point operations, of each recurrent layer and of the whole."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from carousel_export.eager import Eager, call_name, run_layer
from carousel_export.recurrent import Layer, States, directions_of, kind_of, sides_of
from carousel_export.signature import BATCH, TIME, Port, Signature
from carousel_protos.v1 import manifest_pb2 as pb


@dataclass(frozen=True)
class Figures:
    """`flops` is of the whole model and of one frame, run once."""

    parameters: int
    trainable: int
    flops: int
    layers: tuple[pb.RecurrentLayer, ...]


def measure(eager: Eager, signature: Signature, example: Sequence[Tensor]) -> Figures:
    """Run the model on its example and count.

    FLOPs are twice the multiply-adds of matrix products, convolutions and attention, over a whole run of the example,
    divided by its frames: what is done once a sequence is shared among them. A recurrent layer has those of its weight
    matrices. Sums, activations and look-ups are not counted.
    """
    frames = _frames(signature, example)
    recurrent: Counter[str] = Counter()
    counted = 0
    counter = FlopCounterMode(display=False)

    def count(call: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        nonlocal counted
        # Which kernels a layer runs on is the host's affair: what it took is replaced by what its weights say.
        before = counter.get_total_flops()
        answer = run_layer(module, x, hx)
        weights = sum(each.numel() for name, each in module.named_parameters() if name.startswith("weight"))
        steps = x.numel() // x.shape[-1]
        recurrent[call] += 2 * weights * steps
        counted += counter.get_total_flops() - before
        return answer

    with counter:
        eager.run(example, count)
    parameters = dict(eager.module.named_parameters())
    return Figures(
        parameters=_count(parameters.values()),
        trainable=_count(p for name, p in parameters.items() if name in eager.trainable),
        flops=round((counter.get_total_flops() - counted + recurrent.total()) / frames),
        layers=tuple(_layers(eager, signature, {call: round(n / frames) for call, n in recurrent.items()})),
    )


def _layers(eager: Eager, signature: Signature, flops: dict[str, int]) -> Iterable[pb.RecurrentLayer]:
    modules = {call_name(path, module, 0): (path, module) for path, module in eager.recurrent.items()}
    for call, operations in flops.items():
        path, module = modules[call.partition(".call")[0]]
        own = dict(module.named_parameters())
        within = f"{path}." if path else ""
        yield pb.RecurrentLayer(
            name=call,
            kind=kind_of(module).name,
            input_size=module.input_size,
            hidden_size=module.hidden_size,
            num_layers=module.num_layers,
            num_directions=directions_of(module),
            backward="reverse" in sides_of(module),
            parameters=_count(own.values()),
            trainable_parameters=_count(p for name, p in own.items() if within + name in eager.trainable),
            layer_parameters=[
                _count(p for name, p in own.items() if name.removesuffix("_reverse").endswith(f"_l{layer}"))
                for layer in range(module.num_layers)
            ],
            state_bytes=sum(s.zeros().nbytes for s in signature.states if s.call == call),
            flops_per_frame=operations,
        )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _frames(signature: Signature, example: Sequence[Tensor]) -> int:
    """Frames of the example, those of each row."""
    ports: dict[str, Port] = {port.name: port for port in signature.inputs}
    name, x = next((name, x) for name, x in zip(signature.arguments, example, strict=True) if name in ports)
    dims = ports[name].eager_dims
    return x.shape[dims.index(TIME)] * (x.shape[dims.index(BATCH)] if BATCH in dims else 1)
