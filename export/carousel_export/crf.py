"""CRF layers whose `decode` returns lists, as the published `torchcrf.CRF` does: a graph returns tensors.

The eager model's `decode` is the layer's own, with its lists as one tensor; the exported model's is `viterbi_decode`.
The gate compares the two.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from carousel_export.viterbi import viterbi_decode

_TENSORS = ("start_transitions", "end_transitions", "transitions")


def find_crfs(model: nn.Module) -> list[nn.Module]:
    """The modules with that layer's parameters and its `decode(emissions, mask=None)`."""
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), Tensor) for name in _TENSORS)
        and isinstance(getattr(module, "batch_first", None), bool)
        and callable(getattr(module, "decode", None))
    ]


def return_tensors(model: nn.Module) -> None:
    """Make each CRF's own `decode` return a tensor `[batch, time]`; a shorter row repeats its last tag."""
    for module in find_crfs(model):
        _replace(module, functools.partial(_as_tensor, type(module).decode, module))  # type: ignore[attr-defined]  # found by it


def decode_in_graph(model: nn.Module) -> None:
    """Make each CRF's `decode` an operator that can be exported."""
    for module in find_crfs(model):
        _replace(module, functools.partial(_decode, module))


@contextmanager
def decoding_in_graph(model: nn.Module) -> Iterator[None]:
    """Within, `decode_in_graph`; afterwards as before."""
    before = [(module, module.__dict__["decode"]) for module in find_crfs(model)]
    decode_in_graph(model)
    try:
        yield
    finally:
        for module, decode in before:
            _replace(module, decode)


def _replace(module: nn.Module, decode: Callable[..., Tensor]) -> None:
    # An instance's own attribute comes before its class's method.
    module.__dict__["decode"] = decode


def _as_tensor(
    decode: Callable[..., list[list[int]]], module: nn.Module, emissions: Tensor, mask: Tensor | None = None
) -> Tensor:
    paths = decode(module, emissions, mask)
    longest = max(len(path) for path in paths)
    return torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths])


def _decode(module: nn.Module, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
    time = 1 if module.batch_first else 0
    lengths = None if mask is None else mask.sum(time)
    by_row = emissions if module.batch_first else emissions.transpose(0, 1)
    start, end, transitions = (getattr(module, name) for name in _TENSORS)
    return viterbi_decode(by_row, transitions, start, end, lengths)[0]
