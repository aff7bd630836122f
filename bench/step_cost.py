"""What a step costs: a fixed part for each call and a part for each row and frame, padding included.

CPU seconds of the graph alone at one thread, by rows and frames, and the plane that fits them best:
`python -m bench.step_cost`. The scheduler's `CALL_FRAMES` is the fixed part in row-frames.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench.kernel import Call, export_all, load
from bench.machine import describe
from rich.console import Console
from rich.table import Table

ROWS = (1, 2, 8, 32, 64)
FRAMES = (1, 2, 5, 10, 20, 50)
LONG = (128, 256, 512)


@dataclass(frozen=True)
class Cost:
    """Of one graph."""

    # CPU microseconds of a call by rows, then by frames.
    us: dict[int, dict[int, float]]
    # Of the fit over the calls of at least eight rows, which is where sharing is decided.
    us_per_call: float
    us_per_row_frame: float

    @property
    def call_frames(self) -> float:
        """Row-frames that cost as much as a call of its own."""
        return self.us_per_call / self.us_per_row_frame


def measure(graph: Path, rounds: int, seconds: float) -> Cost:
    """The median of `rounds` turns at each size."""
    session = load(graph)
    sizes = [(rows, frames) for rows in ROWS for frames in (*FRAMES, *(LONG if rows <= 8 else ()))]
    calls = {size: Call(session, *size) for size in sizes}
    taken: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, call in calls.items():
            taken[size].append(call.turn(seconds) * 1e6)
    us = {size: median(each) for size, each in taken.items()}
    fitted = [size for size in sizes if size[0] >= 8 and size[1] <= FRAMES[-1]]
    # Relative errors, or else the longest calls alone would decide.
    weights = np.array([1 / us[size] for size in fitted])
    work = np.array([[1.0, rows * frames] for rows, frames in fitted])
    (fixed, each), *_ = np.linalg.lstsq(work * weights[:, None], np.ones(len(fitted)), rcond=None)
    table = {rows: {f: us[rows, f] for r, f in sizes if r == rows} for rows in ROWS}
    return Cost(table, float(fixed), float(each))


def show(name: str, cost: Cost) -> None:
    title = (
        f"model {name}: CPU µs a call; fit {cost.us_per_call:.0f} µs a call and {cost.us_per_row_frame:.1f} µs a row "
        f"and frame, so a call is {cost.call_frames:.0f} row-frames"
    )
    table = Table(title=title)
    table.add_column("rows", justify="right")
    columns = (*FRAMES, *LONG)
    for frames in columns:
        table.add_column(f"{frames} frames", justify="right")
    for rows, by_frames in cost.us.items():
        table.add_row(f"{rows}", *(f"{by_frames[frames]:.0f}" if frames in by_frames else "" for frames in columns))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.03, help="of each turn")
    parser.add_argument("--models", type=Path, default=Path("models/bench-kernel"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_cost.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    costs = {
        name: measure(bundle / "model.onnx", given.rounds, given.seconds)
        for name, bundle in export_all(given.models).items()
    }
    for name, cost in costs.items():
        show(name, cost)
    found = {name: asdict(cost) | {"call_frames": cost.call_frames} for name, cost in costs.items()}
    given.out.write_text(json.dumps({"machine": describe(), "models": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
