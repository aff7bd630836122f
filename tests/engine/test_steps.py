"""Steps that run at once, on a runner that can tell."""

import asyncio
import threading

import numpy as np
from tests.engine.test_scheduler import Owner

from carousel_server.engine.arena import Arena
from carousel_server.engine.runner import Batch, Outcome
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.spec import Port
from carousel_server.engine.step import Step
from carousel_server.engine.steps import Steps

OUTPUT = Port("y", np.dtype(np.float32), (1,), per_frame=True)


class Meeting:
    """Runs nothing; `met` counts the times that two runs were inside at once, `most` how many at most."""

    def __init__(self, together: int) -> None:
        self.barrier = threading.Barrier(together)
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def gather(self, step: Step) -> Batch:
        return Batch(step.graph, np.zeros(len(step.blocks), np.intp), {})

    def run(self, batch: Batch) -> Outcome:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.barrier.wait(10)  # broken, and the step fails, where nobody else comes
        with self.lock:
            self.inside -= 1
        return Outcome(batch.slots, [], [np.zeros((len(batch.slots), 1, 1), np.float32)], [OUTPUT])


def turn(owners: list[Owner], meeting: Meeting, runners: int) -> Steps:
    """Run all that the owners have."""

    async def run() -> Steps:
        scheduler = Scheduler(max_batch=32, max_frames=1000, ragged=True)
        steps = Steps("m", scheduler, meeting, Arena([], 4), lambda _: None, runners=runners)  # type: ignore[arg-type]
        for owner in owners:
            steps.add(owner)
        steps.end()
        await asyncio.wait_for(steps.turn_forever(), 20)
        steps.shut()
        return steps

    return asyncio.run(run())


def test_two_runners_run_two_steps_at_once_and_each_owner_in_one():
    """Where enough wait, a second step runs beside the first; a block of an owner never runs beside another of it."""
    owners = [Owner(number, "model.onnx", [1] * 4) for number in range(64)]
    meeting = Meeting(together=2)
    steps = turn(owners, meeting, runners=2)
    assert meeting.most == 2
    assert all(owner.served == [1] * 4 for owner in owners)
    assert steps.counters.rows == 4 * 64


def test_a_few_wait_for_the_next_step():
    """Too few rows for a step of their own wait until the runner is free, so that they share it with who comes."""
    owners = [Owner(number, "model.onnx", [1] * 3) for number in range(8)]
    meeting = Meeting(together=1)
    steps = turn(owners, meeting, runners=2)
    assert meeting.most == 1
    assert steps.counters.steps == 3
