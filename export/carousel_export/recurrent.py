"""Which modules are recurrent, which of them can be lifted, and what states they have."""

from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn

from carousel_export.errors import ModelError
from carousel_export.loops.layers import BACKWARD, CELLS, Cell
from carousel_export.operators import KINDS, Kind

# What the three kinds of layer have in common.
Layer = nn.RNNBase
_LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
# Those, and what loops over cells become.
LAYERS = (*_LAYERS, *BACKWARD)
States = tuple[Tensor, ...]


@dataclass(frozen=True)
class StateKind:
    """One state tensor of a recurrent call: "h" or "c", with `rows` = layers × directions rows of `size`."""

    letter: str
    rows: int
    size: int


def find_recurrent(model: nn.Module) -> dict[str, Layer]:
    """The recurrent modules by their path, each once.

    Raises `ModelError` where there is none, or one that cannot be lifted; the line names it and the way out.
    """
    found: dict[str, Layer] = {}
    for path, module in model.named_modules():
        _check_containers(path, module)
        if _is_recurrent(module):
            found[path] = _checked(f"{path or 'the model itself'} ({type(module).__name__})", module)
    if not found and not find_cells(model):
        raise ModelError(
            f"{type(model).__name__} has no recurrent layer among its modules; Carousel exports models with nn.LSTM, "
            "nn.GRU or nn.RNN"
        )
    return found


def find_cells(model: nn.Module) -> dict[str, Cell]:
    """The cells by their path, each once. Raises `ModelError` for one that cannot become a layer."""
    found: dict[str, Cell] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNNCellBase):
            continue
        where = f"{path or 'the model itself'} ({type(module).__name__})"
        if not path:
            raise ModelError(f"{where} takes one frame; export a model that loops over the frames, or the layer")
        if type(module) not in CELLS:
            raise ModelError(f"{where} is a subclass, whose forward may do anything; use a plain nn cell")
        found[path] = module  # type: ignore[assignment]  # one of CELLS
    return found


def _checked(where: str, module: nn.Module) -> Layer:
    if _is_quantized(module):
        raise ModelError(f"{where} is quantized; export the float model")
    if not is_layer(module):
        names = ", ".join(f"nn.{layer.__name__}" for layer in _LAYERS)
        if isinstance(module, _LAYERS):
            raise ModelError(f"{where} is a subclass, whose forward may do anything; use a plain one of {names}")
        raise ModelError(f"{where} cannot be exported yet; rewrite it with one of {names}")
    return module


def _check_containers(path: str, module: nn.Module) -> None:
    """PyTorch does not see the modules in a plain list, so that a copy of the model cannot lift them."""
    for name, value in vars(module).items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if not name.startswith("_") and any(isinstance(item, nn.RNNCellBase | nn.RNNBase) for item in held):
            where = f"{path}.{name}" if path else name
            raise ModelError(f"{where} holds recurrent layers in a plain {type(value).__name__}; use nn.ModuleList")


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether the module is a recurrent layer as PyTorch has it, and no subclass; or a loop's backward one."""
    return type(module) in LAYERS


def kind_of(module: Layer) -> Kind:
    """The layer's operator."""
    return KINDS["LSTM_PROJECTED" if module.proj_size else module.mode]


def states_of(module: Layer) -> tuple[StateKind, ...]:
    """The states of one call of the module, in the order in which PyTorch takes and returns them."""
    rows = module.num_layers * directions_of(module)
    sizes = {"h": module.proj_size or module.hidden_size, "c": module.hidden_size}
    return tuple(StateKind(letter, rows, sizes[letter]) for letter in kind_of(module).letters)


def as_states(hx: Tensor | States) -> States:
    """A call's states as PyTorch takes and returns them, a tensor alone or a pair, as a tuple."""
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def as_hx(states: States) -> Tensor | States:
    """`as_states` backwards."""
    return states[0] if len(states) == 1 else states


def weights_of(module: Layer, layer: int, direction: int) -> list[Tensor]:
    """weight_ih and weight_hh of one layer and direction, then what it has of bias_ih and bias_hh, and weight_hr."""
    return list(module.all_weights[layer * directions_of(module) + direction])


def sides_of(module: Layer) -> tuple[str, ...]:
    """The directions that the module's weights and states are of, in their order: "forward", "reverse"."""
    if isinstance(module, BACKWARD):
        return ("reverse",)
    return ("forward", "reverse") if module.bidirectional else ("forward",)


def places_of(module: Layer, direction: str) -> tuple[int, ...]:
    """Where the module has the weights and states that a run in one direction, or "bidirectional", takes."""
    sides = sides_of(module)
    return tuple(range(len(sides))) if direction == "bidirectional" else (sides.index(direction),)


def directions_of(module: Layer) -> int:
    """2 for a bidirectional layer, else 1."""
    return len(sides_of(module))


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    # Quantised layers share no base class with the float ones: their modules' names are what marks them.
    named = any(kind in type(module).__name__ for kind in ("LSTM", "GRU", "RNN"))
    return named and ".quantized" in type(module).__module__
