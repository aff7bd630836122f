"""An acoustic model with a speaker's embedding, given once a session."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.models import make
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx


class Acoustic(nn.Module):
    """Time-major frames `[time, batch, 5]` and a speaker `[batch, 4]` → `[time, batch, 3]`; two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5 + 4, 6, bidirectional=True)
        self.gain = nn.Linear(4, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, frames: Tensor, speaker: Tensor) -> Tensor:
        y, _ = self.rnn(torch.cat([frames, speaker.expand(frames.shape[0], -1, -1)], dim=-1))
        return self.out(y * self.gain(speaker).sigmoid())


@pytest.mark.system("12", "a context of fixed size, a speaker's embedding, under every policy")
def test_speakers_stream(tmp_path: Path) -> None:
    """Each session keeps its own speaker through every block, under every policy, beside the others."""
    model = make(Acoustic)
    bundle = cx.export(model.eval(), (torch.randn(6, 3, 5), torch.randn(3, 4)), name="acoustic", out=tmp_path)
    assert [list(port.dims) for port in bundle.manifest.contexts] == [["batch", "4"]]
    streams = [(torch.randn(length, 5), torch.randn(4)) for length in (20, 7, 13)]

    def whole(x: Tensor, speaker: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x[:, None], speaker[None])[:, 0]

    def carried(x: Tensor, speaker: Tensor) -> Tensor:
        state, answers = None, []
        with torch.no_grad():
            for block in x.split(4):
                joined = torch.cat([block, speaker.expand(len(block), -1)], dim=-1)
                y, state = model.rnn(joined, state)
                answers.append(model.out(y * model.gain(speaker).sigmoid()))
        return torch.cat(answers)

    def ask(policy: cc.Policy) -> list[np.ndarray]:
        sessions = [
            client.session("acoustic", policy=policy, context={"speaker": speaker.numpy()}) for _, speaker in streams
        ]
        return [stream(session, x) for session, (x, _) in zip(sessions, streams, strict=True)]

    with serving(tmp_path) as server, cc.connect(server.address) as client:
        for policy, wanted in ((cc.Full(), whole), (cc.Carry(4), carried), (cc.Lookahead(3, 40), whole)):
            for answer, given in zip(ask(policy), streams, strict=True):
                # With everything ahead, only what the forward state misses would differ: nothing.
                np.testing.assert_allclose(answer, wanted(*given), rtol=0, atol=1e-5)


def stream(session: cc.Session, x: Tensor) -> np.ndarray:
    with session:
        return np.concatenate(list(session.stream([part.numpy() for part in x.split(5)])))
