"""Cells in a Python loop over time: exported for any number of frames, streamed with their state."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.models import make, whole
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx


class Stacked(nn.Module):
    """`[batch, time, 100]` → `[batch, time, 4]`: two LSTM cells of different size, 100 → 30 → 20, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(100, 30)
        self.second = nn.LSTMCell(30, 20)
        self.drop = nn.Dropout(0.3)
        self.linear = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        h_1, c_1 = torch.zeros(x.size(0), 30), torch.zeros(x.size(0), 30)
        h_2, c_2 = torch.zeros(x.size(0), 20), torch.zeros(x.size(0), 20)
        outputs = []
        for t in range(x.size(1)):
            h_1, c_1 = self.first(x[:, t, :], (h_1, c_1))
            h_2, c_2 = self.second(self.drop(h_1), (h_2, c_2))
            outputs.append(self.linear(h_2))
        return torch.stack(outputs, dim=1)


class Mixed(nn.Module):
    """Token ids, time-major `[time, batch]` → logits of each frame and a score of all, by a GRU and an RNN cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.gru = nn.GRUCell(6, 7)
        self.rnn = nn.RNNCell(13, 5, nonlinearity="relu")
        self.norm = nn.BatchNorm1d(5)
        self.score = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        embedded = self.embedding(tokens)
        below, above = None, embedded.new_zeros(tokens.shape[1], 5)
        logits = torch.zeros(*tokens.shape, 5)
        for t, frame in enumerate(embedded):
            below = self.gru(frame, below)
            above = self.rnn(torch.cat([below, frame], dim=1), above)
            logits[t] = self.norm(above).softmax(dim=1)
            self.score(above)
        return {"logits": logits, "score": self.score(above)}


def cut(x: np.ndarray, *sizes: int) -> list[np.ndarray]:
    assert sum(sizes) == len(x)
    return np.split(x, np.cumsum(sizes)[:-1])


@pytest.mark.system("4", "two LSTM cells of different size in a loop, 100 → 30 → 20")
def test_stacked_cells_stream(tmp_path: Path) -> None:
    """A loop over two cells answers any number of frames, however they are cut, as it does when it is run whole."""
    model = make(Stacked)
    with torch.no_grad():
        model.linear.weight *= 3
    bundle = cx.export(model.eval(), torch.randn(2, 5, 100), name="stacked", out=tmp_path)
    assert [state.input for state in bundle.manifest.states] == [
        f"{n}.{s}_0" for n in ("first", "second") for s in "hc"
    ]
    assert bundle.manifest.ragged
    streams = [torch.randn(length, 100) for length in (31, 1, 12)]
    with serving(tmp_path) as server, cc.connect(server.address) as client:
        for x in streams:
            sizes = (len(x),) if len(x) < 12 else (1, 4, len(x) - 5)
            with client.session("stacked") as session:
                answers = list(session.stream(cut(x.numpy(), *sizes)))
            np.testing.assert_allclose(np.concatenate(answers), whole(model, x), rtol=0, atol=1e-5)
        batch = torch.randn(3, 17, 100)
        with torch.no_grad():
            np.testing.assert_allclose(client.infer("stacked", batch.numpy()), model(batch), rtol=0, atol=1e-5)


@pytest.mark.system("4", "a GRU and an RNN cell in a loop, with an output for each frame and one for the sequence")
def test_mixed_cells_stream(tmp_path: Path) -> None:
    """Cells of two kinds, and what the loop does beside them, answer frame by frame; the last answer runs along."""
    model = make(Mixed)
    bundle = cx.export(model.eval(), torch.randint(0, 11, (4, 2)), name="mixed", out=tmp_path)
    assert [layer.kind for layer in bundle.manifest.layers] == ["GRU", "RNN"]
    tokens = torch.randint(0, 11, (19,))
    with torch.no_grad():
        wanted = [model(tokens[:end, None]) for end in (6, 7, 19)]
    with serving(tmp_path) as server, cc.connect(server.address) as client, client.session("mixed") as session:
        answers = [session.send(part) for part in cut(tokens.numpy(), 6, 1, 12)]
    logits = np.concatenate([answer["logits"] for answer in answers])
    np.testing.assert_allclose(logits, wanted[-1]["logits"][:, 0], rtol=0, atol=1e-5)
    for answer, each in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(answer["score"], each["score"][0], rtol=0, atol=1e-5)


class Continued(nn.Module):
    """A state and `[batch, time, 5]` → `[batch, time, 3]` and the state after it; a learned first state beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.GRUCell(5, 6)
        self.start = nn.Parameter(torch.randn(6))
        self.cell = nn.LSTMCell(6, 7)
        self.linear = nn.Linear(7, 3)

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor, below: Tensor) -> tuple[Tensor, object, Tensor]:
        answers = []
        for frame in x.unbind(1):
            below = self.below(frame, below)
            state = self.cell(below, state)
            answers.append(self.linear(state[0]))
        return torch.stack(answers, 1), state, below


class Learned(Continued):
    """The same from a learned state."""

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, object, Tensor]:  # type: ignore[override]
        return super().forward(state, x, self.start.expand(len(x), -1))


