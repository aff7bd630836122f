"""Bidirectional LSTMs written by hand from cells: one layer where they are one, their own semantics where not."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.client.process import serving
from tests.support.models import Tagger, looked_ahead, make, whole
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx
from carousel_protos.bundle import Bundle
from carousel_protos.v1 import manifest_pb2 as pb


class Handmade(nn.Module):
    """`[batch, time, 5]` → `[batch, time, 3]`: two cells, one over the flipped frames, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = nn.LSTMCell(5, 7)
        self.back = nn.LSTMCell(5, 7)
        self.linear = nn.Linear(14, 3)

    def run(self, cell: nn.LSTMCell, x: Tensor) -> Tensor:
        h, c = torch.zeros(x.size(0), 7), torch.zeros(x.size(0), 7)
        outputs = []
        for t in range(x.size(1)):
            h, c = cell(x[:, t], (h, c))
            outputs.append(h)
        return torch.stack(outputs, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        forward = self.run(self.ahead, x)
        backward = self.run(self.back, torch.flip(x, dims=[1])).flip(dims=[1])
        return self.linear(torch.cat([forward, backward], dim=2))


def same_as(handmade: Handmade) -> Tagger:
    """The model with `nn.LSTM(bidirectional=True)` and the same weights."""
    tagger = make(Tagger, layers=1)
    weights = {f"{name}_l0": weight for name, weight in handmade.ahead.state_dict().items()}
    weights |= {f"{name}_l0_reverse": weight for name, weight in handmade.back.state_dict().items()}
    tagger.lstm.load_state_dict(weights)
    tagger.linear.load_state_dict(handmade.linear.state_dict())
    return tagger


def operators(bundle: Bundle, file: str) -> list[str]:
    """The direction of each LSTM node of a graph."""
    nodes = [node for node in onnx.load(bundle.file(file)).graph.node if node.op_type == "LSTM"]
    return [attribute.s.decode() for node in nodes for attribute in node.attribute if attribute.name == "direction"]


@pytest.mark.system("5", "a BiLSTM of two cells, as one bidirectional operator")
def test_two_cells_are_a_bidirectional_lstm(tmp_path: Path) -> None:
    """Two cells over the frames and the flipped frames are one fused operator, and stream as `nn.LSTM` does."""
    model = make(Handmade)
    bundle = cx.export(model.eval(), torch.randn(2, 6, 5), name="handmade", out=tmp_path)
    assert operators(bundle, "model.onnx") == ["bidirectional"]
    assert bundle.manifest.default_policy.kind == pb.POLICY_KIND_LOOKAHEAD
    assert [list(state.dims) for state in bundle.manifest.states] == [["batch", "2", "7"]] * 2
    # The operators themselves: no node but these and the linear layer turns or mixes frames.
    assert not {"Loop", "Scan", "ReverseSequence", "GatherND"} & {
        node.op_type for node in onnx.load(bundle.file("model.onnx")).graph.node
    }
    tagger = same_as(model)
    streams = [torch.randn(length, 5) for length in (23, 1, 9)]
    with serving(tmp_path) as server, cc.connect(server.address) as client:
        for x in streams:
            torch.testing.assert_close(whole(model, x), whole(tagger, x), rtol=0, atol=1e-6)
            for policy, wanted in (
                (cc.Full(), whole(model, x)),
                (cc.Lookahead(4, 2), looked_ahead(tagger, x, 4, 2)),
                (None, looked_ahead(tagger, x, 8, 8)),
            ):
                with client.session("handmade", policy=policy) as session:
                    answers = list(session.stream([part.numpy() for part in x.split(5)]))
                np.testing.assert_allclose(np.concatenate(answers), wanted, rtol=0, atol=1e-5)


class Separate(nn.Module):
    """Time-major `[time, batch, 5]` → `[time, batch, 12]`: each direction is a stack by itself, joined at the top."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        sizes = [5, *[6] * layers]
        self.forwards = nn.ModuleList([nn.LSTMCell(*pair) for pair in pairwise(sizes)])
        self.backwards = nn.ModuleList([nn.LSTMCell(*pair) for pair in pairwise(sizes)])

    def stack(self, cells: nn.ModuleList, frames: list[Tensor]) -> list[Tensor]:
        states = [(frames[0].new_zeros(len(frames[0]), 6),) * 2 for _ in cells]
        outputs = []
        for frame in frames:
            below = frame
            for i, cell in enumerate(cells):
                states[i] = cell(below, states[i])
                below = states[i][0]
            outputs.append(below)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        forward = self.stack(self.forwards, list(x))
        backward = self.stack(self.backwards, [x[t] for t in range(len(x) - 1, -1, -1)])
        backward.reverse()
        return torch.stack([torch.cat(pair, dim=-1) for pair in zip(forward, backward, strict=True)])


def direction(cells: nn.ModuleList) -> nn.LSTM:
    """A direction's cells as an eager stack of one direction."""
    lstm = nn.LSTM(5, 6, num_layers=len(cells))
    weights = [cell.state_dict().items() for cell in cells]
    lstm.load_state_dict({f"{name}_l{i}": weight for i, own in enumerate(weights) for name, weight in own})
    return lstm


@torch.no_grad()
def separately_looked_ahead(model: Separate, x: Tensor, block: int, ahead: int) -> Tensor:
    """Each direction by itself: forward from what is carried, backward from zero at the end of the frames ahead."""
    forward, backward = direction(model.forwards), direction(model.backwards)
    state, outputs = None, []
    for at in range(0, len(x), block):
        seen = x[at : at + block + ahead]
        y, state = forward(seen[:block], state)
        back = backward(seen.flip(0))[0].flip(0)
        outputs.append(torch.cat([y, back[:block]], dim=-1))
    return torch.cat(outputs)


@torch.no_grad()
def separately_carried(model: Separate, x: Tensor, block: int) -> Tensor:
    """Both directions' states fed back, block after block."""
    forward, backward = direction(model.forwards), direction(model.backwards)
    ahead, back, outputs = None, None, []
    for part in x.split(block):
        y, ahead = forward(part, ahead)
        y_back, back = backward(part.flip(0), back)
        outputs.append(torch.cat([y, y_back.flip(0)], dim=-1))
    return torch.cat(outputs)


@pytest.mark.system("6", "a BiLSTM of cell lists whose directions are stacked separately")
def test_directions_stacked_separately(tmp_path: Path) -> None:
    """A second layer that sees its own direction alone keeps that meaning, offline and under every policy."""
    model = make(Separate)
    bundle = cx.export(model.eval(), torch.randn(6, 2, 5), name="separate", out=tmp_path, policy=cx.Lookahead(3, 2))
    assert sorted(operators(bundle, "model.onnx")) == ["forward", "forward", "reverse", "reverse"]
    assert [layer.name for layer in bundle.manifest.layers] == [
        "forwards.0",
        "forwards.1",
        "backwards.0",
        "backwards.1",
    ]
    with serving(tmp_path) as server, cc.connect(server.address) as client:
        for x in [torch.randn(length, 5) for length in (23, 1, 9)]:
            with torch.no_grad():
                offline = model(x[:, None])[:, 0]
            for policy, wanted in (
                (cc.Full(), offline),
                (None, separately_looked_ahead(model, x, 3, 2)),
                (cc.Lookahead(5, 9), separately_looked_ahead(model, x, 5, 9)),
                (cc.Carry(4), separately_carried(model, x, 4)),
            ):
                with client.session("separate", policy=policy) as session:
                    answers = list(session.stream([part.numpy() for part in x.split(5)]))
                np.testing.assert_allclose(np.concatenate(answers), wanted, rtol=0, atol=1e-5)
    lstm = make_lstm(model)
    with torch.no_grad():
        assert not torch.allclose(lstm(x[:, None])[0][:, 0], offline, atol=1e-3)


def make_lstm(model: Separate) -> nn.LSTM:
    """The `nn.LSTM(bidirectional=True)` that it could be mistaken for: the second layer sees both directions."""
    lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True)
    own = lstm.state_dict()
    for cells, suffix in ((model.forwards, ""), (model.backwards, "_reverse")):
        for i, cell in enumerate(cells):
            for name, weight in cell.state_dict().items():
                mine = own[f"{name}_l{i}{suffix}"]
                mine.copy_(torch.cat([weight, weight], 1) if mine.shape != weight.shape else weight)
    return lstm
