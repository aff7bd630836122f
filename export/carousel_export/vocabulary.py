"""Which inputs are token ids, and how many there are: the embeddings that look them up."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from carousel_export.eager import Eager
from carousel_export.signature import Signature


def find_vocabularies(eager: Eager, signature: Signature, example: Sequence[Tensor]) -> list[int]:
    """For each input of the signature the rows of the smallest `nn.Embedding` that it is given to as it is; else 0.

    Seen in a run of the example. A server refuses other ids before they are a session's, where the model would refuse
    them only once they are run, which under full or lookahead is chunks later.
    """
    looked_up: list[tuple[Tensor, int]] = []

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
            looked_up.append((args[0], module.num_embeddings))

    embeddings = [module for module in eager.module.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_pre_hook(note) for module in embeddings]
    try:
        eager.run(example)
    finally:
        for hook in hooks:
            hook.remove()
    names = signature.arguments or [port.name for port in (*signature.inputs, *signature.contexts)]
    given = dict(zip(names, example, strict=True))
    return [
        min((rows for ids, rows in looked_up if _is_same(ids, given[port.name])), default=0)
        for port in signature.inputs
    ]


def _is_same(ids: Tensor, given: Tensor) -> bool:
    """Whether an embedding was given this input, in whatever layout and integer type."""
    if given.is_floating_point() or ids.numel() != given.numel():
        return False
    return torch.equal(ids.flatten().long().sort().values, given.flatten().long().sort().values)
