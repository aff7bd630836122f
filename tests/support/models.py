"""Small models as a user would write them, and their answers under each policy, from eager PyTorch alone."""

import torch
from torch import nn

torch.set_num_threads(1)


class Tagger(nn.Module):
    """`[batch, time, 5]` → `[batch, time, 3]`: two bidirectional LSTM layers and a linear one."""

    def __init__(self, features: int = 5, hidden: int = 7, classes: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=layers, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lstm(x)[0])


class Speaker(nn.Module):
    """Token ids `[batch, time]` → `[batch, time, 11]`: an embedding, one LSTM, a linear layer; causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 9, batch_first=True)
        self.linear = nn.Linear(9, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lstm(self.embedding(tokens))[0])


def make(kind: type[nn.Module], seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**sizes).eval()


def whole(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The offline answer to one sequence `[time, …]`: policy full, and causal."""
    with torch.no_grad():
        return model(x[None])[0]


def carried(model: nn.Module, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Policy carry: the model called block by block, its LSTM given back what it returned, both directions."""
    state = None
    outputs = []
    with torch.no_grad():
        for block in torch.split(x, sizes):
            y, state = model.lstm(block[None], state)
            outputs.append(model.linear(y)[0])
    return torch.cat(outputs)


def looked_ahead(model: nn.Module, x: torch.Tensor, block: int, ahead: int) -> torch.Tensor:
    """Policy lookahead, layer by layer and direction by direction, from single-direction eager LSTMs."""
    lstm = model.lstm
    directions = [[_direction(lstm, layer, suffix) for suffix in ("", "_reverse")] for layer in range(lstm.num_layers)]
    carried_states: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * lstm.num_layers
    outputs = []
    with torch.no_grad():
        for at in range(0, len(x), block):
            seen = x[None, at : at + block + ahead]
            size = min(block, len(x) - at)
            for layer, (forward, backward) in enumerate(directions):
                over_block, end = forward(seen[:, :size], carried_states[layer])
                over_both = (
                    over_block if seen.shape[1] == size else torch.cat([over_block, forward(seen[:, size:], end)[0]], 1)
                )
                carried_states[layer] = end
                reversed_out, _ = backward(seen.flip(1))
                seen = torch.cat([over_both, reversed_out.flip(1)], 2)
            outputs.append(model.linear(seen[0, :size]))
    return torch.cat(outputs)


def _direction(lstm: nn.LSTM, layer: int, suffix: str) -> nn.LSTM:
    size = lstm.input_size if layer == 0 else 2 * lstm.hidden_size
    single = nn.LSTM(size, lstm.hidden_size, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(single, f"{name}_l0").data = getattr(lstm, f"{name}_l{layer}{suffix}").data
    return single.eval()
