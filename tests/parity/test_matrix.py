"""Every shape of LSTM stack, under every policy, against eager `nn.LSTM` calls that the tests make themselves."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tests.parity.oracle import Exported, Net, assert_close, carried, export, int32, looked_ahead

LENGTHS = (9, 1, 4, 6)
AHEADS = (2, 0, 5, 1)


@pytest.mark.parametrize(("layers", "bidirectional", "bias"), list(product((1, 2, 3), (False, True), (False, True))))
def test_stack(tmp_path: Path, layers: int, bidirectional: bool, bias: bool) -> None:
    """A ragged batch that starts from random states is answered, and its states left, as eager PyTorch does."""
    torch.manual_seed(layers)
    # Every two of the four options meet in every combination; all 24 together would say the same in twice the time.
    batch_first = bias == (layers % 2 == 0)
    net = Net(num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    exported = export(net, torch.randn(2, 3, 5), tmp_path)
    if bidirectional:
        _check_lookahead(exported, net)
    _check_whole(exported, net)


def _check_whole(exported: Exported, net: Net) -> None:
    """Causal, carry and full are one graph."""
    x = torch.randn(len(LENGTHS), max(LENGTHS), 5)
    states = exported.states(len(LENGTHS))
    for found in exported.run("model.onnx", x, int32(*LENGTHS), *states):
        for row, length in enumerate(LENGTHS):
            y, (h, c) = carried(net, x[row, :length], (states[0][row], states[1][row]), [length])
            assert_close(found["output"][row, :length], y)
            assert_close(found["lstm.h_n"][row], h)
            assert_close(found["lstm.c_n"][row], c)


def _check_lookahead(exported: Exported, net: Net) -> None:
    """One block each, some with frames ahead; the last row of the batch is long ahead of a short block."""
    x, x_ahead = torch.randn(len(LENGTHS), max(LENGTHS), 5), torch.randn(len(LENGTHS), max(AHEADS), 5)
    states = exported.states(len(LENGTHS))
    for found in exported.run("lookahead.onnx", x, x_ahead, int32(*LENGTHS), int32(*AHEADS), *states):
        for row, (length, ahead) in enumerate(zip(LENGTHS, AHEADS, strict=True)):
            state = (states[0][row], states[1][row])
            y, (h, c) = looked_ahead(net, x[row, :length], x_ahead[row, :ahead], state)
            assert_close(found["output"][row, :length], y)
            assert_close(found["lstm.h_n"][row], h)
            assert_close(found["lstm.c_n"][row], c)
