"""A model that is served: its graphs, its arena, its sessions and its steps."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Manifest, Policy
from carousel_server.config import Limits
from carousel_server.engine.arena import Arena
from carousel_server.engine.context import read_context
from carousel_server.engine.infer import Infer
from carousel_server.engine.policy import FULL, choose_blocking
from carousel_server.engine.runner import Runner
from carousel_server.engine.runtime import Runtime
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Array, ModelSpec, describe
from carousel_server.engine.step import Runnable
from carousel_server.engine.steps import Steps
from carousel_server.engine.variants import Variants
from carousel_server.errors import (
    ContextFullError,
    TensorError,
)


class Model:
    """One version of a model, loaded: what its sessions and requests share."""

    def __init__(
        self, manifest: Manifest, runtimes: Mapping[str, Runtime], limits: Limits, *, variant: str = "float32"
    ) -> None:
        """`variant` is what runs where none is asked for. Raises `LoadError` where the bundle has it not."""
        self.manifest = manifest
        self.spec = ModelSpec.read(manifest)
        self.open_sessions = 0
        # Told of each session that closed by itself after a step.
        self.on_closed: Callable[[Session], None] = lambda _: None
        self._limits = limits
        self.variants = Variants.read(manifest, runtimes, default=variant)
        self._arena = Arena(self.spec.states, limits.max_sessions)
        scheduler = Scheduler(max_batch=limits.max_batch, max_frames=limits.max_step_frames, ragged=self.spec.ragged)
        runner = Runner(self.spec, runtimes, self._arena)
        self.steps = Steps(self.name, scheduler, runner, self._arena, self._closed)
        self._infer = Infer(self.spec, self.steps, limits)
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
        owner: str = "",
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
            rows = zip(self.spec.states, self._arena.read(slot), strict=True)
            self._arena.write(slot, [initial_state.get(state.input, start) for state, start in rows])
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
            owner=owner,
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
        self._arena.give_back(session.slot)
        self.open_sessions -= 1
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
