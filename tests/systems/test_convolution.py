"""Convolutions over time before (and after) the recurrent layer: streamed with the frames before as a state."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from tests.parity.oracle import Net, looked_ahead
from tests.support.served import LENGTHS, assert_near, infer_together, served, stream_together
from torch import Tensor, nn

import carousel_client as cc
from carousel_protos.v1 import manifest_pb2 as pb

pytestmark = pytest.mark.system("14", "convolution over time before the LSTM, causal or centred")

CAUSAL, CARRY, LOOKAHEAD, FULL = (
    pb.POLICY_KIND_CAUSAL,
    pb.POLICY_KIND_CARRY,
    pb.POLICY_KIND_LOOKAHEAD,
    pb.POLICY_KIND_FULL,
)


class PaddedConv(nn.Module):
    """A causal convolution, padded by `F.pad`."""

    def __init__(self, size: int, out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.left = (kernel - 1) * dilation
        self.conv = nn.Conv1d(size, out, kernel, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.left, 0)))


class ChompedConv(nn.Module):
    """A causal convolution, padded on both sides and cut."""

    def __init__(self, size: int, out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.left = (kernel - 1) * dilation
        self.conv = nn.Conv1d(size, out, kernel, dilation=dilation, padding=self.left)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :, : -self.left]


class Convolved(nn.Module):
    """`[batch, time, 5]` → `[batch, time, 3]`: convolutions, and an LSTM with a linear layer."""

    def __init__(self, *convolutions: nn.Module, bidirectional: bool = False) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*convolutions)
        self.net = Net(sizes=(6, 4, 3), batch_first=True, bidirectional=bidirectional)

    def features(self, x: Tensor) -> Tensor:
        return self.convolutions(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.features(x))


class Spectrogram(nn.Module):
    """CRNN: `[batch, time, 5]` through a convolution over time and frequency, and a last frame's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=(2, 1))
        self.lstm = nn.LSTM(10, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        images = self.conv(x.unsqueeze(1))[:, :, :-2].relu()
        return self.lstm(images.permute(0, 2, 1, 3).flatten(2))[0][:, -1]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "padded": lambda: Convolved(PaddedConv(5, 7, 3), nn.ReLU(), nn.BatchNorm1d(7), PaddedConv(7, 6, 2, 4)),
        "chomped": lambda: Convolved(ChompedConv(5, 6, 3), nn.ReLU(), ChompedConv(6, 6, 2, 2), bidirectional=True),
        "centred": lambda: Convolved(nn.Conv1d(5, 7, 3, padding=1), nn.ReLU(), nn.Conv1d(7, 6, 5, padding="same")),
        "both": lambda: Convolved(nn.Conv1d(5, 6, 3, padding=1), bidirectional=True),
        "crnn": Spectrogram,
    }[name]().eval()


POLICIES = {
    "padded": [CAUSAL, CARRY, FULL],
    "chomped": [CARRY, LOOKAHEAD, FULL],
    "centred": [LOOKAHEAD, FULL],
    "both": [LOOKAHEAD, FULL],
    "crnn": [CAUSAL, CARRY, FULL],
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cc.Client]:
    models = {name: make(name) for name in POLICIES}
    with served(tmp_path_factory.mktemp("convolution"), models, torch.randn(3, 7, 5)) as connected:
        yield connected


@pytest.mark.parametrize("name", POLICIES)
def test_rows_as_alone(client: cc.Client, name: str) -> None:
    """The bundle allows what is right for its convolutions, and a ragged batch has zeros after each row's own end."""
    manifest = client.model(name).manifest
    assert [policy.kind for policy in manifest.policies] == POLICIES[name]
    assert manifest.ragged
    rows = [torch.randn(length, 5) for length in LENGTHS]
    with torch.no_grad():
        for row, answer in zip(rows, infer_together(client, name, rows), strict=True):
            assert_near(answer["output"], make(name)(row[None])[0])


@pytest.mark.parametrize("cut", [1, 4])
def test_causal_convolutions_stream(client: cc.Client, cut: int) -> None:
    """Sessions of any chunks, frame by frame too, have the offline answer: the last frames are kept as h and c are."""
    states = {state.input: list(state.dims) for state in client.model("padded").manifest.states}
    assert states["convolutions.0.frames_0"] == ["batch", "2", "5"]
    assert states["convolutions.3.frames_0"] == ["batch", "4", "7"]
    rows = [torch.randn(length, 5) for length in LENGTHS]
    for name in ("padded", "crnn"):
        for row, answers in zip(rows, stream_together(client, name, rows, cut), strict=True):
            with torch.no_grad():
                wanted = make(name)(row[None])[0]
            assert_near(answers[-1] if name == "crnn" else np.concatenate(answers), wanted)


@pytest.mark.parametrize("policy", [cc.Lookahead(4, 3), cc.Lookahead(1, 3), cc.Lookahead(3, 6)], ids=str)
def test_centred_convolutions_look_ahead(client: cc.Client, policy: cc.Lookahead) -> None:
    """With the frames ahead that centred convolutions see, the answer before an LSTM of one direction is offline's."""
    manifest = client.model("centred").manifest
    assert manifest.right_context == 3
    rows = [torch.randn(length, 5) for length in LENGTHS]
    for row, answers in zip(rows, stream_together(client, "centred", rows, 4, policy), strict=True):
        with torch.no_grad():
            assert_near(np.concatenate(answers), make("centred")(row[None])[0])


def test_too_few_frames_ahead_are_refused(client: cc.Client) -> None:
    """A session that asks for fewer frames ahead than the convolutions see is told how many they need."""
    with (
        pytest.raises(cc.CarouselError, match="need 3"),
        client.session("centred", policy=cc.Lookahead(8, 2)) as session,
    ):
        session.send(torch.randn(2, 5).numpy())


@pytest.mark.parametrize("policy", [cc.Lookahead(4, 2), cc.Lookahead(1, 5)], ids=str)
@pytest.mark.parametrize("name", ["both", "chomped"])
def test_convolutions_before_a_backward_direction(client: cc.Client, name: str, policy: cc.Lookahead) -> None:
    """Before a bidirectional LSTM, each block's features have the frames before it, and zeros after the last ahead."""
    model = make(name)
    assert isinstance(model, Convolved)
    rows = [torch.randn(length, 5) for length in LENGTHS]
    for row, answers in zip(rows, stream_together(client, name, rows, 4, policy), strict=True):
        state = (torch.zeros(2, 4), torch.zeros(2, 4))
        wanted = []
        for at in range(0, len(row), policy.block):
            end = min(at + policy.block, len(row))
            with torch.no_grad():
                features = model.features(row[None, : end + policy.ahead])[0, at:]
            y, state = looked_ahead(model.net, features[: end - at], features[end - at :], state)
            wanted.append(y)
        assert_near(np.concatenate(answers), torch.cat(wanted))
