"""Weights that are computed from others, as by weight_norm, spectral_norm or pruning, folded into plain ones."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# The older ones are hooks that set the weight before each call.
_HOOKS: tuple[tuple[type, str, Callable[[nn.Module, str], object]], ...] = (
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
)
_SOURCES = ("_g", "_v", "_orig")


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy; computed weights, which PyTorch refuses to copy while they carry a gradient, are copied by value."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor) and not item.is_leaf:
                    memo[id(item)] = item.detach().clone()
    return copy.deepcopy(model, memo)


def fold(module: nn.Module) -> None:
    """Make every computed weight of a copied module, and of those in it, a plain parameter of the same value.

    It counts as trainable where what it was computed from is. The module has to be in evaluation mode, as spectral_norm
    would go on estimating otherwise.
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            _fold_parametrizations(part)
        for hook in list(part._forward_pre_hooks.values()):  # noqa: SLF001 - removing by name needs them
            for kind, attribute, remove in _HOOKS:
                if isinstance(hook, kind):
                    name = getattr(hook, attribute)
                    sources = [part._parameters.get(name + end) for end in _SOURCES]  # noqa: SLF001
                    remove(part, name)
                    getattr(part, name).requires_grad_(any(s is not None and s.requires_grad for s in sources))


def _fold_parametrizations(part: nn.Module) -> None:
    """`parametrize.remove_parametrizations` would change the class, which a copy shares with its original."""
    found = part.parametrizations
    assert isinstance(found, nn.ModuleDict), "a parametrized module has them"
    with torch.no_grad():
        values = {name: getattr(part, name).clone() for name in found}
    trainable = {name: any(p.requires_grad for p in each.parameters()) for name, each in found.items()}
    are_parameters = {name: bool(list(each.parameters())) for name, each in found.items()}
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part.parametrizations
    for name, value in values.items():
        if are_parameters[name]:
            setattr(part, name, nn.Parameter(value, requires_grad=trainable[name]))
        else:
            part.register_buffer(name, value)
