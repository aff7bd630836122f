"""Input that no export can be made of: training mode, one row, branches on values, and numbers that are none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import carousel_export as cx

X = torch.randn(2, 6, 5)


class Net(nn.Module):
    """An LSTM with dropout after it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.lstm(x)[0])


class Branches(Net):
    """Decides by what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        if y.mean() > 0:
            y = -y
        return y


class Counts(Net):
    """Takes a number out of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0] * int(x.sum().item())


class Within(nn.Module):
    """Has a part that branches."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Unpaired(Net):
    """Packs, and never pads again."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[0],), x.shape[1])
        return self.lstm(pack_padded_sequence(x, lengths, batch_first=True))[0].data


class Padded(Net):
    """Pads what was never packed."""

    def forward(self, x: Tensor) -> Tensor:
        return pad_packed_sequence(self.lstm(x)[0], batch_first=True)[0]


class Median(Net):
    """Has a function that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].median(2).values


class Sums(Net):
    """Adds up frame by frame in Python."""

    def forward(self, x: Tensor) -> Tensor:
        total, sums = torch.zeros(x.shape[0], 4), []
        for frame in self.lstm(x)[0].unbind(1):
            total = total + frame
            sums.append(total)
        return torch.stack(sums, 1)


class Keeps(Net):
    """Goes on where the last call ended."""

    hidden: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.hidden = self.lstm(x, self.hidden)
        return y


class Draws(Net):
    """Starts anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x, (torch.randn(1, x.shape[0], 4), torch.zeros(1, x.shape[0], 4)))[0]


class Spoils(Net):
    """Scales its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.mul_(2))[0]


class Limited(Net):
    """Answers otherwise to more frames, or more rows, than the gate tries."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return -y if x.shape[self.axis] > 5000 else y


def sampling() -> nn.Module:
    model = Net().eval()
    model.drop.train()
    return model


def spoilt(*, buffer: bool) -> nn.Module:
    model = Net().eval()
    if buffer:
        model.register_buffer("scale", torch.tensor([1.0, torch.nan]))
    else:
        with torch.no_grad():
            model.lstm.bias_hh_l0[2] = torch.inf
    return model


BRANCH = "if y.mean() > 0 (test_bad_input.py:"
REFUSED = {
    "training mode": (Net(), X, ["Net is in training mode; call model.eval()"]),
    "a part in training mode": (sampling(), X, ["drop (Dropout) of Net is in training mode; call model.eval()"]),
    "a batch of one": (Net().eval(), X[:1], ["'x' [1, 6, 5] has a batch of 1 (axis 0)", "give two rows or more"]),
    "a branch": (Branches().eval(), X, [f"Branches: {BRANCH}", "choose with torch.where"]),
    "a part's branch": (Within().eval(), X, [f"part (Branches): {BRANCH}", "choose with torch.where"]),
    "a number from a tensor": (Counts().eval(), X, ["Counts: ", ".item()", "depends on the values of a tensor"]),
    "a state kept in the module": (
        Keeps().eval(),
        X,
        ["Keeps answers otherwise when it is called", "take a state as an"],
    ),
    "a random start": (Draws().eval(), X, ["Draws answers otherwise when it is called again", "draws random numbers"]),
    "an input written over": (Spoils().eval(), X, ["Spoils writes into its argument 'x'", "compute a new tensor"]),
    "a branch on many frames": (Limited(1).eval(), X, ["Limited decides by its input's size", "time is over 5000"]),
    "a branch on many rows": (Limited(0).eval(), X, ["Limited decides by its input's size", "batch is over 5000"]),
    "no operator": (Median().eval(), X, ["there is no ONNX operator for aten.median", "with other functions"]),
    "a loop over frames": (
        Sums().eval(),
        X,
        ["[batch, time, 5] is wanted", "without Python loops", "cx.viterbi_decode"],
    ),
    "float64 weights": (Net().eval().double(), X.double(), ["lstm.weight_ih_l0 is torch.float64", "model.float()"]),
    "float16 weights": (Net().eval().half(), X.half(), ["lstm.weight_ih_l0 is torch.float16", "model.float()"]),
    "bfloat16 example": (Net().eval(), X.bfloat16(), ["'x' is torch.bfloat16", ".float()"]),
    "complex example": (Net().eval(), X.to(torch.complex64), ["'x' is torch.complex64", "give float32"]),
    "packed and not padded": (Unpaired().eval(), X, ["packed sequence of lstm", "give it to pad_packed_sequence"]),
    "padded and not packed": (Padded().eval(), X, ["pad_packed_sequence is given what", "pack it first"]),
    "an infinite weight": (spoilt(buffer=False), X, ["lstm.bias_hh_l0 has values that are not finite"]),
    "NaN in a buffer": (spoilt(buffer=True), X, ["scale has values that are not finite"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_and_no_bundle(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each is refused in a line of its own that names the place and the way out, and nothing is left on disk."""
    model, example, said = REFUSED[case]
    with pytest.raises(cx.ExportError) as refused:
        cx.export(model, example, name="net", out=tmp_path / "models")
    line = str(refused.value)
    assert "\n" not in line
    for words in said:
        assert words in line
    assert not caplog.messages
    assert not list(tmp_path.rglob("*"))
