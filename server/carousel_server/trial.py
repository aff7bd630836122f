"""`carousel doctor --measure`: a bundle's calls under several choices of threads, in turns, a few seconds together."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

from carousel_protos import Bundle
from carousel_server.engine.drawn import full_step
from carousel_server.engine.runtime import Runtime, load_runtimes
from carousel_server.engine.spec import ModelSpec

_ROUNDS = 3
# A second thread has to earn this much of the rows, and may cost this much more of their CPU.
_EARNS, _COSTS = 1.15, 1.1
# Spinning has to make a call at low load this much quicker, and may cost this much more CPU.
_QUICKER, _BURNS = 1.3, 2.0
# Pauses between calls at low load, when spinning shows.
_PAUSE_S = 0.02


@dataclass(frozen=True)
class Tried:
    """One choice: `threads` in a call, `runners` that call at once. CPU is that of the process, per row."""

    threads: int
    runners: int
    spinning: bool
    rows: int
    rows_per_s: float
    cpu_us_per_row: float
    p50_ms: float
    # Whether there was a pause after each call.
    idle: bool


@dataclass(frozen=True)
class Trial:
    """All that was tried, and the threads and spinning that they speak for."""

    tried: list[Tried]
    threads: int
    spinning: bool
    why: str


def measure(bundle: Bundle, *, most: int, seconds: float = 4.0) -> Trial:
    """Call the graph of the bundle's default policy with up to `most` threads. Raises `LoadError`, `BundleError`."""
    graph = next(each for each in bundle.manifest.graphs if bundle.manifest.default_policy.kind in each.policies)
    counts = [count for count in (1, 2, 4, 8, 16) if count <= max(2, most)]
    spec = ModelSpec.read(bundle.manifest)

    def load(threads: int, *, spinning: bool) -> Runtime:
        return load_runtimes(bundle, device="cpu", threads=threads, spinning=spinning)[graph.file]

    runtimes = {threads: load(threads, spinning=False) for threads in counts}
    # A pool of one thread has nothing that could spin.
    plans = [(threads, 1, False, rows, False) for rows in (1, 32) for threads in counts]
    plans += [(1, 2, False, 32, False), (counts[-1], 1, True, 32, False)]
    plans += [(counts[-1], 1, spinning, 1, True) for spinning in (False, True)]
    found: dict[int, list[Tried]] = {number: [] for number in range(len(plans))}
    for _ in range(_ROUNDS):
        for number, (threads, runners, spinning, rows, idle) in enumerate(plans):
            # One that spins is there for its own turn only: it would burn CPU in the others'.
            runtime = load(threads, spinning=True) if spinning else runtimes[threads]
            call = partial(runtime.run, full_step(spec, runtime.inputs, rows))
            taken = _turn(call, runners, seconds / _ROUNDS / len(plans), idle=idle)
            found[number].append(Tried(threads, runners, spinning, rows, *_per_row(*taken, rows), idle))
    tried = [sorted(each, key=lambda one: one.rows_per_s)[len(each) // 2] for each in found.values()]
    return _recommend(tried)


def _recommend(tried: list[Tried]) -> Trial:
    full = [one for one in tried if one.rows > 1 and one.runners == 1 and not one.spinning]
    best = full[0]
    for one in full[1:]:
        if one.rows_per_s > best.rows_per_s * _EARNS and one.cpu_us_per_row < best.cpu_us_per_row * _COSTS:
            best = one
    gain = max(full, key=lambda one: one.rows_per_s)
    why = (
        f"{gain.threads} threads give {gain.rows_per_s / full[0].rows_per_s:.2f} × the rows of one at full steps, "
        f"for {gain.cpu_us_per_row / full[0].cpu_us_per_row:.2f} × the CPU of a row"
        if gain is not full[0]
        else "more threads give no more rows at full steps"
    )
    asleep, awake = (one for one in tried if one.idle)
    quicker = best.threads > 1 and awake.p50_ms * _QUICKER < asleep.p50_ms
    burns = awake.cpu_us_per_row / asleep.cpu_us_per_row
    return Trial(
        tried, best.threads, quicker and burns < _BURNS, f"{why}; spinning costs {burns:.2f} × the CPU at low load"
    )


def _turn(call: Callable[[], object], runners: int, seconds: float, *, idle: bool) -> tuple[float, float, list[float]]:
    """Wall and CPU seconds of calls one after the other in each of `runners` threads, and what each call took."""
    call()
    taken: list[float] = []

    def work() -> None:
        while (started := time.perf_counter()) < end or not taken:
            call()
            taken.append(time.perf_counter() - started)
            if idle:
                time.sleep(_PAUSE_S)

    with ThreadPoolExecutor(runners) as pool:
        cpu, began = time.process_time(), time.perf_counter()
        end = began + seconds
        for work_done in [pool.submit(work) for _ in range(runners)]:
            work_done.result()
        return time.perf_counter() - began, time.process_time() - cpu, taken


def _per_row(wall_s: float, cpu_s: float, taken: list[float], rows: int) -> tuple[float, float, float]:
    count = len(taken) * rows
    return count / wall_s, cpu_s / count * 1e6, median(taken) * 1e3
