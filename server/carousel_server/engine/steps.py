"""The turning of one model's steps: schedule, run, commit."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from carousel_server.engine.arena import Arena
from carousel_server.engine.runner import Outcome, Runner
from carousel_server.engine.runtime import RunError
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.step import Runnable, Step
from carousel_server.errors import InputRejectedError, StepError

log = logging.getLogger("carousel")


@dataclass(slots=True)
class Counters:
    """Counted since the model was loaded; `carousel.v1.Statistics` says what each one is."""

    steps: int = 0
    rows: int = 0
    frames: int = 0
    padded_frames: int = 0
    max_rows: int = 0
    run_seconds: float = 0.0


class Steps:
    """Everything but a step's run belongs to one thread, the event loop's.

    `on_closed` is told of each owner that was closed when a step that held it was over.
    """

    def __init__(
        self, name: str, scheduler: Scheduler, runner: Runner, arena: Arena, on_closed: Callable[[Runnable], None]
    ) -> None:
        self.counters = Counters()
        self._name = name
        self._scheduler = scheduler
        self._runner = runner
        self._arena = arena
        self._on_closed = on_closed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"run-{name}")
        self._ready = asyncio.Event()
        self._running: Step | None = None
        self._ending = False

    def add(self, owner: Runnable) -> None:
        """Queue an owner, if it has a block due."""
        if owner.due:
            self._scheduler.add(owner)
            self._ready.set()

    def holds(self, owner: Runnable) -> bool:
        """Whether the step that runs now has a block of this owner."""
        return self._running is not None and any(block.owner is owner for block in self._running.blocks)

    async def turn_forever(self) -> None:
        """Run steps as long as there are any, off the event loop; wait where there are none."""
        loop = asyncio.get_running_loop()
        while True:
            await self._ready.wait()
            if (step := self._schedule()) is None:
                if self._ending:
                    return
                self._ready.clear()
                continue
            outcomes = await loop.run_in_executor(self._thread, self._run, step)
            self._commit(step, outcomes)

    def turn(self) -> bool:
        """One step, here and now; False where nothing was ready."""
        if (step := self._schedule()) is None:
            return False
        self._commit(step, self._run(step))
        return True

    def end(self) -> None:
        """Let `turn_forever` come back once nothing is ready any more."""
        self._ending = True
        self._ready.set()

    def shut(self) -> None:
        """Wait for the running step; no other may follow."""
        self._thread.shutdown()

    def _schedule(self) -> Step | None:
        self._running = self._scheduler.schedule()
        return self._running

    def _run(self, step: Step) -> list[tuple[Step, Outcome | RunError]]:
        """The step's outcome, or those of its rows run alone where the batch failed."""
        started = perf_counter()
        try:
            return [(step, self._runner.run(step))]
        except RunError as error:
            if len(step.blocks) == 1:
                return [(step, error)]
        except Exception as error:  # a fault of ours must not stop the turning for everybody
            log.exception("a step of %s failed", self._name)
            if len(step.blocks) == 1:
                return [(step, RunError(f"{type(error).__name__}, see the server's log", rejected=False))]
        finally:
            self.counters.run_seconds += perf_counter() - started
        return [outcome for block in step.blocks for outcome in self._run(Step(step.graph, [block]))]

    def _commit(self, step: Step, outcomes: list[tuple[Step, Outcome | RunError]]) -> None:
        """Publish what succeeded; what failed leaves its owner where it was."""
        self._running = None
        for part, outcome in outcomes:
            if isinstance(outcome, RunError):
                self._refuse(part, outcome)
            else:
                self._publish(part, outcome)
        self._scheduler.finish(step)
        for block in step.blocks:
            if block.owner.closed:
                self._on_closed(block.owner)
        self.counters.steps += 1
        self.counters.rows += len(step.blocks)
        self.counters.max_rows = max(self.counters.max_rows, len(step.blocks))
        self.counters.frames += step.frames
        self.counters.padded_frames += step.padded_frames

    def _publish(self, step: Step, outcome: Outcome) -> None:
        for block in step.blocks:
            owner = block.owner
            if owner.slot and owner.rollback is None and not owner.closed and not owner.completes(block.frames):
                owner.rollback = self._arena.read(owner.slot)
        self._arena.scatter(outcome.slots, outcome.states)
        for block, outputs in zip(step.blocks, outcome.outputs, strict=True):
            if not block.owner.closed:
                block.owner.commit(block.frames, outputs)

    def _refuse(self, step: Step, error: RunError) -> None:
        (block,) = step.blocks
        owner = block.owner
        if owner.closed:
            return
        if owner.rollback is not None:
            self._arena.write(owner.slot, owner.rollback)
            owner.rollback = None
        if error.rejected:
            owner.fail(InputRejectedError(f"the model refused this input, and the state has not moved: {error}"))
        else:
            owner.fail(StepError(f"the model's run failed, and the state has not moved: {error}", retry_after_s=1.0))
