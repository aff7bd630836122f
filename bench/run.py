"""`make bench`: every peer against the raw onnxruntime call, alternating, on two models; JSON and a table.

Closed loop, carry policy, chunks of 10 float32 frames. What is compared is the server's CPU seconds per chunk, and its
ratio to the raw call at batch 64 in the same round; medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.models import FRAMES, SIZES, export_all, make
from bench.raw import BATCHES, Raw
from bench.servers import Peer, Running, peers, running
from rich.console import Console
from rich.table import Table

_WARMUP_S = 1.0
_TOLERANCE = 1e-5


def write_data(folder: Path, model: str) -> Path:
    """Chunks to send, and what eager PyTorch answers to the first four under carry."""
    rng = np.random.default_rng(0)
    chunks = rng.standard_normal((16, FRAMES, SIZES[model][0])).astype(np.float32)
    stack, state, wanted = make(model), None, []
    with torch.no_grad():
        for chunk in chunks[:4]:
            y, state = stack(torch.from_numpy(chunk)[None], state)
            wanted.append(y[0].numpy())
    path = folder / f"{model}.npz"
    np.savez(path, chunks=chunks, wanted=np.stack(wanted))
    return path


def measure(server: Running, peer: Peer, model: str, sessions: int, seconds: float, data: Path) -> dict[str, float]:
    """One closed-loop run; CPU is counted over the middle of it."""
    command = [sys.executable, "-m", "bench.load", peer.kind, "--target", server.target, "--model", model]
    command += ["--sessions", str(sessions), "--seconds", str(seconds), "--warmup", str(_WARMUP_S), "--data", str(data)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(_WARMUP_S + seconds * 0.4)
    cpu, began = server.cpu_seconds(), time.perf_counter()
    time.sleep(seconds * 0.5)
    cores = (server.cpu_seconds() - cpu) / (time.perf_counter() - began)
    memory = server.memory_mb()
    found: dict[str, float] = json.loads(client.communicate(timeout=60)[0])
    if not found["max_abs_error"] <= _TOLERANCE:
        raise SystemExit(f"{peer.name} on {model}: answers are {found['max_abs_error']:.3g} off eager PyTorch's")
    return found | {"cpu_us_per_chunk": cores / found["chunks_per_s"] * 1e6, "memory_mb": memory}


def compare(models: Path, sessions: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    """All peers in turn, round after round, with the raw call measured beside each round."""
    runs: dict[tuple[str, int, str], list[dict[str, float]]] = defaultdict(list)
    raw: dict[str, list[dict[int, float]]] = defaultdict(list)
    for model in SIZES:
        data = write_data(models, model)
        limit = Raw(models / model / model / "1" / "model.onnx")
        for _ in range(rounds):
            raw[model].append(limit.measure())
            for peer in peers(models, model):
                with running(peer) as server:
                    for count in sessions:
                        found = measure(server, peer, model, count, seconds, data)
                        found["over_raw"] = found["cpu_us_per_chunk"] / raw[model][-1][BATCHES[-1]]
                        runs[model, count, peer.name].append(found)
    return {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "raw_cpu_us_per_chunk": {
            model: {str(batch): statistics.median(found[batch] for found in rounds_of) for batch in BATCHES}
            for model, rounds_of in raw.items()
        },
        "peers": [
            {"model": model, "sessions": count, "peer": name}
            | {key: statistics.median(found[key] for found in each) for key in each[0]}
            for (model, count, name), each in runs.items()
        ],
    }


def show(results: dict[str, Any]) -> None:
    console = Console()
    for model, raw in results["raw_cpu_us_per_chunk"].items():
        limit = ", ".join(f"{value:.0f} at batch {batch}" for batch, value in raw.items())
        table = Table(title=f"model {model}; raw onnxruntime: CPU µs per chunk {limit}", title_justify="left")
        for column in ("peer", "sessions", "chunks/s", "p50 ms", "p99 ms", "server CPU µs/chunk", "× raw", "MB"):
            table.add_column(column, justify="left" if column == "peer" else "right")
        for found in sorted((f for f in results["peers"] if f["model"] == model), key=lambda f: f["sessions"]):
            table.add_row(
                found["peer"],
                f"{found['sessions']}",
                f"{found['chunks_per_s']:,.0f}",
                f"{found['p50_ms']:.2f}",
                f"{found['p99_ms']:.2f}",
                f"{found['cpu_us_per_chunk']:.0f}",
                f"{found['over_raw']:.2f}",
                f"{found['memory_mb']:.0f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--models", type=Path, default=Path("models/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/closed_loop.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    export_all(given.models)
    results = compare(given.models, given.sessions, given.rounds, given.seconds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