@pytest.mark.system("4", "cells whose state is passed in and returned, and cells that start from a learned state")
def test_cells_with_states_of_their_own(tmp_path: Path) -> None:
    """A state that the loop is passed is the session's; a learned one is where a session starts."""
    model = make(Learned)
    example = (torch.randn(2, 7), torch.randn(2, 7)), torch.randn(2, 4, 5)
    bundle = cx.export(model.eval(), example, name="continued", out=tmp_path, output_names=["y", "below"])
    assert [port.name for port in bundle.manifest.inputs] == ["x"]
    x = torch.randn(20, 5)
    state, below, wanted = (torch.zeros(1, 7), torch.zeros(1, 7)), model.start[None], []
    with torch.no_grad():
        for part in x.split(6):
            y, state, below = Continued.forward(model, state, part[None], below)
            wanted.append(y[0])
    with serving(tmp_path) as server, cc.connect(server.address) as client, client.session("continued") as session:
        answers = [session.send(part) for part in cut(x.numpy(), 3, 1, 16)]
    np.testing.assert_allclose(np.concatenate([a["y"] for a in answers]), torch.cat(wanted), rtol=0, atol=1e-5)
    np.testing.assert_allclose(answers[-1]["below"], below[0], rtol=0, atol=1e-5)


class Looped(nn.Module):
    """One cell, its answers stacked."""

    def __init__(self, cell: nn.Module, *, batch_first: bool, start: str) -> None:
        super().__init__()
        self.cell = cell
        self.batch_first, self.start = batch_first, start

    def forward(self, x: Tensor) -> Tensor:
        frames: Sequence[Tensor] = x.unbind(1) if self.batch_first else x
        zeros = {"none": None, "new": frames[0].new_zeros(frames[0].size(0), 7)}[self.start]
        state = (zeros, zeros) if zeros is not None and isinstance(self.cell, nn.LSTMCell) else zeros
        answers = []
        for frame in frames:
            state = self.cell(frame, state)
            answers.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(answers, dim=1 if self.batch_first else 0)


@pytest.mark.system("4", "LSTMCell, GRUCell and RNNCell, batch first and time first")
@pytest.mark.parametrize(
    ("kind", "layer", "batch_first", "start"),
    [
        (nn.LSTMCell, nn.LSTM, True, "none"),
        (nn.LSTMCell, nn.LSTM, False, "new"),
        (nn.GRUCell, nn.GRU, False, "none"),
        (nn.RNNCell, nn.RNN, True, "new"),
    ],
)
def test_each_cell_is_its_layer(
    tmp_path: Path, kind: Callable[..., nn.Module], layer: Callable[..., nn.Module], batch_first: bool, start: str
) -> None:
    """A session starts from any state and is answered as the layer with the cell's weights answers from it."""
    model = Looped(kind(5, 7), batch_first=batch_first, start=start).eval()
    cx.export(model.eval(), torch.randn(2, 3, 5), name="cell", out=tmp_path)
    same = layer(5, 7)
    same.load_state_dict({f"{name}_l0": weight for name, weight in model.cell.state_dict().items()})
    x = torch.randn(20, 5)
    states = [torch.rand(1, 7) * 2 - 1 for _ in ("hc" if layer is nn.LSTM else "h")]
    with torch.no_grad():
        wanted, _ = same(x, tuple(states) if len(states) == 2 else states[0])
    initial = {f"cell.{letter}_0": state.numpy() for letter, state in zip("hc", states, strict=False)}
    with (
        serving(tmp_path) as server,
        cc.connect(server.address) as client,
        client.session("cell", initial_state=initial) as session,
    ):
        answers = list(session.stream(cut(x.numpy(), 3, 1, 16)))
    np.testing.assert_allclose(np.concatenate(answers), wanted, rtol=0, atol=1e-5)


class FrameByFrame(nn.Module):
    """Time-major `[time, batch, 5]` → `[time, batch, 3]`: a two-layer GRU and an LSTM, called frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, num_layers=2)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, state, answers = None, None, []
        for t in range(x.shape[0]):
            y, h = self.gru(x[t : t + 1], h)
            y, state = self.lstm(y.transpose(0, 1), state)
            answers.append(self.linear(y[:, 0]))
        return torch.stack(answers)


@pytest.mark.system("4", "nn.LSTM and nn.GRU called on one frame at a time")
def test_layers_called_frame_by_frame(tmp_path: Path) -> None:
    """Whole layers in a loop over time are exported as the layers over time that they are, and streamed."""
    model = make(FrameByFrame)
    bundle = cx.export(model, torch.randn(5, 2, 5), name="framed", out=tmp_path)
    assert [layer.name for layer in bundle.manifest.layers] == ["gru.0", "gru.1", "lstm.0"]
    assert bundle.manifest.ragged
    assert bundle.manifest.trainable_parameters == sum(p.numel() for p in model.parameters())
    x = torch.randn(23, 5)
    with torch.no_grad():
        wanted = model(x[:, None])[:, 0]
    with serving(tmp_path) as server, cc.connect(server.address) as client, client.session("framed") as session:
        answers = list(session.stream(cut(x.numpy(), 1, 9, 13)))
    np.testing.assert_allclose(np.concatenate(answers), wanted, rtol=0, atol=1e-5)
