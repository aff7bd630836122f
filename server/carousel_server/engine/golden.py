"""Golden vectors: what the eager model answered at export, replayed through the whole engine on this host."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import json_format
from safetensors import SafetensorError, safe_open

from carousel_protos import Bundle
from carousel_protos.v1.manifest_pb2 import Policy
from carousel_server.config import Limits
from carousel_server.engine.events import Event, Failure, Result
from carousel_server.engine.model import Model
from carousel_server.engine.runtime import Runtime
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Array, Port
from carousel_server.errors import LoadError

FILE = "golden.safetensors"


@dataclass(frozen=True)
class Replayed:
    """One output of one case. `max_abs_error` is over all its sequences and frames."""

    policy: str
    output: str
    frames: int
    max_abs_error: float
    tolerance: float
    ok: bool
    variant: str = "float32"


@dataclass
class _Stream:
    """A golden sequence on its way through the engine."""

    session: Session
    tensors: dict[str, Array]
    frames: int
    wanted: dict[str, Array]
    results: list[Result]
    sent: int = 0
    chunks: int = 0

    def deliver(self, event: Event) -> None:
        if isinstance(event, Failure):
            raise LoadError(f"golden sequence failed: {event.error}")
        if isinstance(event, Result):
            self.results.append(event)


def replay(bundle: Bundle, runtimes: Mapping[str, Runtime], *, seed: int = 0) -> list[Replayed]:
    """Stream every golden case through an engine in chunks of random size, all its sequences at once.

    Every variant that is loaded is held to its own tolerance. Raises `LoadError` where the golden file cannot be read,
    lacks an output of a sequence, or a sequence fails; a deviation is in the answer.
    """
    model = Model(bundle.manifest, runtimes, Limits())
    try:
        with safe_open(bundle.file(FILE), framework="numpy") as golden:
            cases = json.loads((golden.metadata() or {}).get("cases", "[]"))
            tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, OSError) as error:
        raise LoadError(f"{FILE} of {model.name} cannot be read: {error}; export the model again") from error
    if not cases:
        raise LoadError(f"{FILE} of {model.name} holds no cases; export the model again")
    cuts = np.random.default_rng(seed)
    try:
        return [
            checked
            for variant in model.variants.tolerances
            for case in cases
            for checked in _replay_case(model, case, tensors, cuts, variant)
        ]
    finally:
        model.steps.shut()


def _replay_case(
    model: Model, case: dict[str, Any], tensors: dict[str, Array], cuts: np.random.Generator, variant: str
) -> list[Replayed]:
    policy = json_format.ParseDict(case["policy"], Policy())
    streams = []
    for number in range(case["sequences"]):
        prefix = f"{case['name']}/{number}/"
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        inputs, initial, context, wanted = (
            {key.removeprefix(kind): value for key, value in parts.items() if key.startswith(kind)}
            for kind in ("in/", "initial/", "context/", "out/")
        )
        if lacking := [port.name for port in model.spec.outputs if port.name not in wanted]:
            raise LoadError(
                f"{FILE} of {model.name} lacks output {lacking[0]!r} of {prefix.rstrip('/')}; export the model again"
            )
        session = model.open(f"golden-{prefix}", policy, initial, context, variant=variant)
        session.sink = _Stream(session, inputs, len(next(iter(inputs.values()))), wanted, [])
        streams.append(session.sink)
    longest = max(stream.frames for stream in streams)
    live = list(streams)
    while live:
        for stream in live:
            size = int(cuts.integers(1, max(2, longest // 3) + 1))
            chunk = {name: array[stream.sent : stream.sent + size] for name, array in stream.tensors.items()}
            stream.sent = min(stream.frames, stream.sent + size)
            model.submit(stream.session, stream.chunks, chunk, end=stream.sent == stream.frames)
            stream.chunks += 1
        while model.steps.turn():
            pass
        live = [stream for stream in live if stream.sent < stream.frames]
    for stream in streams:
        model.release(stream.session)
    blocking = str(streams[0].session.blocking)
    # Other arithmetic may well choose another class or path: of a variant, only numbers have a tolerance.
    compared = [port for port in model.spec.outputs if variant == "float32" or port.dtype.kind == "f"]
    return [_compare(model, blocking, port, streams, variant) for port in compared]


def _compare(model: Model, policy: str, port: Port, streams: list[_Stream], variant: str) -> Replayed:
    allowed, output = model.variants.tolerances[variant], port.name
    worst, within, frames = 0.0, True, 0
    for stream in streams:
        answers = [result.arrays(stream.session.outputs) for result in stream.results]
        values = [answer[output] for answer in answers if output in answer]
        got, wanted = np.concatenate(values) if port.per_frame else values[-1], stream.wanted[output]
        if got.shape != wanted.shape:
            raise LoadError(f"{policy}: {output!r} has shape {got.shape}, the eager model gave {wanted.shape}")
        error = float(np.abs(got.astype(np.float64) - wanted).max())
        frames += stream.frames
        worst = max(worst, error)
        within &= error <= max(allowed.absolute, allowed.relative * float(np.abs(wanted).max()))
    return Replayed(policy, output, frames, worst, allowed.absolute, within, variant)
