"""The turning of one model's steps: schedule, run, commit.

All belongs to one thread, the event loop's, but a step's run, which gets arrays, gives arrays and hardly needs Python.
While every runner has a step the next is formed, if it is a full one; formed later, it would have more rows.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from carousel_server import faults
from carousel_server.engine.arena import Arena
from carousel_server.engine.runner import Batch, Outcome, Runner
from carousel_server.engine.runtime import RunError
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.step import Runnable, Step
from carousel_server.errors import InputRejectedError, StepError

log = logging.getLogger("carousel")

# Rows that a step has at least to run beside another: fewer cost more each than waiting for the next step does.
_BESIDE = 16


@dataclass(slots=True)
class Counters:
    """Counted since the model was loaded; `carousel.v1.Statistics` says what each one is."""

    steps: int = 0
    rows: int = 0
    frames: int = 0
    padded_frames: int = 0
    max_rows: int = 0
    run_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Turn:
    """A step on its way: what it is run on, and what came of it, as a whole or row by row."""

    step: Step
    batch: Batch | None = None
    outcomes: list[tuple[Step, Outcome | RunError]] = field(default_factory=list)
    seconds: float = 0.0


class Steps:
    """`on_closed` is told of each owner that was closed when a step that held it was over."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        runner: Runner,
        arena: Arena,
        on_closed: Callable[[Runnable], None],
        *,
        runners: int = 1,
    ) -> None:
        self.counters = Counters()
        self._name = name
        self._scheduler = scheduler
        self._runner = runner
        self._arena = arena
        self._on_closed = on_closed
        self._thread = ThreadPoolExecutor(runners, thread_name_prefix=f"run-{name}")
        self._runners = runners
        self._ready = asyncio.Event()
        # Formed and not committed, in the order of their runs; and those of them that have run.
        self._formed: deque[_Turn] = deque()
        self._over: deque[_Turn] = deque()
        self._ending = False

    def add(self, owner: Runnable) -> None:
        """Queue an owner, if it has a block due."""
        if owner.due:
            self._scheduler.add(owner)
            if self._wanted:
                self._ready.set()

    @property
    def _wanted(self) -> bool:
        """Whether a step is formed now, if anybody waits: one runs beside others from some rows on, or full waits."""
        if not self._formed:
            return True
        if len(self._formed) < self._runners:
            return len(self._scheduler) >= _BESIDE
        return len(self._formed) == self._runners and self._scheduler.full

    def holds(self, owner: Runnable) -> bool:
        """Whether a step that is not committed has a block of this owner."""
        return any(block.owner is owner for turn in self._formed for block in turn.step.blocks)

    async def turn_forever(self) -> None:
        """Run steps as long as there are any, off the event loop; wait where there are none."""
        loop = asyncio.get_running_loop()
        while self._formed or len(self._scheduler) or not self._ending:
            await self._ready.wait()
            self._ready.clear()
            while self._over:
                self._commit(self._over.popleft())
            while self._wanted:
                if (turn := self._schedule()) is None:
                    break
                self._thread.submit(self._run_off, turn, loop)

    def turn(self) -> bool:
        """One step, here and now; False where nothing was ready."""
        if (turn := self._schedule()) is None:
            return False
        self._run(turn)
        self._commit(turn)
        return True

    def end(self) -> None:
        """Let `turn_forever` come back once nothing is ready any more."""
        self._ending = True
        self._ready.set()

    def shut(self) -> None:
        """Wait for the running step; no other may follow."""
        self._thread.shutdown(cancel_futures=True)

    def _schedule(self) -> _Turn | None:
        if (step := self._scheduler.schedule()) is None:
            return None
        turn = _Turn(step)
        self._formed.append(turn)
        # What cannot be gathered fails where it is run, row by row, and stops nobody else.
        with suppress(Exception):
            turn.batch = self._runner.gather(step)
        return turn

    def _run_off(self, turn: _Turn, loop: asyncio.AbstractEventLoop) -> None:
        """On the runner's thread."""
        faults.reach("before-run")
        self._run(turn)
        faults.reach("after-run")
        loop.call_soon_threadsafe(self._ran, turn)

    def _ran(self, turn: _Turn) -> None:
        self._over.append(turn)
        self._ready.set()

    def _run(self, turn: _Turn) -> None:
        """The step's outcome, or those of its rows run alone where the batch failed."""
        started = perf_counter()
        turn.outcomes = self._attempt(turn.step, turn.batch)
        turn.seconds = perf_counter() - started

    def _attempt(self, step: Step, batch: Batch | None) -> list[tuple[Step, Outcome | RunError]]:
        try:
            return [(step, self._runner.run(batch or self._runner.gather(step)))]
        except RunError as error:
            if len(step.blocks) == 1:
                return [(step, error)]
        except Exception as error:  # a fault of ours must not stop the turning for everybody
            log.exception("a step of %s failed", self._name)
            if len(step.blocks) == 1:
                return [(step, RunError(f"{type(error).__name__}, see the server's log", rejected=False))]
        return [outcome for block in step.blocks for outcome in self._attempt(Step(step.graph, [block]), None)]

    def _commit(self, turn: _Turn) -> None:
        """Publish what succeeded; what failed leaves its owner where it was."""
        self._formed.remove(turn)
        for part, outcome in turn.outcomes:
            if isinstance(outcome, RunError):
                self._refuse(part, outcome)
            else:
                self._publish(part, outcome)
        step, counters = turn.step, self.counters
        self._scheduler.finish(step)
        for block in step.blocks:
            if block.owner.closed:
                self._on_closed(block.owner)
        counters.steps += 1
        counters.run_seconds += turn.seconds
        counters.rows += len(step.blocks)
        counters.max_rows = max(counters.max_rows, len(step.blocks))
        counters.frames += step.frames
        counters.padded_frames += step.padded_frames

    def _publish(self, step: Step, outcome: Outcome) -> None:
        for block in step.blocks:
            owner = block.owner
            if owner.rollback is None and owner.slot and not owner.completes(block.frames) and not owner.closed:
                owner.rollback = self._arena.read(owner.slot)
        self._arena.scatter(outcome.slots, outcome.states)
        for block, outputs in zip(step.blocks, outcome.rows(step.blocks), strict=True):
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
