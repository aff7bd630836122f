"""Loops over cells become layers over whole sequences; loops that are something else do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from carousel_export.eager import Eager
from carousel_export.errors import ModelError
from carousel_export.loops.reroll import Rerolled, reroll

torch.set_num_threads(1)
X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
Forward = Callable[..., object]


class Looped(nn.Module):
    """One cell, or two, beside a linear layer, looped over by a function given to it; inputs `[batch, time, 4]`."""

    def __init__(self, loop: Forward, kind: type[nn.Module] = nn.GRUCell, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.cell = kind(4, 5)
        self.other = kind(*(sizes or (4, 5)))
        self.fc = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.start = nn.Parameter(torch.randn(5))
        self.loop = loop

    def forward(self, x: Tensor) -> object:
        return self.loop(self, x)


def roll(model: nn.Module, *example: Tensor) -> Rerolled:
    return reroll(Eager(model.eval()), example or (X,))


def agree(model: nn.Module, rolled: Rerolled, shape: tuple[int, ...]) -> None:
    """Both answer alike, output for output."""
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(rolled.module(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def by_index(m: Looped, x: Tensor) -> Tensor:
    h, answers = torch.zeros(x.size(0), 5), []
    for t in range(x.size(1)):
        h = m.cell(x[:, t, :], h)
        answers.append(h)
    return torch.stack(answers, dim=1)


def by_unbind(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for frame in x.unbind(1):
        h = m.cell(frame, h)
        answers += [m.fc(m.drop(h)).unsqueeze(1)]
    return torch.cat(answers, dim=1)


def by_iteration(m: Looped, x: Tensor) -> Tensor:
    h, answers = x.new_zeros(len(x), 5), ()
    for frame in x.transpose(0, 1):
        answers = (*answers, h := m.cell(frame, h))
    return torch.stack(answers).permute(1, 0, 2)


def by_splits(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for frame in x.chunk(x.shape[1], dim=1):
        h = m.cell(frame.squeeze(1), h)
        answers.append(h)
    return torch.cat(answers, 1).view(x.shape[0], x.shape[1], 5)


def into_a_tensor(m: Looped, x: Tensor) -> Tensor:
    answers = torch.zeros(x.shape[0], x.shape[1], 4)
    h = None
    for t in range(x.shape[1]):
        h = m.cell(x[..., t, :], h)
        answers[:, t] = m.fc(h).relu()
    return answers


def with_normalised_answers(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t] * 2 + x[:, t, :1], h)
        answers.append(torch.cat([m.norm(h), x[:, t]], dim=1).softmax(dim=1))
    return torch.stack(answers, 1)


def with_a_vector_for_all_frames(m: Looped, x: Tensor) -> Tensor:
    h, answers, shared = None, [], m.fc(m.start).tanh().expand(x.shape[0], -1)
    for frame in x.unbind(1):
        h = m.cell(frame + shared, h)
        answers.append(m.fc(m.norm(h)) * shared + torch.cat([shared, frame], 1)[:, 2:6])
    return torch.stack(answers, 1)


def backwards(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for t in reversed(range(x.shape[1])):
        h = m.cell(x[:, t], h)
        answers.append(h)
    return torch.stack(answers[::-1], 1)


def backwards_by_flip(m: Looped, x: Tensor) -> Tensor:
    return by_index(m, x.flip(1)).flip([1])


def backwards_by_gather(m: Looped, x: Tensor) -> Tensor:
    order = torch.arange(x.shape[1] - 1, -1, -1)
    return by_index(m, x[:, order]).index_select(1, order)


def chunked_gates_state(m: Looped, x: Tensor) -> Tensor:
    """Two cells' states in one tensor."""
    states, answers = torch.zeros(2, x.shape[0], 5), []
    for frame in x.unbind(1):
        first = m.cell(frame, states[0])
        second = m.other(m.fc(first), states[1])
        states = torch.stack([first, second])
        answers.append(states[1])
    return torch.stack(answers, 1)


def with_last_and_first(m: Looped, x: Tensor) -> dict[str, Tensor]:
    y = by_index(m, x)
    h = None
    for frame in x.unbind(1):
        h = m.other(frame, h)
        m.fc(h)
    return {"frames": y, "last": m.fc(h), "mean": y.mean(1)}


