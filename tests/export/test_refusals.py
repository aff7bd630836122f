"""What cannot be exported is refused: one line that names the thing and the way out, and nothing on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import carousel_export as cx

X = torch.randn(2, 6, 5)


class Around(nn.Module):
    """A model with one module, called by a function given to it."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], object] = lambda m, x: m(x)[0]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(self.inner, x)


def lstm(**options: int | bool) -> nn.LSTM:
    return nn.LSTM(5, 4, batch_first=True, **options)


class InAList(nn.Module):
    """Layers that PyTorch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [lstm()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)[0]


class OwnLSTM(nn.LSTM):
    """A subclass."""


class OwnCell(nn.GRUCell):
    """A subclass."""


def with_nan() -> nn.Module:
    inner = lstm()
    with torch.no_grad():
        inner.weight_hh_l0[3, 1] = float("nan")
    return inner


def frame_by_frame(inner: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([inner(x[:, t : t + 1])[0] for t in range(x.shape[1])], dim=1)


def fading(inner: nn.Module, x: Tensor) -> Tensor:
    h, answers = None, []
    for frame in x.unbind(1):
        h = inner(frame, h) / 2
        answers.append(h)
    return torch.stack(answers, 1)


def in_pairs(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.unflatten(1, (x.shape[1] // 2, 2)).mean(2))[0]


def packed(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True))[0].data


def padded_to_fifty(inner: nn.Module, x: Tensor) -> Tensor:
    y = inner(pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True))[0]
    return pad_packed_sequence(y, batch_first=True, total_length=50)[0]


def over_features(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1))[0].reshape(*x.shape[:2], -1)


class CellBehindStride(nn.Module):
    """A loop over a cell on every second frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, answers = None, []
        for frame in x[:, ::2].unbind(1):
            h = self.cell(frame, h)
            answers.append(h)
        return torch.stack(answers, 1)


