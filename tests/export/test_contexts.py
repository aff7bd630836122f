"""Inputs without time are found by experiment, and so are those of their axes in which sessions may differ."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import carousel_export as cx
from carousel_export.axes import find_signature
from carousel_export.eager import Eager
from carousel_export.export import parity

torch.set_num_threads(1)


class Attends(nn.Module):
    """Frames `[batch, time, 3]`, a time-major memory `[source, batch, 4]`, its lengths `[batch]` and weights for it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, sizes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.rnn(x)
        memory = memory.transpose(0, 1)
        scores = y @ memory.mT + prior[:, None]
        valid = torch.arange(memory.shape[1])[None] < sizes[:, None]
        weights = scores.masked_fill(~valid[:, None], -1e9).softmax(-1)
        return y + weights @ memory, weights


def example(batch: int, time: int, source: int) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, time, 3),
        torch.randn(source, batch, 4),
        torch.full((batch,), source),
        torch.randn(batch, source),
    )


@pytest.mark.parametrize("sizes", [(3, 6, 5), (2, 5, 5), (3, 3, 3), (1, 4, 2), (2, 1, 3)])
def test_contexts_are_found(sizes: tuple[int, int, int]) -> None:
    """Whatever the example's sizes, the axes are the same: contexts that go together share the name of their axis."""
    signature = find_signature(Eager(Attends().eval()), example(*sizes))
    assert [port.name for port in signature.inputs] == ["x"]
    dims = {port.name: port.eager_dims for port in signature.contexts}
    assert dims == {"memory": ("source", "batch", "4"), "sizes": ("batch",), "prior": ("batch", "source")}
    assert signature.contexts[0].dims == ("batch", "source", "4")
    assert signature.outputs[1].dims == ("batch", "time", "source")
    assert signature.arguments == ("x", "memory", "sizes", "prior")


def test_named_axes_are_believed() -> None:
    """Names that the caller gives are those of the signature, and sizes that it gives stay fixed."""
    named = {
        "x": ("batch", "time", "3"),
        "memory": ("words", "batch", "4"),
        "sizes": ("batch",),
        "prior": ("batch", "words"),
    }
    signature = find_signature(Eager(Attends().eval()), example(3, 6, 5), dims=named)
    assert {port.name: port.eager_dims for port in (*signature.inputs, *signature.contexts)} == named
    fixed = {name: tuple("5" if dim == "words" else dim for dim in dims) for name, dims in named.items()}
    signature = find_signature(Eager(Attends().eval()), example(3, 6, 5), dims=fixed)
    assert not signature.sources


def test_given_data_have_their_contexts(tmp_path: Path) -> None:
    """Sequences of the caller's own bring their contexts, each of its own size, and a misfit is refused by name."""
    data = [tuple(x[0] if i != 1 else x[:, 0] for i, x in enumerate(example(1, 9, size))) for size in (2, 6)]
    made = cx.export(Attends().eval(), example(3, 6, 5), name="net", out=tmp_path, data=data)
    assert '"given data' in made.file("parity.json").read_text()
    with pytest.raises(cx.ExampleError, match=r"data\[0\] gives 'memory'.*\[source, 4\]"):
        cx.export(Attends().eval(), example(3, 6, 5), name="net", out=tmp_path, data=[(data[0][0], *[data[0][0]] * 3)])


def test_golden_contexts_differ_in_size(tmp_path: Path) -> None:
    """The golden sequences of every case have contexts of several sizes, one among them, or little would be shown."""
    made = cx.export(Attends().eval(), example(3, 6, 5), name="net", out=tmp_path)
    with safe_open(made.file("golden.safetensors"), framework="pt") as golden:
        for case in json.loads(golden.metadata()["cases"]):
            prefixes = [f"{case['name']}/{i}/context/" for i in range(case["sequences"])]
            sizes = [len(golden.get_tensor(f"{prefix}memory")) for prefix in prefixes]
            assert sizes == [len(golden.get_tensor(f"{prefix}prior")) for prefix in prefixes]
            assert 1 in sizes
            assert len(set(sizes)) >= 3


class Alone(nn.Module):
    """One sequence `[time, 3]` at a time, and a speaker `[4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(7, 4)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        return self.rnn(torch.cat([x, speaker.expand(x.shape[0], -1)], dim=-1))[0]


class Global(Alone):
    """A batch of sequences `[time, batch, 3]`, and one speaker `[4]` for all."""

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        return self.rnn(torch.cat([x, speaker.expand(*x.shape[:2], -1)], dim=-1))[0]


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (Alone(), torch.randn(6, 3), "'x' has no batch"),
        (Global(), torch.randn(6, 2, 3), "'speaker' has neither time nor batch"),
    ],
)
def test_a_context_without_batch_is_refused(model: nn.Module, x: Tensor, words: str) -> None:
    """A context that is not each row's own is refused, by the input that has no batch."""
    with pytest.raises(cx.ExampleError, match=words):
        find_signature(Eager(model.eval()), (x, torch.randn(4)))


class Stepwise(nn.Module):
    """One token `[batch, 1]`, whose attention asks with the state before it (Bahdanau et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3 + 4, 4, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        weights = (hidden.transpose(0, 1) @ memory.mT).softmax(-1)
        return self.rnn(torch.cat([x, weights @ memory], dim=-1), hidden)


class Forgetful(Stepwise):
    """Keeps its new state to itself."""

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, hidden, memory)[0]


class Mixed(Stepwise):
    """Has a second layer, which starts each frame anew."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        y, hidden = super().forward(x, hidden, memory)
        return self.second(y)[0], hidden


class Bare(Stepwise):
    """Returns a frame without an axis for it."""

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        y, hidden = super().forward(x, hidden, memory)
        return y[:, 0], hidden


class Fed(nn.Module):
    """Adds the state that it starts from to each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x + hidden.transpose(0, 1), hidden)


@pytest.mark.parametrize(
    ("model", "shapes", "words"),
    [
        (Forgetful(), [(3, 1, 3), (1, 3, 4), (3, 5, 4)], "Forgetful .* the state of rnn; return every state"),
        (Mixed(), [(3, 1, 3), (1, 3, 4), (3, 5, 4)], "Mixed .* second starts each from its own state"),
        (Bare(), [(3, 1, 3), (1, 3, 4), (3, 5, 4)], r"output 'output' \[batch, 4\] has no axis of the one frame"),
        (Fed(), [(3, 5, 4), (1, 3, 4)], "Fed uses the state of rnn outside of it, .* an example of one frame"),
    ],
)
def test_a_step_that_is_none(tmp_path: Path, model: nn.Module, shapes: list[tuple[int, ...]], words: str) -> None:
    """A model of one frame a call whose state a session could not carry is refused, and said how to mend it."""
    with pytest.raises(cx.ExportError, match=words):
        cx.export(model.eval(), tuple(map(torch.randn, shapes)), name="net", out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "shapes"), [(Stepwise(), [(3, 1, 3), (1, 3, 4), (3, 5, 4)]), (Fed(), [(3, 1, 4), (1, 3, 4)])]
)
def test_a_step_is_proved_again(tmp_path: Path, model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    """A model that uses its state outside the layer is exported from one frame, and other weights are found out."""
    bundle = cx.export(model.eval(), tuple(map(torch.randn, shapes)), name="net", out=tmp_path)
    assert bundle.manifest.stepwise
    assert any("one frame a call" in note for note in bundle.manifest.notes)
    assert parity(bundle, model)["share"] <= 1
    with pytest.raises(cx.ParityError):
        parity(bundle, type(model)().eval())
