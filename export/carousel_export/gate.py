"""The parity gate: what the exported files say against what eager PyTorch says, under every policy of the bundle."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carousel_export.curve import lookahead_curve
from carousel_export.draw import Draw
from carousel_export.errors import ParityError
from carousel_export.policies import Carry, Full, Lookahead, Policy, to_json
from carousel_export.reference import Answer, Source, Stream
from carousel_export.replay import replay
from carousel_export.runtimes import OnnxRuntime, Runtime, TorchScript
from carousel_export.signature import Signature
from carousel_export.tolerance import TOLERANCE, allowed, largest

_LENGTHS = (1, 2, 9, 17, 26, 40)
# A long sequence, of which the last frames are run at once where the policy leaves it to the client: more than a server
# does by default.
_LONG = 640
_AT_ONCE = 520
_NOT_THE_MODEL = "the files are not this model, as where forward branches on values or mixes rows of the batch"
_LOOKAHEADS = (Lookahead(8, 8), Lookahead(1, 0), Lookahead(3, 5), Lookahead(5, 1))


@dataclass(frozen=True)
class Trial:
    """Streams that are run together under one policy."""

    what: str
    policy: Policy
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class Worst:
    """The element that is furthest off, in the sequence that is, measured by what is allowed there."""

    sequence: int
    frame: int
    element: list[int]
    wanted: float
    got: float


@dataclass(frozen=True)
class Check:
    """One output of one trial in one runtime.

    `share` is the error in the worst sequence as a share of what is allowed there, at most 1 where the gate passes.
    """

    policy: dict[str, str | int]
    runtime: str
    output: str
    sequences: int
    frames: int
    what: str
    max_abs_error: float
    mean_abs_error: float
    share: float
    worst: Worst


@dataclass
class Variant:
    """A variant on trial: what was found of it, and the largest finite value that was wanted of each output."""

    name: str
    runtime: Runtime
    # What was changed, in words.
    what: str
    checks: list[Check] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    def add(self, checks: Sequence[Check], wanted: Sequence[Answer], signature: Signature) -> None:
        """What one trial found."""
        self.checks += checks
        for i, port in enumerate(signature.outputs):
            peak = max(largest(answer.outputs[i]) for answer in wanted)
            self.peaks[port.name] = max(peak, self.peaks.get(port.name, 0.0))


def runtimes_of(folder: Path) -> tuple[Runtime, ...]:
    """Those that the gate asks for the files of an exported model."""
    return OnnxRuntime(folder), TorchScript(folder)


def prove(
    runtimes: Sequence[Runtime],
    reference: Source,
    draw: Draw,
    policies: Sequence[Policy],
    *,
    ragged: bool,
    variants: Sequence[Variant] = (),
) -> dict[str, Any]:
    """Run the gate; returns the content of parity.json. `variants` are tried beside, and not held to its tolerance.

    Raises `ParityError`, naming output, policy, runtime, sequence, frame, wanted and got, for the first trial in which
    an element is further from the reference's than `allowed` says.
    """
    started = time.monotonic()
    signature = reference.signature
    checks: list[Check] = []
    errors: list[dict[str, Any]] = []
    trials = _trials(signature, draw, policies, ragged=ragged)
    for trial in trials:
        wanted = [reference.run(stream, trial.policy) for stream in trial.streams]
        for runtime in runtimes:
            got = replay(runtime, signature, trial.streams, trial.policy, ragged=ragged)
            found = _compare(trial, runtime.name, signature, wanted, got)
            _judge(found)
            checks += found
            if len(trial.streams) == 1 and trial.streams[0].frames == _LONG:
                errors += _over_time(trial, runtime.name, signature, wanted[0], got[0])
        for variant in variants:
            got = replay(variant.runtime, signature, trial.streams, trial.policy, ragged=ragged)
            variant.add(_compare(trial, variant.runtime.name, signature, wanted, got), wanted, signature)
    curve = lookahead_curve(runtimes[0], signature, draw, ragged=ragged) if _looks_ahead(policies) else []
    return {
        "reference": reference.name,
        "tolerance": TOLERANCE,
        "maximum": max(check.max_abs_error for check in checks),
        "share": max(check.share for check in checks),
        "seconds": round(time.monotonic() - started, 2),
        "longest": [_longest(policy, trials) for policy in policies],
        "checks": [asdict(check) for check in checks],
        "error_over_time": errors,
        "lookahead_curve": curve,
    }


def _looks_ahead(policies: Sequence[Policy]) -> bool:
    return any(isinstance(policy, Lookahead) for policy in policies)


def _trials(signature: Signature, draw: Draw, policies: Sequence[Policy], *, ragged: bool) -> list[Trial]:
    trials = []
    for policy in policies:
        # Full starts where a sequence starts: at zero.
        state = not isinstance(policy, Full)
        start = "non-zero state" if state else "from zero"
        batch = "ragged batch" if ragged else "batches of one length each"
        what = f"{batch}, random cuts, {start}"
        variants: list[Policy] = [policy]
        if isinstance(policy, Lookahead):
            least = signature.right_context
            others = [Lookahead(each.block, each.ahead + least) for each in _LOOKAHEADS]
            variants += [variant for variant in others if variant != policy]
        elif isinstance(policy, Carry):
            variants += [variant for variant in (Carry(), Carry(4)) if variant != policy]
        for variant in variants:
            streams = tuple(draw.stream(frames, initial=state) for frames in _lengths(signature))
            trials.append(Trial(what, variant, streams))
        least = signature.least_frames
        short = "one frame" if least == 1 else f"{least} frames, the least"
        trials.append(Trial(f"one sequence of {short}, {start}", policy, (draw.stream(least, initial=state),)))
        long = draw.stream(_LONG, initial=state)
        long = replace(long, cuts=(*draw.cuts(_LONG - _AT_ONCE), _AT_ONCE))
        trials.append(Trial(f"one long sequence, {start}", policy, (long,)))
        if draw.given:
            cut = tuple(replace(s, cuts=draw.cuts(s.frames)) for s in draw.given)
            trials.append(Trial("given data, random cuts, from zero", policy, cut))
    return trials


def _lengths(signature: Signature) -> tuple[int, ...]:
    """From the least on; behind strides, with each remainder."""
    return tuple(sorted({*signature.lengths(_LENGTHS), *signature.lengths(range(1, signature.stride + 1))}))


def _longest(policy: Policy, trials: Sequence[Trial]) -> dict[str, Any]:
    """What was proven of a policy: the frames of the longest sequence, and of the longest call."""
    streams = [stream for trial in trials if trial.policy == policy for stream in trial.streams]
    pieces = [piece for stream in streams for piece in policy.pieces(stream.frames, stream.cuts)]
    return {
        "policy": to_json(policy),
        "sequence": max(stream.frames for stream in streams),
        "call": max(piece.block + piece.ahead for piece in pieces),
    }


def _compare(
    trial: Trial, runtime: str, signature: Signature, wanted: Sequence[Answer], got: Sequence[Answer]
) -> list[Check]:
    checks = []
    frames = sum(stream.frames for stream in trial.streams)
    outputs = [
        (port.name, port.timed, [a.outputs[i] for a in wanted], [a.outputs[i] for a in got])
        for i, port in enumerate(signature.outputs)
    ]
    states = [
        (state.output, False, [a.states[i] for a in wanted], [a.states[i] for a in got])
        for i, state in enumerate(signature.states)
    ]
    _check_extents(trial, signature, wanted)
    for name, timed, want, have in [*outputs, *states]:
        for a, b in zip(want, have, strict=True):
            if a.shape != b.shape:
                raise ParityError(
                    f"output {name!r} in {runtime} under {_words(to_json(trial.policy))} ({trial.what}) is "
                    f"{list(b.shape)}, eager PyTorch's is {list(a.shape)}; take sizes in forward from its inputs alone"
                )
        differences = [_difference(a, b) for a, b in zip(want, have, strict=True)]
        shares = [float(d.max()) / allowed(a) for d, a in zip(differences, want, strict=True)]
        sequence = shares.index(max(shares))
        at = [int(i) for i in torch.unravel_index(differences[sequence].argmax(), differences[sequence].shape)]
        worst = Worst(
            sequence=sequence,
            # A value for the sequence stands at its last frame.
            frame=at[0] if timed else trial.streams[sequence].frames - 1,
            element=at[1:] if timed else at,
            wanted=float(want[sequence][tuple(at)]),
            got=float(have[sequence][tuple(at)]),
        )
        flat = torch.cat([difference.flatten() for difference in differences])
        checks.append(
            Check(
                policy=to_json(trial.policy),
                runtime=runtime,
                output=name,
                sequences=len(trial.streams),
                frames=frames,
                what=trial.what,
                max_abs_error=float(flat.max()),
                mean_abs_error=float(flat.mean()),
                share=shares[sequence],
                worst=worst,
            )
        )
    return checks


def _check_extents(trial: Trial, signature: Signature, wanted: Sequence[Answer]) -> None:
    """Hold what the manifest says of the sizes of outputs to what eager PyTorch answers."""
    extents = {extent.name: extent for extent in signature.extents}
    for i, port in enumerate(signature.outputs):
        extent = next((extents[dim] for dim in port.dims if dim in extents), None)
        for stream, answer in zip(trial.streams, wanted, strict=True):
            if extent and extent.size(stream.frames) != len(answer.outputs[i]):
                raise ParityError(
                    f"output {port.name!r} has {len(answer.outputs[i])} entries for {stream.frames} frames, and "
                    f"{extent.size(stream.frames)} are expected; let each few frames, alike, give one"
                )


def _judge(checks: Sequence[Check]) -> None:
    for check in checks:
        # Written so that NaN fails.
        if not check.share <= 1:
            at = check.worst
            raise ParityError(
                f"output {check.output!r} in {check.runtime} under {_words(check.policy)} ({check.what}) is off by "
                f"{abs(at.wanted - at.got):.3g}, {check.share:.3g} times the tolerance: sequence {at.sequence}, frame "
                f"{at.frame}, element {at.element}: wanted {at.wanted:.7g}, got {at.got:.7g}; {_NOT_THE_MODEL}"
            )


def _words(policy: Mapping[str, str | int]) -> str:
    kind = str(policy["kind"]).removeprefix("POLICY_KIND_").lower()
    return f"{kind}({policy['block']}, {policy['ahead']})" if policy["block"] else kind


def _difference(wanted: Tensor, got: Tensor) -> Tensor:
    """Absolute, in float64; equal infinities differ by nothing, NaN by infinity."""
    a, b = wanted.double(), got.double()
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))


def _over_time(trial: Trial, runtime: str, signature: Signature, wanted: Answer, got: Answer) -> list[dict[str, Any]]:
    series = []
    for i, port in enumerate(signature.outputs):
        if port.timed:
            error = _difference(wanted.outputs[i], got.outputs[i]).reshape(_LONG, -1).amax(1)
            series.append(
                {
                    "policy": to_json(trial.policy),
                    "runtime": runtime,
                    "output": port.name,
                    "frame": list(range(len(error))),
                    "max_abs_error": error.tolist(),
                }
            )
    return series
