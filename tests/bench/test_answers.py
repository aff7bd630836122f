"""The benchmark checks what servers answer, against references of its own."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import references
from bench.client.record import Record
from bench.models import Stack
from bench.workload import Workload


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    """Three chunks of model A, read back from their file."""
    return Workload.load(references.write(tmp_path, "A", [3, 1, 2]))


async def test_a_wrong_answer_ends_the_run(workload: Workload) -> None:
    """A client takes eager PyTorch's answers, and raises for one that is another session's or a little off."""
    record = Record(workload, sessions=2)
    for index in range(3):
        record.done(1, index, 0.0, workload.wanted[1][index].tobytes())
    with pytest.raises(RuntimeError, match="off eager"):
        record.done(0, 1, 0.0, workload.wanted[1][1].tobytes())
    with pytest.raises(RuntimeError, match="off eager"):
        record.done(0, 0, 0.0, (workload.wanted[0][0] + np.float32(1e-4)).tobytes())
    assert not record.warm.is_set()
    record.done(0, 0, 0.0, workload.wanted[0][0].tobytes())
    await asyncio.wait_for(record.warm.wait(), 1)


def test_lookahead_with_all_frames_ahead_is_the_offline_answer() -> None:
    """With the rest of the sequence ahead, the lookahead reference says of a block what the whole model says."""
    torch.manual_seed(3)
    stack = Stack(5, 7, bidirectional=True).eval()
    x = torch.randn(16, 5)
    with torch.inference_mode():
        nothing, block = references.lookahead(stack, [x[:8], x[8:]])
        offline, _ = stack(x[None])
    assert len(nothing) == 0
    torch.testing.assert_close(block, offline[0, :8], atol=1e-6, rtol=0)
