"""What mixes time is found by running the model, and named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn

import carousel_export as cx
from carousel_export.axes import find_signature
from carousel_export.draw import Draw, example_samples
from carousel_export.eager import Eager
from carousel_export.experiments import Findings, find_policies
from carousel_export.reference import Reference

torch.set_num_threads(1)
X = torch.randn(3, 6, 5)


class Pool(nn.Module):
    """A module with code of its own around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.score(y).softmax(1)


class Net(nn.Module):
    """Something before an LSTM and something after it."""

    def __init__(
        self, before: nn.Module | Callable[[Tensor], Tensor], after: nn.Module | Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.lstm(self.before(x.mT).mT)[0])


def same(x: Tensor) -> Tensor:
    return x


class Answering(nn.Module):
    """An LSTM of one or two directions, and code for its frames and a linear layer."""

    def __init__(
        self, answer: Callable[[nn.Linear, Tensor], Tensor], *, bidirectional: bool = False, classes: int = 3
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.answer = answer
        self.lstm = nn.LSTM(5, 8, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(16 if bidirectional else 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.fc, self.lstm(x)[0])


def times(y: Tensor) -> Tensor:
    return torch.arange(y.shape[1])[None, :, None]


def find(model: nn.Module) -> Findings:
    eager = Eager(model.eval())
    signature = find_signature(eager, (X,))
    draw = Draw(signature, example_samples(signature, (X,)))
    return find_policies(Reference(eager, signature), draw)


NAMED = {
    "a layer": (Net(nn.GroupNorm(1, 5), same), "before (GroupNorm)"),
    "a pool of no stride": (Net(nn.MaxPool1d(3, 1, 1), same), "before (MaxPool1d)"),
    "a module's code": (Net(same, Pool()), "the code of after (Pool) after after.score (Linear)"),
    "the model's code": (Net(same, lambda y: y.cumsum(1)), "the code of Net.forward after lstm (LSTM)"),
    "code before a layer": (
        Net(lambda x: x - x.mean(2, keepdim=True), same),
        "the code of Net.forward before lstm (LSTM)",
    ),
    "a reversal": (Net(lambda x: x.flip(2), lambda y: y.flip(1)), "the code of Net.forward before lstm (LSTM)"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_mixes_time_is_named(case: str) -> None:
    """A model with code that mixes frames is allowed full alone, and the innermost module at fault is named."""
    model, name = NAMED[case]
    findings = find(model)
    assert findings.policies == (cx.Full,)
    assert findings.reason == f"{name} mixes frames outside the recurrent layers"
    assert findings.reason in findings.notes


LATE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "after 30 frames": lambda fc, y: fc(y) + (times(y) - 30).clamp(min=0) * 0.1,
    "every 24 frames": lambda fc, y: fc(y) + times(y) // 24,
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", LATE)
def test_what_mixes_time_late(case: str, *, bidirectional: bool) -> None:
    """Code that mixes frames in long sequences alone is found too."""
    findings = find(Answering(LATE[case], bidirectional=bidirectional))
    assert findings.policies == (cx.Full,)
    assert findings.reason == (
        "the code of Answering.forward after fc (Linear) mixes frames outside the recurrent layers in long sequences"
    )


MISSED: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], int]] = {
    "the last two frames": (lambda fc, y: fc(y[:, -2:].sum(1)), 3),
    "the last three frames": (lambda fc, y: fc(y[:, -3:].mean(1)), 3),
    "the last four frames": (lambda fc, y: fc(y[:, -4:].amax(1)), 3),
    "the last frame but one": (lambda fc, y: fc(y[:, max(y.shape[1] - 2, 0)]), 3),
    "small values": (lambda fc, y: fc(y + y.mean(1, keepdim=True)) * 2e-4, 3),
    "values beside a large constant": (
        lambda fc, y: fc(y + y.mean(1, keepdim=True)).masked_fill(torch.tensor([False, True, False]), -1e9),
        3,
    ),
    "many classes": (lambda fc, y: fc(y - y.mean(1, keepdim=True)).softmax(-1), 3000),
    "large values": (lambda fc, y: fc(y + 0.01 * y.mean(1, keepdim=True)) * 1e4, 3),
    "very large values": (lambda fc, y: fc(y + 0.01 * y.mean(1, keepdim=True)) * 1e6, 3),
}


@pytest.mark.parametrize("case", MISSED)
def test_what_mixes_few_frames_or_small_values(case: str) -> None:
    """A value for the sequence that needs more than the last frame is found, as is mixing below small values."""
    answer, classes = MISSED[case]
    findings = find(Answering(answer, classes=classes))
    assert findings.policies == (cx.Full,)
    assert findings.reason.endswith("mixes frames outside the recurrent layers")


HONEST: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], int]] = {
    "a value a frame": (lambda fc, y: fc(y), 3),
    "the last frame": (lambda fc, y: fc(y[:, -1]), 3),
    "small values": (lambda fc, y: fc(y) * 2e-4, 3),
    "tiny values": (lambda fc, y: fc(y) * 1e-9, 3),
    "large values": (lambda fc, y: fc(y) * 100, 3),
    "values of 1e4": (lambda fc, y: fc(y) * 1e4, 3),
    "values of 1e6": (lambda fc, y: fc(y) * 1e6, 3),
    "values that cancel out": (lambda fc, y: fc(y * 0.1) - y @ fc.weight.mT * 0.1 - fc.bias, 3),
    "many classes": (lambda fc, y: fc(y).softmax(-1), 3000),
    "a large constant": (lambda fc, y: fc(y).masked_fill(torch.tensor([False, True, False]), -1e9), 3),
    "infinities": (lambda fc, y: fc(y).masked_fill(torch.tensor([False, True, False]), -torch.inf), 3),
}


