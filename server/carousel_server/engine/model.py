"""A model that is served: its graphs, its arena, its scheduler, and the turning of steps: schedule, run, commit."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Manifest, Policy
from carousel_server.config import Limits
from carousel_server.engine.arena import Arena
from carousel_server.engine.context import read_context, read_contexts
from carousel_server.engine.infer import InferRow, stack
from carousel_server.engine.policy import FULL, choose_blocking
from carousel_server.engine.runner import Outcome, Runner
from carousel_server.engine.runtime import RunError, Runtime
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Array, ModelSpec, describe
from carousel_server.engine.step import Step
from carousel_server.engine.variants import Variants
from carousel_server.errors import (
    ContextFullError,
    InputRejectedError,
    QueueFullError,
    StepError,
    TensorError,
    TooLargeError,
)

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


class Model:
    """One version of a model, loaded. Everything but a step's run belongs to one thread, the event loop's."""

    def __init__(
        self, manifest: Manifest, runtimes: Mapping[str, Runtime], limits: Limits, *, variant: str = "float32"
    ) -> None:
        """`variant` is what runs where none is asked for. Raises `LoadError` where the bundle has it not."""
        self.manifest = manifest
        self.spec = ModelSpec.read(manifest)
        self.counters = Counters()
        self.open_sessions = 0
        # Told of each session that closed by itself after a step.
        self.on_closed: Callable[[Session], None] = lambda _: None
        self._limits = limits
        self.variants = Variants.read(manifest, runtimes, default=variant)
        self._arena = Arena(self.spec.states, limits.max_sessions)
        self._scheduler = Scheduler(max_batch=limits.max_batch, ragged=self.spec.ragged)
        self._runner = Runner(self.spec, runtimes, self._arena)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"run-{self.name}")
        self._ready = asyncio.Event()
        self._in_step: Step | None = None
        self._infer_rows = 0
        # Held by open sessions.
        self._context_bytes = 0

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    # Sessions

    def open(
        self,
        session_id: str,
        policy: Policy | None,
        initial_state: dict[str, Array],
        context: dict[str, Array],
        *,
        variant: str = "",
    ) -> Session:
        """A session at its beginning.

        Raises `PolicyError`, `VariantError`, `TensorError`, `TooManySessionsError`, `ContextFullError`.
        """
        blocking = choose_blocking(policy, self.manifest, max_block=self._limits.max_chunk_frames)
        chosen = self.variants.choose(variant)
        self._check_state(initial_state)
        given, outputs = read_context(self.spec, context, f"session {session_id}")
        if self._context_bytes + given.bytes > self._limits.max_context_bytes:
            raise ContextFullError(
                f"the contexts of {self.name}'s sessions would hold {self._context_bytes + given.bytes} bytes and "
                f"{self._limits.max_context_bytes} are allowed; close some sessions, or try later",
                retry_after_s=1.0,
            )
        slot = self._arena.take()
        if initial_state:
            zeros = self._arena.read(slot)
            rows = zip(self.spec.states, zeros, strict=True)
            self._arena.write(slot, [initial_state.get(state.input, zero) for state, zero in rows])
        self.open_sessions += 1
        self._context_bytes += given.bytes
        return Session(
            session_id,
            outputs,
            blocking,
            graph=self.variants.graph(chosen, blocking.kind),
            variant=chosen,
            slot=slot,
            limits=self._limits,
            context=given,
        )

    def _check_state(self, initial_state: dict[str, Array]) -> None:
        rows = {state.input: state for state in self.spec.states}
        for name, array in initial_state.items():
            if name not in rows:
                raise TensorError(f"{self.name} has no state {name!r}; it has {', '.join(rows)}", tensor=name)
            if (array.dtype, array.shape) != (rows[name].dtype, rows[name].row) or not np.isfinite(array).all():
                raise TensorError(
                    f"initial state {name!r} is {describe(array.dtype, array.shape)}; "
                    f"wanted finite {describe(rows[name].dtype, rows[name].row)}",
                    tensor=name,
                )

    def submit(self, session: Session, index: int, tensors: dict[str, Array], *, end: bool) -> None:
        """Give a session its next chunk, `[frames, …]` by input name.

        Raises `TensorError`, and what `Session.accept` raises; then nothing was taken.
        """
        frames = self.spec.check_chunk(
            tensors,
            end=end,
            where=f"chunk {index} of session {session.id}",
            max_frames=self._limits.max_chunk_frames,
        )
        arrays = tuple(tensors[port.name] for port in self.spec.inputs) if frames else ()
        session.accept(index, arrays, frames, end=end)
        self._queue(session)

    def release(self, session: Session) -> None:
        """Take back a session's row; if a step holds it, once the step is over."""
        session.drop()
        if self._in_step is None or all(block.owner is not session for block in self._in_step.blocks):
            self._forget(session)

    def _forget(self, session: Session) -> None:
        self._arena.give_back(session.slot)
        self.open_sessions -= 1
        self._context_bytes -= session.context.bytes

    # Whole sequences

    async def infer(
        self, tensors: dict[str, Array], lengths: NDArray[np.int32] | None, *, variant: str = ""
    ) -> dict[str, Array]:
        """Outputs `[batch, time, …]` for inputs `[batch, time, …]`, each row run from zero over its length.

        `tensors` has the contexts, `[batch, …]`, beside the inputs.

        Raises `VariantError`, `TensorError`, `TooLargeError`, `QueueFullError`, `InputRejectedError`, `StepError`.
        """
        where = "the request"
        graph = self.variants.graph(self.variants.choose(variant), FULL)
        self.spec.check_names(tensors, where, (*self.spec.inputs, *self.spec.contexts))
        for port in self.spec.inputs:
            port.check(tensors[port.name], where, ("batch", "time"))
        shapes = {tensors[port.name].shape[:2] for port in self.spec.inputs}
        if len(shapes) > 1:
            raise TensorError(f"the tensors differ in batch and time: {sorted(shapes)}; send the same for each")
        batch, time = shapes.pop()
        contexts, outputs = read_contexts(
            self.spec, {port.name: tensors[port.name] for port in self.spec.contexts}, batch
        )
        lengths = np.full(batch, time, np.int32) if lengths is None else lengths
        if batch < 1 or len(lengths) != batch or lengths.min() < 1 or lengths.max() > time:
            raise TensorError(f"wanted one length from 1 to {time} for each of the {batch} rows, and at least one row")
        if time > self._limits.max_chunk_frames:
            raise TooLargeError(
                f"{time} frames are more than the {self._limits.max_chunk_frames} allowed; use a session"
            )
        if self._infer_rows + batch > self._limits.max_pending_rows:
            raise QueueFullError(f"{self._infer_rows} rows are waiting; try again", retry_after_s=0.1)
        loop = asyncio.get_running_loop()
        done: list[asyncio.Future[tuple[bytes, ...]]] = [loop.create_future() for _ in range(batch)]
        self._infer_rows += batch
        try:
            for position, future in enumerate(done):
                row = tuple(tensors[port.name][position] for port in self.spec.inputs)
                self._queue(InferRow(graph, row, contexts[position], int(lengths[position]), future))
            answers = await asyncio.gather(*done, return_exceptions=True)
        finally:
            self._infer_rows -= batch
            for future in done:
                future.cancel()
        rows = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            rows.append(answer)
        return stack(outputs, lengths, time, rows)

    # Steps

    def _queue(self, owner: Session | InferRow) -> None:
        if owner.due:
            self._scheduler.add(owner)
            self._ready.set()

    async def turn_forever(self) -> None:
        """Run steps as long as there are any, off the event loop; wait where there are none."""
        loop = asyncio.get_running_loop()
        while True:
            await self._ready.wait()
            if (step := self._schedule()) is None:
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

    def _schedule(self) -> Step | None:
        self._in_step = self._scheduler.schedule()
        return self._in_step

    def _run(self, step: Step) -> list[tuple[Step, Outcome | RunError]]:
        """The step's outcome, or those of its rows run alone where the batch failed."""
        started = perf_counter()
        try:
            return [(step, self._runner.run(step))]
        except RunError as error:
            if len(step.blocks) == 1:
                return [(step, error)]
        except Exception as error:  # a fault of ours must not stop the turning for everybody
            log.exception("a step of %s failed", self.name)
            if len(step.blocks) == 1:
                return [(step, RunError(f"{type(error).__name__}, see the server's log", rejected=False))]
        finally:
            self.counters.run_seconds += perf_counter() - started
        return [outcome for block in step.blocks for outcome in self._run(Step(step.graph, [block]))]

    def _commit(self, step: Step, outcomes: list[tuple[Step, Outcome | RunError]]) -> None:
        """Publish what succeeded; what failed leaves its owner where it was."""
        self._in_step = None
        for part, outcome in outcomes:
            if isinstance(outcome, RunError):
                self._refuse(part, outcome)
            else:
                self._publish(part, outcome)
        self._scheduler.finish(step)
        for block in step.blocks:
            if isinstance(block.owner, Session) and block.owner.closed:
                self._forget(block.owner)
                self.on_closed(block.owner)
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
        for position, block in enumerate(step.blocks):
            if not block.owner.closed:
                block.owner.commit(block.frames, self._runner.split(outcome, position, block))

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

    def shut(self) -> None:
        """Wait for the running step; no other may follow."""
        self._thread.shutdown()
