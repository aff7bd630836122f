"""BiLSTM-CRF taggers as people write them, with their own Viterbi decoders in plain Python."""

import torch
from torch import Tensor, nn

import carousel_export as cx

WORDS, TAGS = 13, 5


class CRF(nn.Module):
    """The decoding half of the published `torchcrf.CRF`, parameters, arguments and results as there."""

    def __init__(self, num_tags: int, batch_first: bool = False) -> None:
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1, 1)

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
        if self.batch_first:
            emissions = emissions.transpose(0, 1)
            mask = None if mask is None else mask.transpose(0, 1)
        if mask is None:
            mask = emissions.new_ones(emissions.shape[:2], dtype=torch.bool)
        lasts = mask.long().sum(dim=0) - 1
        score = self.start_transitions + emissions[0]
        history = []
        for t in range(1, len(emissions)):
            best, indices = (score.unsqueeze(2) + self.transitions + emissions[t].unsqueeze(1)).max(dim=1)
            score = torch.where(mask[t].unsqueeze(1), best, score)
            history.append(indices)
        score += self.end_transitions
        paths = []
        for row, last in enumerate(lasts):
            tags = [int(score[row].argmax())]
            for indices in reversed(history[: int(last)]):
                tags.append(int(indices[row][tags[-1]]))
            paths.append(tags[::-1])
        return paths


class LayerTagger(nn.Module):
    """Tokens `[batch, time]` → emissions and, in lists, the best paths."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(8, TAGS)
        self.crf = CRF(TAGS, batch_first=batch_first)

    def forward(self, tokens: Tensor) -> dict[str, object]:
        emissions = self.fc(self.lstm(self.embedding(tokens))[0])
        given = emissions if self.crf.batch_first else emissions.transpose(0, 1)
        return {"emissions": emissions, "path": self.crf.decode(given)}


class TutorialTagger(nn.Module):
    """PyTorch's tutorial: one matrix, `transitions[to, from]`, in which START and STOP are tags as well."""

    START, STOP = TAGS - 2, TAGS - 1

    def __init__(self) -> None:
        super().__init__()
        self.word_embeds = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 4, num_layers=1, bidirectional=True, batch_first=True)
        self.hidden2tag = nn.Linear(8, TAGS)
        self.transitions = nn.Parameter(torch.randn(TAGS, TAGS))
        self.transitions.data[self.START, :] = -10000
        self.transitions.data[:, self.STOP] = -10000

    def features(self, sentence: Tensor) -> Tensor:
        return self.hidden2tag(self.lstm(self.word_embeds(sentence))[0])

    def forward(self, sentence: Tensor) -> tuple[Tensor, Tensor]:
        return cx.viterbi_decode(
            self.features(sentence), self.transitions.T, self.transitions[:, self.START], self.transitions[self.STOP]
        )

    def viterbi(self, features: Tensor) -> tuple[float, list[int]]:
        """The tutorial's `_viterbi_decode`, of one sentence's features `[time, tags]`."""
        backpointers = []
        forward_var = torch.full((TAGS,), -10000.0)
        forward_var[self.START] = 0
        for feature in features:
            following, best = (forward_var + self.transitions).max(dim=1)
            forward_var = following + feature
            backpointers.append(best)
        terminal = forward_var + self.transitions[self.STOP]
        tag = int(terminal.argmax())
        path = [tag]
        for best in reversed(backpointers):
            path.append(int(best[path[-1]]))
        assert path.pop() == self.START
        return float(terminal[tag]), path[::-1]
