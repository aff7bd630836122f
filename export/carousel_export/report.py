"""`report.html`: what a bundle is, and how far its exported graphs are from eager PyTorch, for a person to read."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from carousel_export.charts import Axis, Chart, Line
from carousel_export.page import Entry, Figure, Key, curve_figure, environment, number, policy_name
from carousel_protos.v1.manifest_pb2 import DataType, Manifest, Policy, PolicyKind, StateSpec

K = TypeVar("K")

_BYTES = {
    DataType.DATA_TYPE_FLOAT32: 4,
    DataType.DATA_TYPE_FLOAT16: 2,
    DataType.DATA_TYPE_FLOAT64: 8,
    DataType.DATA_TYPE_INT8: 1,
    DataType.DATA_TYPE_INT16: 2,
    DataType.DATA_TYPE_INT32: 4,
    DataType.DATA_TYPE_INT64: 8,
    DataType.DATA_TYPE_UINT8: 1,
    DataType.DATA_TYPE_BOOL: 1,
}


def render(manifest: Manifest, parity: Entry) -> str:
    """One self-contained HTML page about a bundle.

    `parity` is the content of `parity.json`. Every name in either is escaped; the page has no script and loads nothing.
    Raises `KeyError` or `jinja2.UndefinedError` for a `parity` that lacks a field.
    """
    checks, tolerance = parity["checks"], parity["tolerance"]
    errors = _grouped(parity["error_over_time"], _output)
    curves = _grouped(parity.get("lookahead_curve", []), _output)
    return (
        environment(meaning=_meaning)
        .get_template("report.html.j2")
        .render(
            manifest=manifest,
            parity=parity,
            # Not parity["share"] alone: a page must not say "within" over a table that says otherwise.
            within=all(check["share"] <= 1 for check in checks),
            worst=max(checks, key=lambda check: _sortable(check["share"]), default=None),
            groups=_grouped(checks, lambda check: (policy_name(check["policy"]), check["runtime"])),
            state_bytes=sum(_state_bytes(state) for state in manifest.states),
            errors=[_error_figure(output, series, tolerance) for output, series in errors.items()],
            reference=parity.get("reference", "eager PyTorch"),
            longest=parity.get("longest", []),
            variants=parity.get("variants", []),
            curves=[curve_figure(output, points) for output, points in curves.items()],
        )
    )


def _error_figure(output: str, series: Sequence[Entry], tolerance: float) -> Figure:
    colours = number(policy_name(entry["policy"]) for entry in series)
    lines, rows = [], []
    for entry in series:
        name, dashed = policy_name(entry["policy"]), entry["runtime"] != "onnxruntime"
        points = list(zip(entry["frame"], entry["max_abs_error"], strict=True))
        frame, error = max(points, key=lambda point: _sortable(point[1]), default=(0, 0.0))
        lines.append(Line(points, colours[name], dashed))
        row = {"runtime": entry["runtime"], "frame": frame, "error": error, "frames": len(points)}
        rows.append((Key(name, colours[name], dashed), row))
    values = [y for line in lines for _, y in line.points]
    last = max((x for line in lines for x, _ in line.points), default=1)
    chart = Chart(
        "Largest absolute error by frame",
        Axis.linear("frame", last),
        Axis.decades("largest absolute error", [tolerance, *values]),
        lines,
        limit=(tolerance, "tolerance"),
    )
    return Figure(output, [chart], rows)


def _meaning(policy: Policy) -> str:
    match policy.kind:
        case PolicyKind.POLICY_KIND_CAUSAL:
            return "The state is carried on; any cut of the stream gives the same answer."
        case PolicyKind.POLICY_KIND_CARRY:
            block = f"block of {policy.block} frames" if policy.block else "chunk that the client sends"
            return f"Each {block} starts from the states, of both directions, that the one before left."
        case PolicyKind.POLICY_KIND_LOOKAHEAD:
            cost = (policy.block + policy.ahead) / policy.block
            return (
                f"Blocks of {policy.block} frames; backward directions start {policy.ahead} frames after each. "
                f"Latency {policy.block + policy.ahead} frames, cost {cost:.2f}."
            )
        case _:
            return "The whole sequence is held back and run once: the offline answer."


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], K]) -> dict[K, list[Entry]]:
    groups: dict[K, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def _output(entry: Entry) -> str:
    return str(entry["output"])


def _state_bytes(state: StateSpec) -> int:
    """Bytes of one session's row."""
    return math.prod(int(dim) for dim in state.dims[1:]) * _BYTES[state.dtype]


def _sortable(error: float) -> float:
    return math.inf if math.isnan(error) else error
