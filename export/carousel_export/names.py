"""What inputs and outputs are called, and whether an example can be used at all."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from carousel_export.eager import Eager
from carousel_export.errors import ExampleError, ModelError
from carousel_export.signature import BATCH, SUPPORTED_DTYPES, Signature


def input_names_of(eager: Eager, example: Sequence[object], given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        parameters = inspect.signature(eager.kind.forward).parameters.values()
        plain_names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
        unnamed = [f"input_{i}" for i in range(len(plain_names), len(example))]
        given = [*plain_names, *unnamed][: len(example)]
    if len(given) != len(example):
        raise ExampleError(f"{len(given)} input names for {len(example)} example inputs; give one for each")
    return tuple(given)


def output_names_of(tree: Any, given: Sequence[str] | None) -> tuple[str, ...]:
    leaves = pytree.tree_flatten_with_path(tree)[0]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            where = "".join(str(key) for key in path) or "itself"
            raise ModelError(f"the model's result {where} is of type {type(leaf).__name__}; return tensors only")
        if leaf.dtype not in SUPPORTED_DTYPES:
            raise ModelError(f"the model returns {leaf.dtype}; return float32, an integer type or bool")
    if given is None:
        keys = [getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None for path, _ in leaves]
        single = len(leaves) == 1
        given = [key if isinstance(key, str) else "output" if single else f"output_{i}" for i, key in enumerate(keys)]
    if len(given) != len(leaves):
        raise ExampleError(f"{len(given)} output names for {len(leaves)} outputs; give one for each")
    return tuple(given)


def check_example(names: Sequence[str], example: tuple[Tensor, ...]) -> None:
    for name, x in zip(names, example, strict=True):
        if x.dtype not in SUPPORTED_DTYPES:
            way = "give it in float32: .float()" if x.is_floating_point() else "give float32, an integer type or bool"
            raise ExampleError(f"example input {name!r} is {x.dtype}; {way}")
        if x.dim() < 1 or not x.numel():
            raise ExampleError(f"example input {name!r} has shape {list(x.shape)}; give one with at least one frame")
        if not torch.isfinite(x).all():
            raise ExampleError(
                f"example input {name!r} has values that are not finite; give ones that the model will see"
            )


def check_rows(signature: Signature, example: Sequence[Tensor]) -> None:
    """A batch of one row is no example: an axis that is always 1 looks like it, and it does not show what rows mix."""
    ports = {port.name: port for port in (*signature.inputs, *signature.contexts)}
    for name, x in zip(signature.arguments, example, strict=True):
        dims = ports[name].eager_dims
        if BATCH in dims and x.shape[dims.index(BATCH)] == 1:
            raise ExampleError(
                f"example input {name!r} {list(x.shape)} has a batch of 1 (axis {dims.index(BATCH)}), which an axis "
                "that is always 1 looks like; give two rows or more"
            )
