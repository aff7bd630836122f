"""`report.html`: what a bundle is, and how far its exported graphs are from eager PyTorch, for a person to read."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf import json_format
from jinja2 import Environment, PackageLoader, StrictUndefined

from carousel_export.charts import Axis, Chart, Line
from carousel_protos.v1.manifest_pb2 import DataType, Manifest, Policy, PolicyKind, StateSpec

Entry: TypeAlias = Mapping[str, Any]  # an object of parity.json
K = TypeVar("K")

_COLOURS = 6
_BYTES = {
    DataType.DATA_TYPE_FLOAT32: 4,
    DataType.DATA_TYPE_FLOAT16: 2,
    DataType.DATA_TYPE_FLOAT64: 8,
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
        _environment()
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
            variants=parity.get("variants", []),
            curves=[_curve_figure(output, points) for output, points in curves.items()],
        )
    )


@dataclass(frozen=True)
class Key:
    """What tells a line from the others, shown beside its figures."""

    policy: str
    colour: int
    dashed: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Figure:
    """What the report shows of one output: charts, and the rows of the table that is their legend."""

    output: str
    charts: Sequence[Chart]
    rows: Sequence[tuple[Key, Entry]]


def _error_figure(output: str, series: Sequence[Entry], tolerance: float) -> Figure:
    colours = _number(policy_name(entry["policy"]) for entry in series)
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


def _curve_figure(output: str, points: Sequence[Entry]) -> Figure:
    """Agreement against frames ahead, and against cost: a line for each block, a level for what has no frames ahead."""
    blocks: dict[str, list[Entry]] = {}
    levels: dict[str, Entry] = {}
    for point in points:
        policy = _policy(point["policy"])
        if policy.kind == PolicyKind.POLICY_KIND_LOOKAHEAD:
            blocks.setdefault(f"lookahead, block {policy.block}", []).append(point)
        else:
            levels[policy_name(point["policy"])] = point
    colours = _number([*levels, *blocks])
    agreement = Axis.decades(
        "agreement with offline",
        [_lost(point) for point in points],
        text=lambda decade: f"{100 - 100 * 10.0**decade:.6g} %",
        zero="100 %",
    )

    def chart(title: str, label: str, origin: float, of: Callable[[Entry], float]) -> Chart:
        last = max(of(point) for point in points)
        lines = [
            Line([(origin, _lost(point)), (last, _lost(point))], colours[name], dashed=True)
            for name, point in levels.items()
        ]
        for name, members in blocks.items():
            lines.append(Line(sorted((of(point), _lost(point)) for point in members), colours[name], marked=True))
        x = Axis.doubling(label, [of(point) for point in points], origin=origin)
        return Chart(title, x, agreement, lines, upside_down=True)

    charts = [
        chart("Agreement by frames ahead", "frames ahead", 0, lambda point: _policy(point["policy"]).ahead),
        chart("Agreement by cost", "cost factor", 1, lambda point: point["cost"]),
    ]
    rows = [(Key(name, colours[name], dashed=True), point) for name, point in levels.items()]
    for name, members in blocks.items():
        rows += [(Key(policy_name(point["policy"]), colours[name], marked=True), point) for point in members]
    return Figure(output, charts, rows)


def policy_name(policy: Entry | Policy) -> str:
    """A policy as people write it: `causal`, `carry(1)`, `lookahead(8, 8)`, `full`."""
    policy = _policy(policy)
    match policy.kind:
        case PolicyKind.POLICY_KIND_LOOKAHEAD:
            return f"lookahead({policy.block}, {policy.ahead})" if policy.block else "lookahead"
        case PolicyKind.POLICY_KIND_CARRY:
            return f"carry({policy.block})" if policy.block else "carry"
        case kind:
            return PolicyKind.Name(kind).removeprefix("POLICY_KIND_").lower()


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


def _policy(policy: Entry | Policy) -> Policy:
    return policy if isinstance(policy, Policy) else json_format.ParseDict(dict(policy), Policy())


def _lost(point: Entry) -> float:
    # 1 − 0.9999999 leaves rounding noise, which a logarithmic axis would draw
    return round(1 - float(point["argmax_agreement"]), 9)


def _number(names: Iterable[str]) -> dict[str, int]:
    """A colour for each name, in order of appearance."""
    return {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(names))}


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


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _difference(value: float) -> str:
    return _error(value) if value < 0.1 else f"{value:.2f}"


def _value(value: float) -> str:
    return f"{value:.9g}"  # as many digits as a float32 has, so that the difference shows


def _agreement(value: float) -> str:
    # never rounded up to a 100 % that was not measured
    return f"{math.floor(value * 1e4) / 100:.2f} %"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _size(value: int) -> str:
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def _dtype(value: int) -> str:
    return DataType.Name(value).removeprefix("DATA_TYPE_").lower()  # type: ignore[arg-type]  # a protobuf enum is an int


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("carousel_export", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "policy": policy_name,
        "meaning": _meaning,
        "error": _error,
        "difference": _difference,
        "value": _value,
        "agreement": _agreement,
        "percent": _percent,
        "size": _size,
        "dtype": _dtype,
    }
    return environment
