"""Layers that a model calls frame by frame, as the cells that they then are: so that their loop is one over cells."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carousel_export.eager import Eager
from carousel_export.errors import ModelError
from carousel_export.loops.layers import Cell
from carousel_export.loops.program import filled, tensors_of
from carousel_export.recurrent import Layer, States, as_hx, as_states, find_cells, find_recurrent
from carousel_export.runs import Run, candidates, grow_all, run_on
from carousel_export.signature import TIME

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Framed(nn.ModuleList):
    """A layer of one direction on one frame: its cells one after the other, with its weights, and what it takes."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(_cell(layer, i) for i in range(layer.num_layers))
        self._axis = 1 if layer.batch_first else 0

    def flatten_parameters(self) -> None:
        """Nothing, as a cell has no such thing."""

    def forward(self, input: Tensor, hx: Tensor | States | None = None) -> tuple[Tensor, Tensor | States]:  # noqa: A002
        """As the layer, on `[batch, 1, size]`, or `[1, batch, size]`."""
        x = input.squeeze(self._axis)
        ended = []
        for i, cell in enumerate(self):
            own = None if hx is None else as_hx(tuple(state[i] for state in as_states(hx)))
            states = as_states(cell(x, own))
            x = states[0]
            ended.append(states)
        return x.unsqueeze(self._axis), as_hx(tuple(torch.stack(rows) for rows in zip(*ended, strict=True)))


def with_cells(eager: Eager, example: Sequence[Any]) -> Eager:
    """The model with the layers that it calls once a frame as cells; itself where there are none.

    Raises `ModelError`, naming the layer, for one that is no chain of cells.
    """
    paths = _called_by_frame(eager, example)
    if not paths:
        return eager
    module = copy.deepcopy(eager.module)
    trainable = set(eager.trainable)
    for path in paths:
        layer = eager.recurrent[path]
        if layer.bidirectional or layer.proj_size:
            what = "two directions" if layer.bidirectional else "a projection"
            raise ModelError(
                f"{path} is called frame by frame and has {what}, which no cell has; call it once on the whole sequence"
            )
        module.set_submodule(path, Framed(module.get_submodule(path)))  # type: ignore[arg-type]
        trainable |= {
            f"{path}.{i}.{name}"
            for i in range(layer.num_layers)
            for name in _NAMES
            if f"{path}.{name}_l{i}" in eager.trainable
        }
    result = copy.copy(eager)
    result.module, result.trainable = module, frozenset(trainable)
    result.recurrent, result.cells = find_recurrent(module), find_cells(module)
    return result


def _called_by_frame(eager: Eager, example: Sequence[Any]) -> list[str]:
    """The layers that are called with one frame each time, and once more where the example has one frame more."""
    base = run_on(eager, example)
    if base is None:
        return []
    counts, single = _counts(base)
    paths = [path for path in eager.recurrent if counts[path] > 1 and single[path] == counts[path]]
    tensors = tensors_of(example)
    for axes in candidates(tensors) if paths else ():
        longer = run_on(eager, filled(example, grow_all(tuple(tensors), axes)))
        if longer is not None and all(_counts(longer)[0][path] > counts[path] for path in paths):
            return paths
    return []


def _counts(run: Run) -> tuple[Counter[str], Counter[str]]:
    """How often each layer is called, and how often with one frame."""
    names = [(call.name.partition(".call")[0], call.sizes[TIME]) for call in run.calls]
    return Counter(name for name, _ in names), Counter(name for name, frames in names if frames == 1)


def _cell(layer: Layer, i: int) -> Cell:
    size = layer.input_size if i == 0 else layer.hidden_size
    cell: Cell
    if isinstance(layer, nn.LSTM):
        cell = nn.LSTMCell(size, layer.hidden_size, bias=layer.bias)
    elif isinstance(layer, nn.GRU):
        cell = nn.GRUCell(size, layer.hidden_size, bias=layer.bias)
    else:
        assert isinstance(layer, nn.RNN), "there are no other layers"
        cell = nn.RNNCell(size, layer.hidden_size, bias=layer.bias, nonlinearity=layer.nonlinearity)
    for name in _NAMES if layer.bias else _NAMES[:2]:
        setattr(cell, name, getattr(layer, f"{name}_l{i}"))
    return cell.eval()
