"""The network of g2pM as an ordinary PyTorch module (Park and Lee, 2020, arXiv:2004.03136)."""

import torch
from examples.pinyin import weights
from torch import Tensor, nn


class Pinyin(nn.Module):
    """Characters to probabilities of readings: embedding, one bidirectional LSTM, two linear layers, softmax.

    `forward` takes character numbers, int64 `[batch, time]`, and gives probabilities, float32 `[batch, time, 876]`. The
    scores before the softmax reach 150, where one step of float32 is 1.5e-5: probabilities can be compared to 1e-5.
    """

    def __init__(self, characters: int = 5398, readings: int = 876) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = nn.LSTM(64, 32, batch_first=True, bidirectional=True)
        self.logit_layer = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, readings))

    def scores(self, characters: Tensor) -> Tensor:
        """What the published network compares: scores of the same shape, before the softmax."""
        hidden, _ = self.lstm(self.embedding(characters))
        scores: Tensor = self.logit_layer(hidden)
        return scores

    def forward(self, characters: Tensor) -> Tensor:
        return self.scores(characters).softmax(-1)


def load() -> Pinyin:
    """The trained network, in evaluation mode.

    The package keeps the arrays under PyTorch's own names, gates in PyTorch's order (i, f, g, o) with both biases.
    """
    model = Pinyin()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.read("np_ckpt.pkl").items()})
    return model.eval()