@pytest.mark.parametrize("case", HONEST)
def test_what_mixes_none_keeps_its_policies(case: str) -> None:
    """The noise of small, large and odd values is not taken for mixing."""
    answer, classes = HONEST[case]
    findings = find(Answering(answer, classes=classes))
    assert findings.policies == (cx.Causal, cx.Carry, cx.Full)
    assert not findings.reason
    assert findings.ragged
    findings = find(Answering(answer, bidirectional=True, classes=classes))
    one = case == "the last frame"
    assert findings.policies == ((cx.Full,) if one else (cx.Carry, cx.Lookahead, cx.Full))
    assert bool(findings.reason) == one


@pytest.mark.parametrize(
    ("convolution", "left", "right"),
    [
        (nn.Conv1d(5, 5, 3, padding=1), 1, 1),
        (nn.Conv1d(5, 5, 5, padding="same"), 2, 2),
        (nn.Conv1d(5, 5, 3, padding=4, dilation=4), 4, 4),
        (nn.Sequential(nn.Conv1d(5, 5, 5, padding=2), nn.ReLU(), nn.Conv1d(5, 5, 3, padding=1)), 2, 3),
        (nn.Sequential(nn.ConstantPad1d((4, 0), 0), nn.Conv1d(5, 5, 5, groups=5)), 4, 0),
        (lambda x: F.conv1d(F.pad(x, (0, 2)), torch.ones(5, 5, 3)), 0, 2),
    ],
)
def test_context_of_convolutions(convolution: nn.Module, left: int, right: int) -> None:
    """The frames that a stack sees ahead are found, however it is padded; the frames before are states."""
    findings = find(Net(convolution, same))
    assert findings.signature.right_context == right
    frames = [state for state in findings.signature.states if state.input.endswith("frames_0")]
    assert [state.shape for state in frames][:1] == ([(left, 5)] if left else [])
    assert findings.policies == ((cx.Lookahead, cx.Full) if right else (cx.Causal, cx.Carry, cx.Full))
    assert findings.signature.ragged


def test_right_context_counts_into_the_policy(tmp_path: Path) -> None:
    """The default looks far enough ahead, a policy that does not is refused, and the bundle says who needs it."""
    model = Net(nn.Conv1d(5, 5, 19, padding=9), same)
    with pytest.raises(cx.PolicyError, match=r"before \(Conv1d\) sees 9 frames ahead; give ahead ≥ 9"):
        cx.export(model.eval(), X, name="model", out=tmp_path, policy=cx.Lookahead(8, 8))
    bundle = cx.export(model.eval(), X, name="model", out=tmp_path)
    assert (bundle.manifest.default_policy.ahead, bundle.manifest.right_context) == (9, 9)
    assert "before (Conv1d) sees 9 frames ahead" in bundle.manifest.notes
    assert cx.parity(bundle, model)["maximum"] <= 1e-5
