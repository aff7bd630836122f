"""A session's state as a message and back: what is kept, what is moved, and what is refused."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from carousel_protos.v1.carousel_pb2 import Result as ResultMessage
from carousel_protos.v1.carousel_pb2 import Tensor
from carousel_protos.v1.manifest_pb2 import Manifest, Policy, StateSpec, TensorSpec
from carousel_protos.v1.state_pb2 import SessionState
from carousel_server.config import Limits
from carousel_server.engine.codec import decode, fill_result
from carousel_server.engine.context import Context, read_context
from carousel_server.engine.events import Result
from carousel_server.engine.frames import Piece
from carousel_server.engine.place import MOST_NAME, Place
from carousel_server.engine.policy import Blocking, choose_blocking
from carousel_server.engine.portable import FORMAT, seal
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Array, ModelSpec, Port, describe, wire_dtype
from carousel_server.engine.variants import Variants
from carousel_server.errors import (
    ModelDiffersError,
    PolicyError,
    SignatureDiffersError,
    StateDamagedError,
    shorten,
)

# No count of a session comes near, and one more still fits into its field.
_MOST = 2**62


def model_sha256(manifest: Manifest, variant: str) -> str:
    """Of the graphs that compute a variant: sessions whose models agree in it get the same bits."""
    digests = {file.path: file.sha256 for file in manifest.files}
    graphs = dict.fromkeys(graph.file for graph in manifest.graphs if graph.variant == variant)
    return sha256("\n".join(digests[file] for file in graphs).encode()).hexdigest()


def signature(manifest: Manifest) -> str:
    """Of the tensors by which a state has its meaning: a session can move between models that agree in it."""

    def tensors(specs: Iterable[TensorSpec]) -> list[object]:
        return [[spec.name, spec.dtype, list(spec.dims)] for spec in specs]

    def states(specs: Iterable[StateSpec]) -> list[object]:
        return [[spec.input, spec.output, spec.dtype, list(spec.dims)] for spec in specs]

    parts = [tensors(manifest.inputs), tensors(manifest.outputs), tensors(manifest.contexts), states(manifest.states)]
    return sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Restored:
    """A state that fits a model: what a new session of it needs."""

    blocking: Blocking
    variant: str
    # One `[layers × directions, size]` for each state, in the spec's order.
    rows: list[Array]
    context: Context
    # With their sizes in this context.
    outputs: tuple[Port, ...]
    place: Place


class Snapshots:
    """Writes and reads the states of one model's sessions."""

    def __init__(self, manifest: Manifest, spec: ModelSpec, variants: Variants, limits: Limits) -> None:
        self._manifest = manifest
        self._spec = spec
        self._variants = variants
        self._limits = limits
        # What is the same in every state of a variant.
        self._heads = {
            variant: SessionState(
                format=FORMAT,
                model=manifest.name,
                version=manifest.version,
                model_sha256=model_sha256(manifest, variant),
                signature=signature(manifest),
                variant=variant,
            )
            for variant in variants.tolerances
        }

    def write(self, session: Session, rows: Sequence[Array]) -> bytes:
        """The session as of the chunk that it answered last, sealed; `rows` is its state there."""
        place = session.place
        state = SessionState()
        state.CopyFrom(self._heads[session.variant])
        state.session_id = session.id
        state.owner = session.owner
        policy = session.blocking
        state.policy.kind, state.policy.block, state.policy.ahead = policy.kind, policy.block, policy.ahead
        state.next_index = place.next_index
        state.answered = place.answered
        state.ended = place.ended
        for spec, row in zip(self._spec.states, rows, strict=True):
            _add(state.states.add, spec.input, row)
        for port, array in zip(self._spec.contexts, session.context.arrays, strict=True):
            _add(state.context.add, port.name, array)
        if place.waiting:
            for position, port in enumerate(self._spec.inputs):
                _add(state.waiting.add, port.name, _joined(place.waiting, position))
        for result in place.results:
            message = state.results.add()
            fill_result(message, result, session.outputs)
            message.ClearField("session_id")
        for port, value in zip(session.outputs, place.values, strict=True):
            if value is not None and not port.per_frame:
                state.values.add(
                    name=port.name, dtype=wire_dtype(port.dtype), shape=port.shape(place.answered), data=value
                )
        if place.acknowledged is not None:
            state.acknowledged = place.acknowledged
        state.epoch = place.epoch
        state.holder = place.holder
        return seal(state)

    def read(self, state: SessionState, session_id: str, *, move: bool) -> Restored:
        """A state that `unseal` gave, for a session of this model; with `move`, from a model that computes otherwise.

        Raises `SignatureDiffersError`, `VariantError`, `ModelDiffersError`, `PolicyError`, `TensorError`,
        `TooLargeError` and `StateDamagedError`.
        """
        variant = self._variants.choose(state.variant)
        self._check_model(state, variant, move=move)
        blocking = self._blocking(state.policy)
        where = f"the state of session {shorten(session_id)}"
        rows = decode(state.states, ())
        self._spec.check_states(rows, where)
        if lacking := [spec.input for spec in self._spec.states if spec.input not in rows]:
            raise _wrong(where, f"lacks the states {', '.join(lacking)}")
        context, outputs = read_context(self._spec, decode(state.context, ()), where)
        place = Place(
            state.next_index,
            state.answered,
            state.ended,
            self._waiting(state, where),
            tuple(_result(message, session_id, outputs, where) for message in state.results),
            _data(decode(state.values, ()), outputs, state.answered, where, timed=False),
            state.acknowledged if state.HasField("acknowledged") else None,
            state.epoch,
            state.holder,
        )
        _check_place(place, blocking, where)
        ordered = [rows[spec.input] for spec in self._spec.states]
        return Restored(blocking, variant, ordered, context, outputs, place)

    def _check_model(self, state: SessionState, variant: str, *, move: bool) -> None:
        here = f"version {self._manifest.version} of {self._manifest.name}"
        there = f"version {shorten(state.version)!r} of {shorten(state.model)!r}"
        head = self._heads[variant]
        if state.signature != head.signature:
            raise SignatureDiffersError(
                f"the state is of {there}, whose tensors are not those of {here}; open a new session there"
            )
        if state.model_sha256 != head.model_sha256 and not move:
            raise ModelDiffersError(
                f"the state is of {there}, and {here} does not compute the same (its graphs' sha256 differs); serve "
                "that version, or ask for the state to be moved"
            )

    def _blocking(self, policy: Policy) -> Blocking:
        asked = Blocking(policy.kind, policy.block, policy.ahead)
        chosen = choose_blocking(policy, self._manifest, max_block=self._limits.max_chunk_frames)
        if chosen != asked:
            raise PolicyError(f"{self._manifest.name} runs {chosen} where the state has {asked}; open a new session")
        return chosen

    def _waiting(self, state: SessionState, where: str) -> list[Piece]:
        if not state.waiting:
            return []
        tensors = decode(state.waiting, ())
        most = self._limits.max_buffered_frames
        frames = self._spec.check_chunk(tensors, end=False, where=f"the frames waiting in {where}", max_frames=most)
        return [(tuple(tensors[port.name] for port in self._spec.inputs), 0, frames)]


