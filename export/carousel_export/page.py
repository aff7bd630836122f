"""What the report and the tuning page share: policies in words, the look-ahead figure, and the templates' filters."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf import json_format
from jinja2 import Environment, PackageLoader, StrictUndefined

from carousel_export.charts import Axis, Chart, Line
from carousel_protos.v1.manifest_pb2 import DataType, Policy, PolicyKind

Entry: TypeAlias = Mapping[str, Any]  # an object of parity.json

_COLOURS = 6


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


def curve_figure(output: str, points: Sequence[Entry]) -> Figure:
    """Agreement against frames ahead, and against cost: a line for each block, a level for what has no frames ahead."""
    blocks: dict[str, list[Entry]] = {}
    levels: dict[str, Entry] = {}
    for point in points:
        policy = as_policy(point["policy"])
        if policy.kind == PolicyKind.POLICY_KIND_LOOKAHEAD:
            blocks.setdefault(f"lookahead, block {policy.block}", []).append(point)
        else:
            levels[policy_name(point["policy"])] = point
    colours = number([*levels, *blocks])
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
        chart("Agreement by frames ahead", "frames ahead", 0, lambda point: as_policy(point["policy"]).ahead),
        chart("Agreement by cost", "cost factor", 1, lambda point: point["cost"]),
    ]
    rows = [(Key(name, colours[name], dashed=True), point) for name, point in levels.items()]
    for name, members in blocks.items():
        rows += [(Key(policy_name(point["policy"]), colours[name], marked=True), point) for point in members]
    return Figure(output, charts, rows)


def policy_name(policy: Entry | Policy) -> str:
    """A policy as people write it: `causal`, `carry(1)`, `lookahead(8, 8)`, `full`."""
    policy = as_policy(policy)
    match policy.kind:
        case PolicyKind.POLICY_KIND_LOOKAHEAD:
            return f"lookahead({policy.block}, {policy.ahead})" if policy.block else "lookahead"
        case PolicyKind.POLICY_KIND_CARRY:
            return f"carry({policy.block})" if policy.block else "carry"
        case kind:
            return PolicyKind.Name(kind).removeprefix("POLICY_KIND_").lower()


def as_policy(policy: Entry | Policy) -> Policy:
    return policy if isinstance(policy, Policy) else json_format.ParseDict(dict(policy), Policy())


def _lost(point: Entry) -> float:
    # 1 − 0.9999999 leaves rounding noise, which a logarithmic axis would draw
    return round(1 - float(point["argmax_agreement"]), 9)


def number(names: Iterable[str]) -> dict[str, int]:
    """A colour for each name, in order of appearance."""
    return {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(names))}


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


def size_text(value: int) -> str:
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def _dtype(value: int) -> str:
    return DataType.Name(value).removeprefix("DATA_TYPE_").lower()  # type: ignore[arg-type]  # a protobuf enum is an int


def environment(**filters: Callable[..., object]) -> Environment:
    """The templates, with the filters that all share and those of one."""
    made = Environment(
        loader=PackageLoader("carousel_export", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "policy": policy_name,
        "error": _error,
        "difference": _difference,
        "value": _value,
        "agreement": _agreement,
        "percent": _percent,
        "size": size_text,
        "dtype": _dtype,
        **filters,
    }
    return made
