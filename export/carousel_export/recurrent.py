"""Which modules are recurrent, which of them can be lifted, and what states they have."""

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from carousel_export.errors import ModelError


@dataclass(frozen=True)
class StateKind:
    """One state tensor of a recurrent call: "h" or "c", with `rows` = layers × directions rows of `size`."""

    letter: str
    rows: int
    size: int


def find_recurrent(model: nn.Module) -> dict[str, nn.LSTM]:
    """The recurrent modules by their path, each once.

    Raises `ModelError` where there is none, or one that cannot be lifted; the line names it and the way out.
    """
    found: dict[str, nn.LSTM] = {}
    for path, module in model.named_modules():
        _check_containers(path, module)
        if _is_recurrent(module):
            found[path] = _checked(f"{path or 'the model itself'} ({type(module).__name__})", module)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no recurrent layer among its modules; Carousel exports models with nn.LSTM"
        )
    return found


def _checked(where: str, module: nn.Module) -> nn.LSTM:
    if is_parametrized(module):
        raise ModelError(
            f"{where} is parametrized; fold that in first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    if _is_quantized(module):
        raise ModelError(f"{where} is quantized; export the float model")
    if not isinstance(module, nn.LSTM):
        raise ModelError(f"{where} cannot be exported yet; rewrite it with nn.LSTM")
    if type(module) is not nn.LSTM:
        raise ModelError(f"{where} is a subclass of nn.LSTM, whose forward may do anything; use a plain nn.LSTM")
    if module.proj_size:
        raise ModelError(f"{where} has proj_size={module.proj_size}, which ONNX has no operator for; use proj_size=0")
    return module


def _check_containers(path: str, module: nn.Module) -> None:
    """PyTorch does not see the modules in a plain list, so that a copy of the model cannot lift them."""
    for name, value in vars(module).items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if not name.startswith("_") and any(isinstance(item, nn.Module) and _is_recurrent(item) for item in held):
            where = f"{path}.{name}" if path else name
            raise ModelError(f"{where} holds recurrent layers in a plain {type(value).__name__}; use nn.ModuleList")


def kind_of(module: nn.Module) -> str:
    """The layer's kind, as the manifest names it."""
    return "LSTM" if isinstance(module, nn.LSTM) else type(module).__name__


def states_of(module: nn.LSTM) -> tuple[StateKind, ...]:
    """The states of one call of the module, in the order in which PyTorch takes and returns them."""
    rows = module.num_layers * directions_of(module)
    return (StateKind("h", rows, module.hidden_size), StateKind("c", rows, module.hidden_size))


def directions_of(module: nn.LSTM) -> int:
    """2 for a bidirectional layer, else 1."""
    return 2 if module.bidirectional else 1


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    # Quantised layers share no base class with the float ones: their modules' names are what marks them.
    named = any(kind in type(module).__name__ for kind in ("LSTM", "GRU", "RNN"))
    return named and ".quantized" in type(module).__module__