def by_kept_splits(m: Looped, x: Tensor) -> Tensor:
    """As torch's own example of sequences does it: frames of one feature, cut out with their axis."""
    h, answers = None, []
    for frame in x[:, :, 0].split(1, dim=1):
        h = m.cell(frame.expand(-1, 4) * m.start[:4], h)
        answers += [m.fc(h)[:, :1]]
    return torch.cat(answers, dim=1)


def writing_into_tensors(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for frame in x.unbind(1):
        h = m.cell(frame, h)
        answers.append(nn.functional.relu(h + 0.1, inplace=True))
    y = torch.stack(answers, 1)
    y += m.start
    return y.mul_(2)


def residual_stack(m: Looped, x: Tensor) -> tuple[Tensor, Tensor]:
    states: list[Tensor | None] = [None, None]
    answers = torch.empty_like(x)
    for t in range(x.size(1)):
        y = x[:, t]
        for i, cell in enumerate((m.cell, m.other)):
            states[i] = cell(y, states[i])
            y = y + m.fc(states[i])
        answers[:, t, :] = y
    return answers, torch.stack([state for state in states if state is not None])


def from_a_learned_state(m: Looped, x: Tensor) -> Tensor:
    h, answers = m.start.expand(len(x), -1), []
    for frame in x.unbind(1):
        h = m.cell(frame, h)
        answers.append(h)
    return torch.stack(answers, 1)


FORWARD = [
    by_kept_splits,
    writing_into_tensors,
    residual_stack,
    from_a_learned_state,
    by_index,
    by_unbind,
    by_iteration,
    by_splits,
    into_a_tensor,
    with_normalised_answers,
    with_a_vector_for_all_frames,
    chunked_gates_state,
    with_last_and_first,
]


@pytest.mark.parametrize("loop", FORWARD, ids=lambda loop: loop.__name__)
def test_spellings_of_a_loop(loop: Forward) -> None:
    """However a loop takes its frames and keeps its answers, the layer answers as the loop does, at any size."""
    model = Looped(loop)
    rolled = roll(model)
    assert not any(each.reverse for each in rolled.loops)
    assert isinstance(rolled.module.get_submodule("cell"), nn.GRU)
    for shape in ((2, 6, 4), (1, 1, 4), (3, 2, 4), (4, 29, 4)):
        agree(model, rolled, shape)


@pytest.mark.parametrize("loop", [backwards, backwards_by_flip, backwards_by_gather], ids=lambda loop: loop.__name__)
def test_spellings_of_a_backward_loop(loop: Forward) -> None:
    """A loop from the last frame to the first is a backward layer, and no flip is left beside it."""
    model = Looped(loop)
    rolled = roll(model)
    assert [each.reverse for each in rolled.loops] == [True]
    names = [getattr(step.target, "__name__", step.target) for step in rolled.module._program.steps]
    assert set(names) <= {"movedim", "cell"}
    for shape in ((2, 6, 4), (1, 1, 4), (4, 29, 4)):
        agree(model, rolled, shape)


@pytest.mark.parametrize("options", [{}, {"bias": False}])
@pytest.mark.parametrize(
    "kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]
)
def test_every_cell(kind: Callable[..., nn.Module], options: dict[str, bool]) -> None:
    """Each kind of cell is the layer of its kind, with or without biases."""

    def loop(m: Looped, x: Tensor) -> tuple[Tensor, ...]:
        state, answers = None, []
        for frame in x.unbind(1):
            state = m.cell(frame, state)
            answers.append(state[0] if isinstance(state, tuple) else state)
        return (torch.stack(answers, 1), *(state if isinstance(state, tuple) else (state,)))

    model = Looped(loop, lambda *sizes: kind(*sizes, **options))
    rolled = roll(model)
    for shape in ((2, 6, 4), (3, 17, 4)):
        agree(model, rolled, shape)


class Both(nn.Module):
    """Two LSTM cells over time-major frames, forward and backward."""

    def __init__(self, *, size: int = 5, swapped: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.swapped = swapped
        self.ahead = nn.LSTMCell(4, 5)
        self.back = self.ahead if tied else nn.LSTMCell(4, size)

    def run(self, cell: nn.LSTMCell, frames: list[Tensor]) -> list[Tensor]:
        h = c = frames[0].new_zeros(frames[0].shape[0], cell.hidden_size)
        answers = []
        for frame in frames:
            h, c = cell(frame, (h, c))
            answers.append(h)
        return answers

    def forward(self, x: Tensor) -> Tensor:
        frames = list(x)
        pair = torch.stack(self.run(self.ahead, frames)), torch.stack(self.run(self.back, frames[::-1])[::-1])
        return torch.cat(pair[::-1] if self.swapped else pair, dim=-1)


def layers(rolled: Rerolled) -> dict[str, tuple[type[nn.Module], bool]]:
    found = {path: m for path, m in rolled.module.named_modules() if isinstance(m, nn.RNNBase)}
    return {path: (type(m), m.bidirectional) for path, m in found.items()}


def test_two_directions_are_one_layer() -> None:
    """A forward and a backward cell over the same frames, concatenated in that order, are one bidirectional layer."""
    model = Both()
    rolled = roll(model, torch.randn(6, 2, 4))
    assert layers(rolled) == {"ahead": (nn.LSTM, True)}
    assert [(loop.cell, loop.call, loop.row) for loop in rolled.loops] == [("ahead", "ahead", 0), ("back", "ahead", 1)]
    assert sum(p.numel() for p in rolled.module.parameters()) == sum(p.numel() for p in model.parameters())
    agree(model, rolled, (9, 3, 4))


@pytest.mark.parametrize("options", [{"size": 7}, {"swapped": True}])
def test_two_directions_that_are_no_one_layer(options: dict[str, int | bool]) -> None:
    """Directions of different size, or concatenated backward first, stay two layers of one direction each."""
    model = Both(**options)
    rolled = roll(model, torch.randn(6, 2, 4))
    assert [kind.__name__ for kind, _ in layers(rolled).values()] == ["LSTM", "BackwardLSTM"]
    agree(model, rolled, (9, 3, 4))


def test_one_cell_in_both_directions() -> None:
    """A cell that runs over the frames both ways is a bidirectional layer whose directions share their weights."""
    model = Both(tied=True)
    rolled = roll(model, torch.randn(6, 2, 4))
    assert layers(rolled) == {"ahead": (nn.LSTM, True)}
    assert next((loop.cell, loop.start, loop.row) for loop in rolled.loops) == ("ahead", 0, 0)
    agree(model, rolled, (9, 3, 4))


class Continued(nn.Module):
    """A loop that goes on from the state that it is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        answers = []
        for frame in x.unbind(1):
            state = self.cell(frame, state)
            answers.append(state[0])
        return torch.stack(answers, 1), state


def test_a_state_that_is_passed_in() -> None:
    """A state among the model's arguments is the layer's first, and the last one is returned."""
    model = Continued()
    rolled = reroll(Eager(model.eval()), (X, (torch.randn(2, 5), torch.randn(2, 5))))
    given = torch.randn(3, 9, 4), (torch.randn(3, 5), torch.randn(3, 5))
    with torch.no_grad():
        torch.testing.assert_close(rolled.module(*given), model(*given), rtol=1e-5, atol=1e-6)


def test_two_loops_of_one_cell() -> None:
    """A cell that loops twice is a layer that is called twice, with a state of its own in each call."""

    def twice(m: Looped, x: Tensor) -> Tensor:
        return by_index(m, m.fc(by_index(m, x)))

    model = Looped(twice)
    rolled = roll(model)
    assert [loop.call for loop in rolled.loops] == ["cell", "cell.call1"]
    agree(model, rolled, (2, 11, 4))


def every_second(m: Looped, x: Tensor) -> Tensor:
    return by_index(m, x[:, ::2])


def written_in_the_code(m: Looped, x: Tensor) -> Tensor:
    return by_index(m, x[:, :3])


def reset_in_the_loop(m: Looped, x: Tensor) -> Tensor:
    return torch.stack([m.cell(frame, torch.zeros(len(x), 5)) for frame in x.unbind(1)], 1)


def faded_state(m: Looped, x: Tensor) -> Tensor:
    h, answers = torch.zeros(len(x), 5), []
    for frame in x.unbind(1):
        h = m.cell(frame, h) * 0.9
        answers.append(h)
    return torch.stack(answers, 1)


def fed_back(m: Looped, x: Tensor) -> Tensor:
    h, frame, answers = None, x[:, 0], []
    for _ in range(x.shape[1]):
        h = m.cell(frame, h)
        frame = m.fc(h)
        answers.append(frame)
    return torch.stack(answers, 1)


def fed_back_by_the_other(m: Looped, x: Tensor) -> Tensor:
    a = b = torch.zeros(len(x), 5)
    answers = []
    for frame in x.unbind(1):
        a = m.cell(frame + m.fc(b), a)
        b = m.other(m.fc(a), b)
        answers.append(b)
    return torch.stack(answers, 1)


def weighted_by_place(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t] * (t + 1), h)
        answers.append(h)
    return torch.stack(answers, 1)


def special_first_frame(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t].tanh() if t == 0 else x[:, t], h)
        answers.append(h)
    return torch.stack(answers, 1)


def next_frame(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for t in range(x.shape[1]):
        h = m.cell(x[:, (t + 1) % x.shape[1]], h)
        answers.append(h)
    return torch.stack(answers, 1)


def without_the_first(m: Looped, x: Tensor) -> Tensor:
    return torch.stack(list(by_index(m, x).unbind(1))[1:], 1)


def summed_up(m: Looped, x: Tensor) -> Tensor:
    h, total = None, torch.zeros(len(x), 5)
    for frame in x.unbind(1):
        h = m.cell(frame, h)
        total = total + h
    return total


def stopped_early(m: Looped, x: Tensor) -> Tensor:
    h, answers = None, []
    for frame in x.unbind(1):
        if answers and answers[-1].abs().max() > 0.9:
            answers.append(answers[-1])
            continue
        h = m.cell(frame, h)
        answers.append(h)
    return torch.stack(answers, 1)


REFUSED = {
    every_second: "over another number of frames",
    written_in_the_code: "number that is written in the code",
    reset_in_the_loop: "start it before the loop",
    faded_state: "hand it on unchanged",
    fed_back: "its answer to the frame before",
    fed_back_by_the_other: "its answer to the frame before",
    weighted_by_place: "not the same in each frame",
    special_first_frame: "not the same in each frame",
    next_frame: "the same in each frame",
    without_the_first: "stack the answers in the order of time",
    stopped_early: "reads a number out of a tensor",
    summed_up: "do the same in each frame",
}


@pytest.mark.parametrize("loop", REFUSED, ids=lambda loop: loop.__name__)
def test_loops_that_are_no_layer(loop: Forward) -> None:
    """A loop that no layer is equal to is refused in one line, which names the cell and the way out."""
    with pytest.raises(ModelError) as refused:
        roll(Looped(loop))
    line = str(refused.value)
    assert line.startswith(("cell", "other", "the loop over cell")) or "model with cells" in line
    assert REFUSED[loop] in line
    assert "\n" not in line


def test_cell_states_swapped() -> None:
    """h and c that change places between frames are not taken for an LSTM."""

    def loop(m: Looped, x: Tensor) -> Tensor:
        state, answers = (torch.zeros(len(x), 5),) * 2, []
        for frame in x.unbind(1):
            h, c = m.cell(frame, state)
            state = (c, h)
            answers.append(h)
        return torch.stack(answers, 1)

    with pytest.raises(ModelError, match="as it was returned"):
        roll(Looped(loop, nn.LSTMCell))


def test_cell_state_of_every_frame() -> None:
    """An answer made of c in every frame, which a layer does not give, is refused."""

    def loop(m: Looped, x: Tensor) -> Tensor:
        state, answers = None, []
        for frame in x.unbind(1):
            state = m.cell(frame, state)
            answers.append(state[1])
        return torch.stack(answers, 1)

    with pytest.raises(ModelError, match="cell state c of cell"):
        roll(Looped(loop, nn.LSTMCell))
