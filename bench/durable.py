"""What `--store` and `--durability` cost a server: the same load on each, in turn. `python -m bench.durable`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from bench import lineup
from bench.arguments import arguments, changed
from bench.findings import FOLDER
from bench.models import Exported, export_all
from bench.plan import Options, Plan
from bench.servers import Peer
from bench.show import show
from bench.tables import closed
from bench.trials import Bench
from tests.support.redis_server import RedisServer

_OPTIONS = Options(sessions=(1, 128), rounds=3, seconds=1.0)


@contextmanager
def _peers(exported: Exported) -> Iterator[list[Peer]]:
    """Carousel with one stream on each store, those of files in a folder of the run's own."""
    with tempfile.TemporaryDirectory() as folder:
        often, always = Path(folder, "everysec"), Path(folder, "always")
        often.mkdir()
        always.mkdir()
        servers = [RedisServer("redis", often, appendfsync="everysec"), RedisServer("redis", always)]
        sqlite = f"sqlite:{folder}/sessions"
        stores = {
            "memory": ["memory"],
            "sqlite, drain": [f"{sqlite}-drain", "drain"],
            "sqlite, synchronous=normal": [f"{sqlite}-normal?synchronous=normal"],
            "sqlite": [sqlite],
            "redis, appendfsync everysec": [servers[0].url],
            "redis, appendfsync always": [servers[1].url],
        }
        try:
            peer = lineup.carousel(exported, "shared")
            yield [
                replace(peer, name=name, command=(*peer.command, "--store", store, "--durability", *(how or ["step"])))
                for name, (store, *how) in stores.items()
            ]
        finally:
            for server in servers:
                server.kill()


def main() -> None:
    given = arguments(__doc__ or "").parse_args()
    options = changed(_OPTIONS, given)
    torch.set_num_threads(1)
    exported = {name: each for name, each in export_all(given.models).items() if name == "A"}
    with _peers(exported["A"]) as peers:
        plan, bench = Plan(options, exported, {"A": peers, "B": []}), Bench(exported, options.raw_seconds)
        bench.run(plan.closed(), options.rounds)
    results = plan.results(bench, {})
    results.save(given.out or FOLDER / "durable.json")
    show(results, [closed(results, "A")])


if __name__ == "__main__":
    main()
