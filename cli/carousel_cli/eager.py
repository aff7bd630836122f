"""The eager model that the command line names: a factory, and a checkpoint to load into it. Needs torch."""

import logging
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import click
import torch
from torch import Tensor, nn

from carousel_cli.common import import_object, one_line

log = logging.getLogger(__name__)

_SAVE = "save the weights with torch.save(model.state_dict(), …)"


def make_model(reference: str, checkpoint: Path | None) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """What MODULE:FACTORY returns: a module, with example inputs if it gives any. Raises `click.ClickException`.

    The module is in evaluation mode, and a line says so where the factory left it, or a part of it, in training mode.
    """
    factory = import_object(reference)
    try:
        made = factory()
    except Exception as error:
        raise click.ClickException(f"{reference} failed: {one_line(error)}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise click.ClickException(
            f"{reference} returned a {type(model).__name__}; return an nn.Module, or (nn.Module, example_inputs)"
        )
    if checkpoint is not None:
        _load(model, checkpoint)
    if any(module.training for module in model.modules()):
        log.warning("%s gives a model in training mode: it is set to evaluation mode, as by model.eval()", reference)
        model.eval()
    return model, (example,) if isinstance(example, Tensor) else example


def _load(model: nn.Module, checkpoint: Path) -> None:
    try:
        with warnings.catch_warnings():
            # Of a pickle that torch did not write, which is then refused with a reason.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not in torch's words, which say how to read it all the same.
        raise click.ClickException(
            f"{checkpoint} is no file of tensors alone, but maybe of a whole model, and reading it could run code; "
            f"{_SAVE} where the model was made"
        ) from error
    except Exception as error:  # what torch raises for a file of anything else is anything
        raise click.ClickException(
            f"{checkpoint} cannot be read as a checkpoint; {_SAVE} ({one_line(error)})"
        ) from error
    if not isinstance(state, dict):
        raise click.ClickException(f"{checkpoint} holds a {type(state).__name__}; {_SAVE}")
    state = _unwrapped(model, state, checkpoint)
    if (misfit := _misfit(model, state)) is not None:
        raise click.ClickException(f"{checkpoint} does not fit {type(model).__name__}: {misfit}")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise click.ClickException(f"{checkpoint} does not fit {type(model).__name__}: {one_line(error)}") from error


def _unwrapped(model: nn.Module, state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The model's tensors, where a trainer keeps them one level down, or with one prefix before all their names.

    Believed only where exactly one reading has the model's names and no others, and said in a line; else `state`.
    """
    own = set(model.state_dict())
    levels = {"": state} | {str(key): value for key, value in state.items() if isinstance(value, dict)}
    found = [
        (key, prefix)
        for key, level in levels.items()
        for prefix in {str(name).removesuffix(min(own)) for name in level} | {""}
        if level.keys() == {prefix + name for name in own}
    ]
    if len(found) != 1 or found == [("", "")]:
        return state
    ((key, prefix),) = found
    which = f"the tensors under {key!r}" if key else "its tensors"
    log.warning("%s: %s are taken%s", checkpoint, which, f", without {prefix!r} before their names" if prefix else "")
    return {name.removeprefix(prefix): value for name, value in levels[key].items()}


def _misfit(model: nn.Module, state: dict[str, Any]) -> str | None:
    """What keeps a checkpoint from being the model's, and what to do; None for what `load_state_dict` has to judge."""
    own = model.state_dict()
    nested = [
        key
        for key, value in state.items()
        if isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())
    ]
    if len(nested) > 1:
        keys = " and ".join(map(repr, nested))
        return f"it has tensors under {keys}; save those that are meant, torch.save(checkpoint[{nested[0]!r}], …)"
    where = f"under {nested[0]!r} " if nested else ""
    state = state[nested[0]] if nested else state
    lacking = [name for name in own if name not in state]
    foreign = [str(key) for key in state if key not in own]
    if lacking or foreign:
        lacks = f"it lacks {len(lacking)} of {len(own)} tensors ({', '.join(lacking[:1])})" if lacking else ""
        has = f"it has {len(foreign)} others ({foreign[0]})" if foreign else ""
        parts = " and ".join(part for part in (lacks, has) if part)
        return f"{where}{parts}; give the checkpoint of this very model, or rename its keys where they mean the same"
    for name, tensor in own.items():
        value = state[name]
        if isinstance(value, Tensor) and isinstance(tensor, Tensor) and value.shape != tensor.shape:
            return (
                f"its {name} is {list(value.shape)} and the model's is {list(tensor.shape)}; make the model with the "
                "sizes that it was trained with"
            )
    return None


@dataclass(frozen=True)
class InputSpec:
    """An input as --input gives it, `x:float32:batch,time,80`."""

    name: str
    dtype: torch.dtype
    dims: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `click.UsageError`."""
        name, dtype, dims = (*text.split(":"), "", "")[:3]
        found = getattr(torch, dtype, None)
        sizes = tuple(dim.strip() for dim in dims.split(","))
        known = all(dim.isidentifier() or (dim.isdecimal() and int(dim) > 0) for dim in sizes)
        rolled = "time" in sizes or "batch" in sizes
        if text.count(":") != 2 or not name or not isinstance(found, torch.dtype) or not known or not rolled:
            raise click.UsageError(f"--input {text!r} is not NAME:DTYPE:DIMS, such as x:float32:batch,time,80")
        return cls(name, found, sizes)


def draw_inputs(specs: Sequence[InputSpec], model: nn.Module) -> tuple[Tensor, ...]:
    """Example inputs: normal numbers, and for whole numbers any that every embedding of the model has.

    A whole number a row whose name has "len" in it, as in `lengths:int64:batch`, is drawn as the rows' lengths.
    """
    taken = {int(dim) for spec in specs for dim in spec.dims if dim.isdecimal()}
    # The exporter tells axes apart by their sizes.
    names = dict.fromkeys(["batch", "time", *(dim for spec in specs for dim in spec.dims if not dim.isdecimal())])
    sizes = dict(zip(names, (size for size in count(3, 4) if size not in taken), strict=False))
    ids = min((layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)), default=2)
    drawn = []
    for spec in specs:
        shape = [sizes.get(dim) or int(dim) for dim in spec.dims]
        if spec.dims == ("batch",) and not spec.dtype.is_floating_point and "len" in spec.name.lower():
            drawn.append(torch.arange(sizes["time"], sizes["time"] - sizes["batch"], -1, dtype=spec.dtype))
            continue
        drawn.append(
            torch.randn(shape).to(spec.dtype)
            if spec.dtype.is_floating_point
            else torch.randint(0, ids, shape).to(spec.dtype)
        )
    return tuple(drawn)
