"""The best path through a CRF, against every path there is."""

import itertools

import pytest
import torch
from tests.support.crf import CRF
from torch import Tensor

import carousel_export as cx
from carousel_export.crf import decode_in_graph, find_crfs, return_tensors
from carousel_export.quiet import quiet
from carousel_export.viterbi import best_path

torch.set_num_threads(1)


def by_brute_force(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> tuple[list[int], float]:
    """The best of all paths of one sequence `[time, tags]`."""

    def score(path: tuple[int, ...]) -> float:
        total = float(start[path[0]] + end[path[-1]])
        total += sum(float(transitions[a, b]) for a, b in itertools.pairwise(path))
        return total + sum(float(emission[tag]) for emission, tag in zip(emissions, path, strict=True))

    best = max(itertools.product(range(emissions.shape[1]), repeat=len(emissions)), key=score)
    return list(best), score(best)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scripted", [False, True])
def test_it_is_the_best_of_all_paths(seed: int, scripted: bool) -> None:
    """Rows of different length in one batch have the best path and score that trying every path finds."""
    torch.manual_seed(seed)
    emissions, crf = torch.randn(4, 5, 3), (torch.randn(3, 3), torch.randn(3), torch.randn(3))
    lengths = torch.tensor([5, 1, 2, 4])
    with quiet():
        decode = torch.jit.script(best_path) if scripted else cx.viterbi_decode
    paths, scores = decode(emissions, *crf, lengths)
    for row, length in enumerate(lengths):
        path, score = by_brute_force(emissions[row, :length], *crf)
        assert paths[row, :length].tolist() == path
        assert float(scores[row]) == pytest.approx(score, abs=1e-5)


def test_rows_are_whole_without_lengths() -> None:
    """Without lengths every frame of every row counts."""
    crf = (torch.randn(3, 3), torch.randn(3), torch.randn(3))
    emissions = torch.randn(2, 4, 3)
    path, score = cx.viterbi_decode(emissions, *crf)
    again, same = cx.viterbi_decode(emissions, *crf, torch.tensor([4, 4]))
    assert torch.equal(path, again)
    assert torch.equal(score, same)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layers_own_decode_and_the_graphs(batch_first: bool) -> None:
    """For a mask, the layer's lists as one tensor and the operator in its stead are the same path."""
    crf = CRF(4, batch_first=batch_first)
    assert find_crfs(crf) == [crf]
    emissions, lengths = torch.randn(3, 6, 4), torch.tensor([6, 1, 3])
    mask = torch.arange(6) < lengths[:, None]
    if not batch_first:
        emissions, mask = emissions.transpose(0, 1), mask.T
    lists = crf.decode(emissions, mask)
    return_tensors(crf)
    tensor = crf.decode(emissions, mask)
    decode_in_graph(crf)
    for row, (wanted, length) in enumerate(zip(lists, lengths, strict=True)):
        assert tensor[row, :length].tolist() == wanted
        assert crf.decode(emissions, mask)[row, :length].tolist() == wanted