REFUSED = {
    "cell behind a stride": (CellBehindStride(), X, cx.ModelError, ["cell (GRUCell)", "stride in time", "nn.LSTM"]),
    "cell": (nn.LSTMCell(5, 4), X[:, 0], cx.ModelError, ["the model itself (LSTMCell)", "loops over the frames"]),
    "cell with a state that fades": (Around(nn.GRUCell(5, 4), fading), X, cx.ModelError, ["inner", "unchanged"]),
    "own cell": (Around(OwnCell(5, 4), fading), X, cx.ModelError, ["inner (OwnCell)", "subclass"]),
    "subclass": (Around(OwnLSTM(5, 4)), X, cx.ModelError, ["inner (OwnLSTM)", "plain one of nn.LSTM"]),
    "nothing recurrent": (nn.Linear(5, 4), X, cx.ModelError, ["Linear has no recurrent layer"]),
    "in a plain list": (InAList(), X, cx.ModelError, ["layers", "plain list", "nn.ModuleList"]),
    "squeezed": (Around(lstm(), lambda m, x: m(x)[0].sum(-1).squeeze()), X, cx.ExampleError, ["'output'", "squeeze"]),
    "never called": (Around(lstm(), lambda _, x: x), X, cx.ModelError, ["inner", "did not call"]),
    "not a module": ("model.pt", X, cx.ModelError, ["str", "torch.nn.Module"]),
    "float64": (Around(lstm()).double(), X.double(), cx.ModelError, ["inner.weight_ih_l0", "model.float()"]),
    "NaN weight": (Around(with_nan()), X, cx.ModelError, ["inner.weight_hh_l0", "not finite"]),
    "packed": (Around(lstm(), packed), X, cx.ModelError, ["inner", "packed", "pad_packed_sequence"]),
    "padded, not packed": (
        Around(lstm(), lambda m, x: pad_packed_sequence(m(x)[0], batch_first=True)[0]),
        X,
        cx.ModelError,
        ["pad_packed_sequence", "pack it first"],
    ),
    "padded to a size of its own": (
        Around(lstm(), padded_to_fifty),
        X,
        cx.ModelError,
        ["total_length=50", "6 frames"],
    ),
    "a tuple that is no state": (
        Around(lstm(), lambda m, x: m(x[0] + x[1])[0]),
        ((X, X),),
        cx.ExampleError,
        ["'x'", "tuple", "no state"],
    ),
    "started anew in a loop": (
        Around(lstm(), frame_by_frame),
        X,
        cx.ModelError,
        ["inner.0", "does not go", "start it"],
    ),
    "both ways in a loop": (
        Around(lstm(bidirectional=True), frame_by_frame),
        X,
        cx.ModelError,
        ["inner", "frame by frame", "two directions", "whole sequence"],
    ),
    "over another axis": (Around(lstm(), over_features), X, cx.ExampleError, ["inner", "time"]),
    "batch of its own": (
        Around(lstm(), lambda m, x: m(x[None])[0][0]),
        X[0],
        cx.ModelError,
        ["one sequence at a time"],
    ),
    "float64 example": (Around(lstm()), X.double(), cx.ExampleError, ["'x'", ".float()"]),
    "NaN example": (Around(lstm()), X / 0, cx.ExampleError, ["'x'", "not finite"]),
    "wrong features": (Around(lstm()), torch.randn(2, 6, 4), cx.ExampleError, ["[2, 6, 4]"]),
    "an array": (Around(lstm()), (X.numpy(),), cx.ExampleError, ["ndarray", "a tensor"]),
    "returns a number": (Around(lstm(), lambda m, x: (m(x)[0], 3)), X, cx.ModelError, ["[1]", "int"]),
    "time in two axes": (Around(lstm(), lambda m, x: m(x)[0] @ m(x)[0].mT), X, cx.ExampleError, ["output", "2 axes"]),
    "more frames": (
        Around(lstm(), lambda m, x: m(x)[0].repeat_interleave(2, 1)),
        X,
        cx.ExampleError,
        ["'output'", "12 entries for 6 frames"],
    ),
    "pairs of frames": (Around(lstm(), in_pairs), X, cx.ExampleError, ["[2, 7, 5]", "any number of frames"]),
    "a size made a tensor": (
        Around(lstm(), lambda m, x: m(x)[0].index_select(1, torch.tensor([x.size(1) - 1]))[:, 0]),
        X,
        cx.GraphError,
        ["TorchScript", "sizes"],
    ),
    "branch on values": (Around(lstm(), lambda m, x: m(x if x.sum() > 0 else -x)[0]), X, cx.GraphError, ["branches"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path: Path, case: str) -> None:
    """The line names the module or tensor and what to do, and no bundle and no folder is left."""
    model, example, kind, words = REFUSED[case]
    with pytest.raises(kind) as refused:
        cx.export(model.eval() if isinstance(model, nn.Module) else model, example, name="model", out=tmp_path)
    line = str(refused.value)
    assert "\n" not in line
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bidirectional", "policy", "words"),
    [(True, cx.Causal(), ["causal", "backwards"]), (False, cx.Lookahead(4, 4), ["lookahead", "no direction"])],
)
def test_policies_that_do_not_fit(tmp_path: Path, bidirectional: bool, policy: cx.Policy, words: list[str]) -> None:
    """A policy that the model's directions rule out is refused, with those that fit."""
    with pytest.raises(cx.PolicyError) as refused:
        cx.export(Around(lstm(bidirectional=bidirectional)).eval(), X, name="model", out=tmp_path, policy=policy)
    for word in [*words, "carry", "full"]:
        assert word in str(refused.value)


@pytest.mark.parametrize("make", [lambda: cx.Lookahead(0, 1), lambda: cx.Lookahead(1, -1), lambda: cx.Carry(0)])
def test_impossible_policies(make: Callable[[], cx.Policy]) -> None:
    """A policy without a frame in its block is refused where it is made."""
    with pytest.raises(cx.PolicyError, match=r"at least 1|≥ 1"):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_names": ["a", "b"]}, ["2 input names"]),
        ({"output_names": ["a", "b"]}, ["2 output names"]),
        ({"input_names": ["y"], "output_names": ["y"]}, ["'y'", "two tensors"]),
        ({"dims": {"z": ("batch", "time", "5")}}, ["z", "x"]),
        ({"dims": {"x": ("batch", "time", "6")}}, ["batch,time,6"]),
        ({"dims": {"x": ("time", "batch", "5")}}, ["correct them"]),
        ({"labels": ["a", "b"]}, ["2 labels", "output"]),
        ({"labels": {"logits": ["a", "b"]}}, ["logits"]),
        ({"data": [torch.randn(4, 3)]}, ["data[0]", "'x'"]),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, object], words: list[str]) -> None:
    """A name, axis, label or sample that does not fit the model is refused by its name."""
    with pytest.raises(cx.ExportError) as refused:
        cx.export(Around(lstm()).eval(), X, name="model", out=tmp_path, **options)
    for word in words:
        assert word in str(refused.value)


def test_data_shorter_than_the_model_takes(tmp_path: Path) -> None:
    """A sequence of the caller's that the model is not defined for is refused with what needs more frames."""
    model = Around(lstm(), lambda m, x: m(x)[0].std(1)).eval()
    with pytest.raises(cx.ExampleError, match=r"1 frames, and the code of Around\.forward needs at least 2"):
        cx.export(model, X, name="model", out=tmp_path, data=[torch.randn(1, 5)])
