"""What the example prints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from examples.pinyin.text import Tables, with_tone_mark
from examples.pinyin.traffic import Run
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Agreement:
    """Ambiguous characters read under one policy, and how many of them as offline."""

    policy: str
    same: int
    of: int
    run: Run


def parity_table(parity: Mapping[str, Any]) -> Table:
    """The largest error of each runtime under each policy."""
    table = _table("Policy", "Runtime", right=("Checks", "Frames", "Largest error"))
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for check in parity["checks"]:
        kind = str(check["policy"]["kind"]).removeprefix("POLICY_KIND_").lower()
        groups.setdefault((kind, check["runtime"]), []).append(check)
    for (kind, runtime), checks in groups.items():
        error = max(check["max_abs_error"] for check in checks)
        frames = sum(check["frames"] for check in checks)
        table.add_row(kind, runtime, f"{len(checks)}", f"{frames:,}", f"{error:.1e}" if error else "0")
    return table


def agreement_table(found: Sequence[Agreement]) -> Table:
    """How each policy read the ambiguous characters, and how it went."""
    table = _table("Policy", right=("As offline", "Differ", "Chars/s", "p50 ms", "p99 ms", "Rows/step"))
    for entry in found:
        run = entry.run
        p50, p99 = np.percentile(run.latencies_s, [50, 99]) * 1000
        table.add_row(
            entry.policy,
            f"{np.floor(1e4 * entry.same / entry.of) / 100:.2f} %",
            f"{entry.of - entry.same}",
            f"{run.characters / run.seconds:,.0f}",
            f"{p50:.1f}",
            f"{p99:.1f}",
            f"{run.rows / run.steps:.1f}",
        )
    return table


def readings(console: Console, tables: Tables, sentence: str, read: Sequence[str]) -> Iterator[Text]:
    """A sentence under its pinyin, the ambiguous characters in colour, in lines that fit the console."""
    ambiguous = set(tables.ambiguous(sentence))
    above, below = Text(), Text()
    for i, (character, reading) in enumerate(zip(sentence, read, strict=True)):
        pinyin = "" if reading == character else with_tone_mark(reading)
        width = max(cell_len(pinyin), cell_len(character)) + 1
        if below.cell_len + width > console.width - 2:
            yield from (above, below, Text())
            above, below = Text(), Text()
        style = "bold yellow" if i in ambiguous else ""
        above.append(pinyin.ljust(width), style or "dim")
        below.append(character + " " * (width - cell_len(character)), style)
    yield from (above, below, Text())


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