def _add(add: Callable[..., Tensor], name: str, array: Array) -> None:
    add(name=name, dtype=wire_dtype(array.dtype), shape=array.shape, data=array.tobytes())


def _joined(pieces: list[Piece], position: int) -> Array:
    """All frames of an input, `[frames, …]`."""
    parts = [arrays[position][start:stop] for arrays, start, stop in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _result(message: ResultMessage, session_id: str, outputs: tuple[Port, ...], where: str) -> Result:
    data = _data(decode(message.tensors, ()), outputs, message.frames, where)
    return Result(session_id, message.index, message.first_frame, message.frames, data)


def _data(
    tensors: Mapping[str, Array], outputs: tuple[Port, ...], frames: int, where: str, *, timed: bool = True
) -> tuple[bytes | None, ...]:
    """The bytes of each output as `Result` has them; without `timed`, of those with one value a sequence alone."""
    ports = [port for port in outputs if timed or not port.per_frame]
    for port in ports:
        wanted = port.shape(frames)
        array = tensors.get(port.name)
        if (array is None and port.per_frame) or (
            array is not None and (array.dtype, array.shape) != (port.dtype, wanted)
        ):
            raise _wrong(where, f"lacks output {port.name!r} as {describe(port.dtype, wanted)}")
    if unknown := sorted(tensors.keys() - {port.name for port in ports}):
        raise _wrong(where, f"has outputs that the model has not: {shorten(str(unknown))}")
    return tuple(tensors[port.name].tobytes() if port.name in tensors else None for port in outputs)


def _check_place(place: Place, blocking: Blocking, where: str) -> None:
    """Raise `StateDamagedError` for a place where no session can be."""
    if max(place.next_index, place.answered, place.epoch) > _MOST:
        raise _wrong(where, f"has counts over {_MOST}")
    if len(place.holder) > MOST_NAME:
        raise _wrong(where, f"names a holder of {len(place.holder)} characters")
    waiting = sum(stop - start for _, start, stop in place.waiting)
    final = blocking.final(place.answered + waiting, ended=place.ended)
    if final != place.answered:
        raise _wrong(where, f"has {place.answered} frames answered where {blocking} has {final}")
    indices = [result.index for result in place.results]
    if indices != list(range(place.next_index - len(indices), place.next_index)):
        raise _wrong(where, f"expects chunk {place.next_index} and keeps the answers to {indices}")
    ends = [result.first_frame + result.frames for result in place.results]
    starts = [result.first_frame for result in place.results[1:]] + [place.answered]
    if place.results and ends != starts:
        raise _wrong(where, "keeps answers that do not follow each other")


def _wrong(where: str, what: str) -> StateDamagedError:
    return StateDamagedError(f"{where} {what}; send what GetState or `carousel sessions export` gave")
