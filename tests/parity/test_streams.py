"""Whole streams through the graphs, block after block, against eager PyTorch."""

import pytest
import torch
from tests.parity.oracle import Exported, Net, assert_close, carried, export, int32, looked_ahead_stream
from torch import Tensor

import carousel_export as cx


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(3)
    return Net(num_layers=2, bidirectional=True, batch_first=True)


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(net.eval(), torch.randn(2, 4, 5), tmp_path_factory.mktemp("models"), policy=cx.Lookahead(4, 2))


@pytest.mark.parametrize(("block", "ahead"), [(8, 8), (1, 0), (1, 4), (3, 5), (5, 1), (200, 0)])
def test_lookahead_stream(exported: Exported, net: Net, block: int, ahead: int) -> None:
    """One lookahead graph serves every block and every ahead, whatever the bundle's own are."""
    x = torch.randn(61, 5)
    start = exported.states(1)
    wanted = looked_ahead_stream(net, x, (start[0][0], start[1][0]), block, ahead)
    for runtime in (0, 1):
        states, outputs = start, []
        for at in range(0, len(x), block):
            part, after = x[at : at + block], x[at + block : at + block + ahead]
            feeds = (part[None], after[None], int32(len(part)), int32(len(after)))
            found = exported.run("lookahead.onnx", *feeds, *states)[runtime]
            states = [found["rnn.h_n"], found["rnn.c_n"]]
            outputs.append(found["output"][0])
        assert_close(torch.cat(outputs), wanted)


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [7, 1, 13, 2, 17]])
def test_carry_stream(exported: Exported, net: Net, sizes: list[int]) -> None:
    """Carry feeds both directions back, chunk by chunk, as eager PyTorch does when it is called so."""
    x = torch.randn(40, 5)
    states = exported.states(1)
    wanted, (h, _) = carried(net, x, (states[0][0], states[1][0]), sizes)
    outputs = []
    for part in torch.split(x, sizes):
        found, _ = exported.run("model.onnx", part[None], int32(len(part)), *states)
        states = [found["rnn.h_n"], found["rnn.c_n"]]
        outputs.append(found["output"][0])
    assert_close(torch.cat(outputs), wanted)
    assert_close(states[0][0], h)


def test_looking_to_the_end_is_offline(exported: Exported, net: Net) -> None:
    """With all frames ahead, lookahead gives the offline answer."""
    x = torch.randn(20, 5)
    with torch.no_grad():
        wanted = net(x[None])[0]
    outputs: list[Tensor] = []
    states = [torch.zeros_like(s) for s in exported.states(1)]
    for at in range(0, 20, 6):
        part, after = x[at : at + 6], x[at + 6 :]
        feeds = (part[None], after[None], int32(len(part)), int32(len(after)))
        found, _ = exported.run("lookahead.onnx", *feeds, *states)
        states = [found["rnn.h_n"], found["rnn.c_n"]]
        outputs.append(found["output"][0])
    assert_close(torch.cat(outputs), wanted)


def test_backward_rows_of_a_lookahead_state_are_nothing(exported: Exported) -> None:
    """What stands in a backward direction's state rows changes no bit of a lookahead answer, and comes back zero."""
    x = torch.randn(2, 6, 5)
    feeds = (x[:, :4], x[:, 4:], int32(4, 3), int32(2, 0))
    states = exported.states(2)
    other = [s.clone() for s in states]
    for s in other:
        s[:, 1::2] = 9.0
    for one, two in zip(
        exported.run("lookahead.onnx", *feeds, *states), exported.run("lookahead.onnx", *feeds, *other), strict=True
    ):
        assert torch.equal(one["output"][0], two["output"][0])
        assert not one["rnn.h_n"][:, 1::2].any()
        assert not one["rnn.c_n"][:, 1::2].any()
