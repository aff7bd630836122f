"""The kernel alone: graphs called in process, no server. What look-ahead costs, and what int8 gains, as ratios.

Each ratio is of CPU seconds, taken in turns within one run: `python -m bench.kernel`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from bench.models import Whole, make
from bench.sizes import COMPARED, FRAMES, SIZES
from rich.console import Console
from rich.table import Table

import carousel_export as cx

BATCHES = (1, 8, 32, 64)
BLOCK = AHEAD = 8
# What look-ahead may cost over (block + ahead) / block.
ALLOWED = 1.15


class Call:
    """A graph with its inputs at one size, called by `turn`."""

    def __init__(self, session: ort.InferenceSession, batch: int, time_: int, ahead: int = 0) -> None:
        self._session = session
        rng = np.random.default_rng(0)
        sizes = {"batch": batch, "time": time_, "time_ahead": ahead}
        self._feeds = {}
        for node in session.get_inputs():
            shape = [sizes.get(dim, dim) for dim in node.shape]
            if node.name.startswith("lengths"):
                self._feeds[node.name] = np.full(shape, ahead if node.name.endswith("_ahead") else time_, np.int32)
            else:
                self._feeds[node.name] = rng.standard_normal(shape).astype(np.float32)

    def turn(self, seconds: float) -> float:
        """CPU seconds of one call, the mean over `seconds`."""
        calls, started, end = 0, time.process_time(), time.perf_counter() + seconds
        while calls < 3 or time.perf_counter() < end:
            self._session.run(None, self._feeds)
            calls += 1
        return (time.process_time() - started) / calls


def load(file: Path) -> ort.InferenceSession:
    """As `carousel serve` loads it with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def export_all(folder: Path) -> dict[str, Path]:
    """The bundles of both models with their int8 variant under `folder`, made unless they are there."""
    for name in COMPARED:
        if not (folder / name).exists():
            cx.export(
                Whole(make(name)).eval(), torch.randn(3, FRAMES, SIZES[name][0]), name=name, out=folder, version="1",
                variants=["int8"],
            )  # fmt: skip
    return {name: folder / name / "1" for name in COMPARED}


def measure(bundle: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """For each batch size, the CPU microseconds of each call and the medians of the ratios within a round."""
    sessions = {
        file: load(bundle / file) for file in ("model.onnx", "lookahead.onnx", "model.int8.onnx", "lookahead.int8.onnx")
    }
    rows = []
    for batch in BATCHES:
        calls = {
            "float32": Call(sessions["model.onnx"], batch, FRAMES),
            "int8": Call(sessions["model.int8.onnx"], batch, FRAMES),
            "block": Call(sessions["model.onnx"], batch, BLOCK),
            "lookahead": Call(sessions["lookahead.onnx"], batch, BLOCK, AHEAD),
            "lookahead int8": Call(sessions["lookahead.int8.onnx"], batch, BLOCK, AHEAD),
        }
        taken: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(call.turn(seconds))
        rows.append({
            "batch": batch,
            "cpu_us_per_row": {name: statistics.median(each) / batch * 1e6 for name, each in taken.items()},
            "float32_over_int8": _ratio(taken["float32"], taken["int8"]),
            "lookahead_float32_over_int8": _ratio(taken["lookahead"], taken["lookahead int8"]),
            "lookahead_over_block": _ratio(taken["lookahead"], taken["block"]),
        })  # fmt: skip
    return rows


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(results: dict[str, Any]) -> None:
    console = Console()
    limit = ALLOWED * (BLOCK + AHEAD) / BLOCK
    for name, rows in results["models"].items():
        table = Table(title=f"model {name}: CPU µs per row of {FRAMES} frames; look-ahead may cost {limit:.2f} ×")
        for column in ("batch", "float32", "int8", "float32 / int8", f"lookahead({BLOCK},{AHEAD}) / block"):
            table.add_column(column, justify="right")
        for row in rows:
            us = row["cpu_us_per_row"]
            table.add_row(
                f"{row['batch']}", f"{us['float32']:.0f}", f"{us['int8']:.0f}", f"{row['float32_over_int8']:.2f}",
                f"{row['lookahead_over_block']:.2f}",
            )  # fmt: skip
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each turn")
    parser.add_argument("--models", type=Path, default=Path("models/bench-kernel"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernel.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundles = export_all(given.models)
    results = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "onnxruntime": ort.__version__},
        "policy": {"frames": FRAMES, "block": BLOCK, "ahead": AHEAD},
        "models": {name: measure(bundle, given.rounds, given.seconds) for name, bundle in bundles.items()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
