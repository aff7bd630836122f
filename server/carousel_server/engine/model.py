"""A model that is served: its graphs, its arena, its sessions and its steps."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Manifest, Policy
from carousel_protos.v1.state_pb2 import SessionState
from carousel_server.config import Limits
from carousel_server.engine.budget import Budget
from carousel_server.engine.context import Context, read_context
from carousel_server.engine.drawn import full_step
from carousel_server.engine.infer import Infer
from carousel_server.engine.policy import FULL, Blocking, choose_blocking
from carousel_server.engine.portable import unseal
from carousel_server.engine.runner import Runner
from carousel_server.engine.runtime import Runtime
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.session import Session
from carousel_server.engine.snapshot import Snapshots, signature
from carousel_server.engine.spec import Array, ModelSpec, Port, frame_bytes
from carousel_server.engine.step import Runnable
from carousel_server.engine.steps import Steps
from carousel_server.engine.variants import Variants
from carousel_server.errors import ContextFullError


class Model:
    """One version of a model, loaded: what its sessions and requests share."""

    def __init__(
        self,
        manifest: Manifest,
        runtimes: Mapping[str, Runtime],
        limits: Limits,
        *,
        variant: str = "float32",
        budget: Budget | None = None,
        runners: int = 1,
    ) -> None:
        """`variant` is what runs where none is asked for; the budget is its own where it shares none.

        `runners` steps run at once where the runtimes let calls overlap.

        Raises `LoadError` where the bundle has no such variant.
        """
        self.manifest = manifest
        self.spec = ModelSpec.read(manifest)
        self.signature = signature(manifest)
        self.open_sessions = 0
        # Told of each session that closed by itself after a step.
        self.on_closed: Callable[[Session], None] = lambda _: None
        self._limits = limits
        self.variants = Variants.read(manifest, runtimes, default=variant)
        self._runtimes = runtimes
        # The graphs of a bundle run in one place.
        self._arena = next(iter(runtimes.values())).make_arena(self.spec.states, limits.max_sessions)
        scheduler = Scheduler(max_batch=limits.max_batch, max_frames=limits.max_step_frames, ragged=self.spec.ragged)
        runner = Runner(self.spec, runtimes, self._arena)
        overlap = runners if all(runtime.parallel for runtime in runtimes.values()) else 1
        self.steps = Steps(self.name, scheduler, runner, self._arena, self._closed, runners=overlap)
        self._snapshots = Snapshots(manifest, self.spec, self.variants, limits)
        self._budget = Budget(limits.max_pending_bytes) if budget is None else budget
        self._infer = Infer(self.spec, self.steps, limits, self._budget)
        # Held by open sessions, and how many hold each.
        self._context_bytes = 0
        self._contexts: Counter[int] = Counter()

    def warm_up(self) -> None:
        """Run each graph once at every size of batch that a device would take its time for the first time."""
        for batch in self._arena.buckets(self._limits.max_batch):
            start = self._arena.gather(np.zeros(batch, np.intp))
            states = {state.input: rows for state, rows in zip(self.spec.states, start, strict=True)}
            for runtime in self._runtimes.values():
                runtime.run(full_step(self.spec, runtime.inputs, batch) | states)

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
        owner: str = "",
    ) -> Session:
        """A session at its beginning.

        Raises `PolicyError`, `VariantError`, `TensorError`, `TooManySessionsError`, `ContextFullError`.
        """
        blocking = choose_blocking(policy, self.manifest, max_block=self._limits.max_chunk_frames)
        chosen = self.variants.choose(variant)
        where = f"session {session_id}"
        self.spec.check_states(initial_state, where)
        given, outputs = read_context(self.spec, context, where)
        session = self._admit(session_id, outputs, blocking, chosen, given, owner)
        if initial_state:
            rows = zip(self.spec.states, self._arena.read(session.slot), strict=True)
            self._arena.write(session.slot, [initial_state.get(state.input, start) for state, start in rows])
        return session

    def snapshot(self, session: Session) -> bytes:
        """A session's state as of the chunk that it answered last, sealed, whatever waits or runs meanwhile."""
        return self._snapshots.write(session, self._rows(session))

    def restore(self, session_id: str, state: SessionState, *, owner: str = "", move: bool = False) -> Session:
        """A session that goes on from a state, and is a branch where its id is another.

        Raises what `Snapshots.read` and `open` raise.
        """
        found = self._snapshots.read(state, session_id, move=move)
        session = self._admit(session_id, found.outputs, found.blocking, found.variant, found.context, owner)
        self._arena.write(session.slot, found.rows)
        session.take_place(found.place if session_id == state.session_id else found.place.branch())
        return session

    def fork(self, session: Session, session_id: str) -> Session:
        """A second session that goes on from the chunk that this one answered last. Raises what `open` raises."""
        rows = self._rows(session)
        branch = self._admit(
            session_id, session.outputs, session.blocking, session.variant, session.context, session.owner
        )
        self._arena.write(branch.slot, rows)
        branch.take_place(session.place.branch())
        return branch

    def take(self, session: Session, source: "Model") -> None:
        """Have a session of another version from now on, as if its state were put here; it is between two chunks.

        Raises what `Snapshots.read` and `open` raise; then it is where it was.
        """
        found = self._snapshots.read(unseal(source.snapshot(session)), session.id, move=True)
        graph = self.variants.graph(found.variant, found.blocking.kind)
        slot = self._take_row(session.context)
        self._arena.write(slot, found.rows)
        source._give_row_back(session)  # noqa: SLF001 -- of this class
        session.move(graph, slot, found.outputs, self.spec.least_frames)

    def _rows(self, session: Session) -> list[Array]:
        """The state after the chunk that the session answered last."""
        return self._arena.read(session.slot) if session.rollback is None else session.rollback

    def _admit(
        self, session_id: str, outputs: Sequence[Port], blocking: Blocking, variant: str, context: Context, owner: str
    ) -> Session:
        """A session with a row of its own, at the model's start. Raises `TooManySessionsError`, `ContextFullError`."""
        graph = self.variants.graph(variant, blocking.kind)
        return Session(
            session_id,
            outputs,
            blocking,
            graph=graph,
            variant=variant,
            slot=self._take_row(context),
            limits=self._limits,
            budget=self._budget,
            frame_bytes=frame_bytes((*self.spec.inputs, *outputs)),
            context=context,
            owner=owner,
            least_frames=self.spec.least_frames,
        )

    def _take_row(self, context: Context) -> int:
        # Branches share one.
        held = self._context_bytes + (0 if id(context) in self._contexts else context.bytes)
        if held > self._limits.max_context_bytes:
            raise ContextFullError(
                f"the contexts of {self.name}'s sessions would hold {held} bytes and "
                f"{self._limits.max_context_bytes} are allowed; close some sessions, or try later",
                retry_after_s=1.0,
            )
        slot = self._arena.take()
        self.open_sessions += 1
        self._context_bytes = held
        self._contexts[id(context)] += 1
        return slot

    def submit(
        self, session: Session, index: int, tensors: dict[str, Array], *, end: bool, acknowledged: int | None = None
    ) -> None:
        """Give a session its next chunk, `[frames, …]` by input name; those of one that is repeated are not looked at.

        Raises `TensorError`, and what `Session.accept` raises; then nothing was taken.
        """
        frames, arrays = 0, tuple[Array, ...]()
        if index == session.next_index:
            frames = self.spec.check_chunk(
                tensors,
                end=end,
                where=f"chunk {index} of session {session.id}",
                max_frames=self._limits.max_chunk_frames,
            )
            arrays = tuple(tensors[port.name] for port in self.spec.inputs) if frames else ()
        session.accept(index, arrays, frames, end=end, acknowledged=acknowledged)
        self.steps.add(session)

    def release(self, session: Session) -> None:
        """Take back a session's row; if a step holds it, once the step is over."""
        session.drop()
        if not self.steps.holds(session):
            self._forget(session)

    def withdraw(self, session: Session) -> None:
        """Nobody waits for a session's answers: what no step has begun is forgotten, as if it had not come."""
        session.withdraw(running=self.steps.holds(session))

    def _closed(self, owner: Runnable) -> None:
        if isinstance(owner, Session):
            self._forget(owner)
            self.on_closed(owner)

    def _forget(self, session: Session) -> None:
        session.let_go()
        self._give_row_back(session)

    def _give_row_back(self, session: Session) -> None:
        self._arena.give_back(session.slot)
        self.open_sessions -= 1
        self._contexts[id(session.context)] -= 1
        if not self._contexts[id(session.context)]:
            del self._contexts[id(session.context)]
            self._context_bytes -= session.context.bytes

    async def infer(
        self, tensors: dict[str, Array], lengths: NDArray[np.int32] | None, *, variant: str = ""
    ) -> dict[str, Array]:
        """Outputs `[batch, time, …]` for whole sequences `[batch, time, …]`; see `Infer.run`."""
        return await self._infer.run(tensors, lengths, self.variants.graph(self.variants.choose(variant), FULL))

    @property
    def infer_rows(self) -> int:
        """Rows of Infer requests that wait for their answer."""
        return self._infer.waiting
