"""Whether forward is a function of its inputs: what it draws, keeps or writes over makes an answer no file can give."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from carousel_export.culprits import same
from carousel_export.eager import Eager
from carousel_export.errors import ModelError


def check_steady(eager: Eager, arguments: Sequence[Any], names: Sequence[str]) -> None:
    """Run the model twice on the same arguments.

    Raises `ModelError` where it writes into an argument, or answers otherwise the second time; `ExampleError` where it
    fails.
    """
    first, written = _run(eager, arguments)
    for name, before, after in zip(names, arguments, written, strict=True):
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ModelError(f"{eager.name} writes into its argument {name!r}; compute a new tensor in forward")
    again, _ = _run(eager, arguments)
    if len(first) != len(again) or not all(map(same, first, again)):
        raise ModelError(
            f"{eager.name} answers otherwise when it is called again with the same inputs: forward draws random "
            "numbers, or keeps something from call to call, as a self.hidden; draw nothing, and take a state as an "
            "argument and return it"
        )


def _run(eager: Eager, arguments: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The results, and the arguments as they are afterwards."""
    given = pytree.tree_map(torch.clone, list(arguments))
    results = eager.run(given)
    return [leaf.clone() for leaf in results if isinstance(leaf, Tensor)], given
