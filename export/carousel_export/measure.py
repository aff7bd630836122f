"""What a variant costs and gains: its error against the reference, its size, and its speed beside float32."""

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from carousel_export.draw import Draw
from carousel_export.errors import ModelError, ParityError
from carousel_export.gate import Check, Variant
from carousel_export.graph import LOOKAHEAD, MODEL
from carousel_export.policies import Policy
from carousel_export.replay import replay
from carousel_export.runtimes import OnnxRuntime, Runtime
from carousel_export.signature import Signature
from carousel_export.tolerance import TOLERANCE
from carousel_export.variants import FLOAT32, variant_file, write_variant
from carousel_protos.v1 import manifest_pb2 as pb

log = logging.getLogger(__name__)

# An error of a tenth of the largest value that an output has: more is another model.
BOUND = 0.1
# The gate's largest error, with room for batches that it did not try.
_ROOM = 2.0
_STREAMS, _FRAMES, _ROUNDS = 8, 32, 15


def start_variants(folder: Path, variants: Sequence[str]) -> tuple[Variant, ...]:
    """Write the graphs in `folder` in each variant, for the gate to try. Raises `GraphError`."""
    files = [file for file in (MODEL, LOOKAHEAD) if (folder / file).exists()]
    started = []
    for name in variants:
        what = "; ".join(f"{file}: {write_variant(folder, file, name)}" for file in files)
        log.info("%s, %s", name, what)
        started.append(Variant(name, OnnxRuntime(folder, name), what))
    return tuple(started)


def measure_variants(
    folder: Path, tried: Sequence[Variant], draw: Draw, default: Policy, manifest: pb.Manifest, *, bound: float
) -> list[dict[str, Any]]:
    """What parity.json says of variants that the gate has tried; their graphs are added to the manifest.

    Raises as `_summarise`.
    """
    graphs = list(manifest.graphs)
    files = [graph.file for graph in graphs]
    entries = []
    for variant in tried:
        entry = _summarise(variant, draw.signature, bound=bound)
        entry |= {"bytes": _bytes(folder, files, variant.name), "bytes_float32": _bytes(folder, files, FLOAT32)}
        entry |= _compare_speed(OnnxRuntime(folder), variant.runtime, draw, default)
        tolerance = pb.Tolerance(absolute=entry["tolerance"], relative=entry["tolerance"])
        for graph in graphs:
            file = variant_file(graph.file, variant.name)
            manifest.graphs.append(
                pb.Graph(file=file, policies=graph.policies, variant=variant.name, tolerance=tolerance)
            )
        entries.append(entry)
    return entries


def _summarise(variant: Variant, signature: Signature, *, bound: float) -> dict[str, Any]:
    """A variant's tolerance, and its errors by policy and output.

    Outputs that are not floating point, such as chosen classes, are left out. Raises `ModelError` where the model has
    no other, `ParityError` where an error is over `bound` times the peak.
    """
    floats = {port.name for port in signature.outputs if port.dtype.is_floating_point}
    if not floats:
        raise ModelError("no output of the model is floating point, by which a variant could be measured; export none")
    groups: dict[tuple[tuple[tuple[str, str | int], ...], str], list[Check]] = defaultdict(list)
    checks = [check for check in variant.checks if check.output in floats]
    relative = dict.fromkeys(floats, 0.0)
    for check in checks:
        groups[tuple(check.policy.items()), check.output].append(check)
        error = check.max_abs_error / max(variant.peaks[check.output], 1e-12)
        relative[check.output] = max(relative[check.output], error)
    worst = max(relative, key=lambda name: relative[name])
    if not relative[worst] <= bound:
        raise ParityError(
            f"{variant.name}: output {worst!r} is off by {relative[worst]:.2g} of its largest value, over {bound:g}; "
            f"export without --variant {variant.name}, or allow it with --variant-error"
        )
    return {
        "variant": variant.name,
        "what": variant.what,
        "tolerance": _ROOM * TOLERANCE * max(check.share for check in checks),
        "maximum": max(check.max_abs_error for check in checks),
        "relative": relative[worst],
        "bound": bound,
        "checks": [
            {
                "policy": dict(policy),
                "output": output,
                "frames": sum(check.frames for check in group),
                "max_abs_error": max(check.max_abs_error for check in group),
                "mean_abs_error": sum(check.mean_abs_error * check.frames for check in group)
                / sum(check.frames for check in group),
            }
            for (policy, output), group in groups.items()
        ],
    }


def _bytes(folder: Path, files: Sequence[str], variant: str) -> int:
    return sum((folder / variant_file(file, variant)).stat().st_size for file in files)


def _compare_speed(baseline: Runtime, variant: Runtime, draw: Draw, policy: Policy) -> dict[str, float]:
    """Milliseconds of one call of each on the same tensors, taken in turns, medians; and how many times faster.

    The call is the largest of 8 streams of 32 frames under `policy`, on one thread.
    """
    calls = _Calls(baseline)
    (frames,) = draw.signature.lengths([_FRAMES])
    replay(calls, draw.signature, [draw.stream(frames)] * _STREAMS, policy)
    tensors, ahead = max(calls.made, key=lambda call: sum(tensor.numel() for tensor in call[0]))
    taken: dict[str, list[float]] = {"float32": [], "variant": []}
    for number in range(_ROUNDS + 1):
        for name, runtime in (("float32", baseline), ("variant", variant)):
            started = time.perf_counter()
            runtime.run(tensors, ahead=ahead)
            if number:  # the first warms up
                taken[name].append(time.perf_counter() - started)
    before, after = (statistics.median(taken[name]) * 1e3 for name in ("float32", "variant"))
    return {"milliseconds": after, "milliseconds_float32": before, "speed": before / after}


class _Calls:
    """A runtime that notes what it is given."""

    def __init__(self, runtime: Runtime) -> None:
        self.name = runtime.name
        self.made: list[tuple[list[Tensor], bool]] = []
        self._runtime = runtime

    def run(self, tensors: Sequence[Tensor], *, ahead: bool) -> list[Tensor]:
        self.made.append((list(tensors), ahead))
        return self._runtime.run(tensors, ahead=ahead)
