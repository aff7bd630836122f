"""Every shape of recurrent stack, under every policy, against eager calls that the tests make themselves."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tests.parity.oracle import Exported, Net, State, assert_close, carried, export, int32, looked_ahead
from torch import Tensor, nn

LENGTHS = (9, 1, 4, 6)
AHEADS = (2, 0, 5, 1)


STACKS = list(product((1, 2, 3), (False, True), (False, True)))
# In every second stack PyTorch's axes are batch first: each two of the options meet in every combination.
OTHERS = {
    "GRU": (nn.GRU, {}, [(1, True, False), (2, False, True), (3, True, True), (4, False, False)]),
    "RNN tanh": (nn.RNN, {}, [(1, False, True), (2, True, False), (4, True, True)]),
    # Projected: h of 3 beside c of 7.
    "LSTMP": (nn.LSTM, {"proj_size": 3}, [(1, True, False), (2, True, True), (3, False, True)]),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}, [(1, True, True), (2, False, False), (3, True, False)]),
}


@pytest.mark.parametrize(("layers", "bidirectional", "bias"), STACKS)
def test_stack(tmp_path: Path, layers: int, bidirectional: bool, bias: bool) -> None:
    """A ragged batch that starts from random states is answered, and its states left, as eager PyTorch does."""
    _check(tmp_path, nn.LSTM, layers, bidirectional, bias)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("kind", "options", "stack"),
    [
        pytest.param(kind, options, stack, id=f"{name} {stack}")
        for name, (kind, options, stacks) in OTHERS.items()
        for stack in stacks
    ],
)
def test_other_kinds(
    tmp_path: Path, kind: type[nn.RNNBase], options: dict[str, str | int], stack: tuple[int, bool, bool]
) -> None:
    """The same holds for GRU and RNN, whose state is h alone, and for LSTMs whose h is projected."""
    _check(tmp_path, kind, *stack, **options)


def _check(
    folder: Path, kind: type[nn.RNNBase], layers: int, bidirectional: bool, bias: bool, **options: str | int
) -> None:
    torch.manual_seed(layers)
    batch_first = bias == (layers % 2 == 0)
    net = Net(
        kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first, **options
    ).eval()
    exported = export(net.eval(), torch.randn(2, 3, 5), folder)
    if bidirectional:
        _check_lookahead(exported, net)
    _check_whole(exported, net)


def _check_whole(exported: Exported, net: Net) -> None:
    """Causal, carry and full are one graph."""
    x = torch.randn(len(LENGTHS), max(LENGTHS), 5)
    states = exported.states(len(LENGTHS))
    for found in exported.run("model.onnx", x, int32(*LENGTHS), *states):
        for row, length in enumerate(LENGTHS):
            y, ended = carried(net, x[row, :length], tuple(s[row] for s in states), [length])
            _check_row(exported, found, row, y, ended)


def _check_lookahead(exported: Exported, net: Net) -> None:
    """One block each, some with frames ahead; the last row of the batch is long ahead of a short block."""
    x, x_ahead = torch.randn(len(LENGTHS), max(LENGTHS), 5), torch.randn(len(LENGTHS), max(AHEADS), 5)
    states = exported.states(len(LENGTHS))
    for found in exported.run("lookahead.onnx", x, x_ahead, int32(*LENGTHS), int32(*AHEADS), *states):
        for row, (length, ahead) in enumerate(zip(LENGTHS, AHEADS, strict=True)):
            state = tuple(s[row] for s in states)
            y, ended = looked_ahead(net, x[row, :length], x_ahead[row, :ahead], state)
            _check_row(exported, found, row, y, ended)


def _check_row(exported: Exported, found: dict[str, Tensor], row: int, y: Tensor, ended: State) -> None:
    assert_close(found["output"][row, : len(y)], y)
    names = [state.output for state in exported.bundle.manifest.states]
    assert names == ["rnn.h_n", "rnn.c_n"][: len(ended)]
    for name, state in zip(names, ended, strict=True):
        assert_close(found[name][row], state)
