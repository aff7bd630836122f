"""Functions over time in a ragged batch: each row's own frames, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn

import carousel_export as cx
from carousel_export.ragged import RaggedTime

torch.set_num_threads(1)
BATCH, TIME, SIZE = 3, 7, 4
LENGTHS = torch.tensor([7, 5, 2])

# Of [batch, time, size], with time second or last.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "mean, kept": lambda x: torch.mean(x, dim=1, keepdim=True),
    "mean, kept by position": lambda x: x.mean(1, True),
    "mean over two axes": lambda x: x.mean((1, 2)),
    "sum": lambda x: x.sum(-2),
    "max": lambda x: x.max(1)[0],
    "max by axis": lambda x: torch.max(x, axis=1).values,
    "amin": lambda x: x.amin(1),
    "argmax": lambda x: x.argmax(1),
    "integers": lambda x: (x * 10).long().max(1)[0],
    "any": lambda x: (x > 1).any(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "prod": lambda x: x.prod(1),
    "std": lambda x: x.std(1),
    "var, biased": lambda x: x.var(dim=1, unbiased=False, keepdim=True),
    "norm": lambda x: x.norm(dim=1),
    "last": lambda x: x[:, -1],
    "last, some features": lambda x: x[:, -1, :2],
    "last after an ellipsis": lambda x: x.transpose(1, 2)[..., -1],
    "last by size": lambda x: x[:, x.size(1) - 1],
    "last two": lambda x: x[:, -2:],
    "last, with a new axis": lambda x: x[:, None, -1],
    "selected": lambda x: x.select(1, -1),
    "first": lambda x: x[:, 0],
    "adaptive pooling": lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1),
    "pooling of all frames": lambda x: F.max_pool1d(x.transpose(1, 2), x.size(1)),
    "time first": lambda x: x.transpose(0, 1).mean(0),
    "time first, last": lambda x: x.transpose(0, 1)[-1],
    "attention": lambda x: torch.bmm(x.sum(2).softmax(1).unsqueeze(1), x),
    "product": lambda x: x.mT @ x,
    "flipped twice": lambda x: x.flip(1).cumsum(1).flip([1])[:, 0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_row_as_alone(name: str) -> None:
    """A row with anything after its end is answered as the row alone is."""
    function = FUNCTIONS[name]
    x = torch.randn(BATCH, TIME, SIZE)
    with RaggedTime(LENGTHS, BATCH, TIME):
        together = function(x)
    if name.startswith("time first"):
        assert together.shape[0] == BATCH
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[row : row + 1], function(x[row : row + 1, :length]))


@pytest.mark.parametrize("function", [lambda x: x.sum(2), lambda x: x[1], lambda x: x.mean(), lambda x: x[x > 0]])
def test_what_is_not_over_time_is_as_it_was(function: Callable[[Tensor], Tensor]) -> None:
    """Functions over other axes, over all of them or by a mask are left alone."""
    x = torch.randn(BATCH, TIME, SIZE)
    with RaggedTime(LENGTHS, BATCH, TIME):
        together = function(x)
    assert torch.equal(together, function(x))


def test_within_layers_that_know_the_lengths() -> None:
    """Suspended, and after it was left, functions are as they are."""
    x = torch.randn(BATCH, TIME, SIZE)
    with RaggedTime(LENGTHS, BATCH, TIME) as ragged, ragged.suspended():
        assert torch.equal(x.mean(1), x.sum(1) / TIME)
    assert torch.equal(x.mean(1), x.sum(1) / TIME)


class BySize(nn.Module):
    """A mean that divides by the padded size."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].sum(1) / x.size(1)


def test_what_cannot_be_ragged_is_marked_so(tmp_path: Path) -> None:
    """Code that takes time's size for its own use is found out; its bundle asks for batches of equal length, and has
    been proven in those."""
    bundle = cx.export(BySize().eval(), torch.randn(2, 6, 5), name="sized", out=tmp_path)
    assert not bundle.manifest.ragged
    assert "ragged" not in bundle.file("parity.json").read_text()
    assert "batches of one length each" in bundle.file("parity.json").read_text()
