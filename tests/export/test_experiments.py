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


def find(model: nn.Module) -> Findings:
    eager = Eager(model)
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
        cx.export(model, X, name="model", out=tmp_path, policy=cx.Lookahead(8, 8))
    bundle = cx.export(model, X, name="model", out=tmp_path)
    assert (bundle.manifest.default_policy.ahead, bundle.manifest.right_context) == (9, 9)
    assert "before (Conv1d) sees 9 frames ahead" in bundle.manifest.notes
    assert cx.parity(bundle, model)["maximum"] <= 1e-5
