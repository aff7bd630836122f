"""Short trials of Triton's configurations: `python -m bench.peers.triton.trials`; the best is written into `Settings`.

max_candidate_sequences is as many as there are sessions: with fewer, those beyond it wait until others have ended.
"""

import statistics
from itertools import product
from pathlib import Path

import torch
from bench import environments, references
from bench.client.phase import Measured, Phase
from bench.models import Exported, export_all
from bench.peers.triton.server import Settings, peer
from bench.servers import running
from bench.show import print_tables
from bench.sizes import COMPARED, FRAMES
from bench.tables import Table

_SESSIONS = (1, 32, 128)
_ROUNDS = 3
_SETTINGS = [Settings(instances=count, delay_us=delay) for count, delay in product((1, 2), (0, 200, 500, 2000))]


def _measure(exported: Exported, settings: Settings, workload: str) -> list[Measured]:
    with running(peer(environments.TRITON, exported, settings)) as server:
        return server.measure(
            [
                Phase(exported.name, workload, sessions, seconds=0.8, warmup=0.25, wire="inference")
                for sessions in _SESSIONS
            ]
        )


def _row(settings: Settings, rounds: list[list[Measured]]) -> list[str]:
    row = [str(settings.instances), str(settings.delay_us)]
    for each in zip(*rounds, strict=True):
        row.append(f"{statistics.median(found.chunks_per_s for found in each):,.0f}")
        row.append(f"{statistics.median(found.cpu_us_per_chunk for found in each):,.0f}")
    return row


def main() -> None:
    if why_not := environments.TRITON.ready():
        raise SystemExit(f"Triton cannot be had: {why_not}")
    torch.set_num_threads(1)
    folder = Path("models/bench")
    exported = export_all(folder)
    heads = [f"{what}, {sessions}" for sessions in _SESSIONS for what in ("chunks/s", "CPU µs")]
    for model in COMPARED:
        workload = str(references.write(folder, model, [FRAMES] * 16))
        found: dict[Settings, list[list[Measured]]] = {settings: [] for settings in _SETTINGS}
        for _ in range(_ROUNDS):
            for settings, rounds in found.items():
                rounds.append(_measure(exported[model], settings, workload))
        rows = [_row(settings, rounds) for settings, rounds in found.items()]
        print_tables([Table(f"Triton, model {model}", ["instances", "delay µs", *heads], rows, words=2)])


if __name__ == "__main__":
    main()
