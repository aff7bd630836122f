"""What a commit costs: `python -m bench.stores` commits 4 KB records to every store, one and many at a time.

CPU is this process's, its writer thread included, and the redis-server's beside it; both per record.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tests.support.redis_server import RedisServer

from carousel_server.store.open_store import open_store
from carousel_server.store.store import Record, Store

BATCHES = (1, 32, 128)
PAYLOAD = 4096
# Records that are written over and over.
SESSIONS = 4096
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    store: str
    batch: int
    commits: int
    us_per_record: float
    cpu_us_per_record: float
    server_cpu_us_per_record: float
    commit_p50_ms: float
    commit_p99_ms: float


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def measure(name: str, store: Store, batch: int, seconds: float, server: RedisServer | None) -> Cost:
    """Commits one after the other, as an engine's steps are, once every record is there."""
    fresh = Record("", 1, "", "tagger", "1", b"", "", time.time() + 600)
    records = [replace(fresh, session_id=f"{number:032x}", payload=os.urandom(PAYLOAD)) for number in range(SESSIONS)]
    batches = [records[at : at + batch] for at in range(0, SESSIONS, batch)]
    for chosen in batches:
        await store.commit(chosen)
    took: list[float] = []

    def used() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), cpu_seconds(server.pid) if server is not None else 0.0

    began = used()
    for chosen in itertools.cycle(batches):
        at = time.perf_counter()
        if await store.commit(chosen):
            raise SystemExit(f"{name} refused its only writer")
        took.append(time.perf_counter() - at)
        if time.perf_counter() - began[0] > seconds:
            break
    wall, own, other = ((end - start) / len(took) / batch * 1e6 for start, end in zip(began, used(), strict=True))
    percentiles = statistics.quantiles(took, n=100)
    return Cost(name, batch, len(took), wall, own, other, percentiles[49] * 1e3, percentiles[98] * 1e3)


Place = Callable[[], AbstractContextManager[tuple[Store, RedisServer | None]]]


def places(folder: Path) -> dict[str, Place]:
    """Each store, and how it is opened in a folder of its own."""

    @contextmanager
    def file(query: str) -> Iterator[tuple[Store, None]]:
        with tempfile.TemporaryDirectory(dir=folder) as files:
            yield open_store(f"sqlite:{files}/sessions.db{query}"), None

    @contextmanager
    def server(kind: str, **settings: str) -> Iterator[tuple[Store, RedisServer]]:
        with tempfile.TemporaryDirectory(dir=folder) as files:
            running = RedisServer(kind, Path(files), **settings)
            try:
                yield open_store(running.url), running
            finally:
                running.kill()

    return {
        "memory": lambda: nullcontext((open_store("memory"), None)),
        "sqlite, synchronous=normal": lambda: file("?synchronous=normal"),
        "sqlite, synchronous=full": lambda: file("?synchronous=full"),
        "redis, no file": lambda: server("redis", appendonly="no"),
        "redis, appendfsync everysec": lambda: server("redis", appendfsync="everysec"),
        "redis, appendfsync always": lambda: server("redis", appendfsync="always"),
        "valkey, appendfsync everysec": lambda: server("valkey", appendfsync="everysec"),
    }


def fsync_ms(folder: Path) -> float:
    """What this disk takes to write 4 KB for good, the floor of a commit that waits for it; the median of 200."""
    took = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(200):
            at = time.perf_counter()
            file.write(bytes(PAYLOAD))
            os.fsync(file.fileno())
            took.append(time.perf_counter() - at)
    return statistics.median(took) * 1e3


async def compare(folder: Path, seconds: float) -> list[Cost]:
    costs = []
    for name, place in places(folder).items():
        for batch in BATCHES:
            with place() as (store, server):
                costs.append(await measure(name, store, batch, seconds, server))
                await store.close()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each store and batch")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "stores.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = asyncio.run(compare(Path(folder), arguments.seconds))
        disk = fsync_ms(Path(folder))
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        # The machine's other work lengthens what is waited for; CPU suffers less.
        "load_average": os.getloadavg()[0],
    }
    found = {
        "machine": machine,
        "fsync_p50_ms": disk,
        "payload_bytes": PAYLOAD,
        "costs": [asdict(cost) for cost in costs],
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"4 KB records; an fsync of this disk takes {disk:.2f} ms")
    for column in ("store", "batch", "µs a record", "CPU µs", "server's CPU µs", "commit p50, ms", "p99, ms"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for cost in costs:
        rates = (cost.us_per_record, cost.cpu_us_per_record, cost.server_cpu_us_per_record)
        times = (cost.commit_p50_ms, cost.commit_p99_ms)
        table.add_row(cost.store, str(cost.batch), *(f"{x:.0f}" for x in rates), *(f"{x:.2f}" for x in times))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
