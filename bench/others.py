"""`make bench-peers`: Carousel beside Ray Serve, MLServer, TorchServe, BentoML and LitServe, as `make bench` does it.

Each is made in an environment of its own; one that cannot be had, or fails, is left out with a line that says why.
"""

import torch
from bench import lineup
from bench.arguments import arguments, changed
from bench.findings import FOLDER
from bench.models import export_all
from bench.peers.installed import INSTALLED
from bench.plan import Options, Plan
from bench.show import show
from bench.sizes import COMPARED
from bench.tables import closed, raw, starts
from bench.trials import Bench

_OPTIONS = Options(sessions=(1, 32, 128), rounds=2, seconds=1.0)


def main() -> None:
    given = arguments(__doc__ or "").parse_args()
    options = changed(_OPTIONS, given)
    torch.set_num_threads(1)
    exported = export_all(given.models)
    lineups = {model: [lineup.carousel(exported[model]), lineup.queue(exported[model])] for model in COMPARED}
    notes = {}
    for environment, start in INSTALLED:
        if why_not := environment.ready():
            notes[environment.name] = f"left out: {why_not}"
            print(f"{environment.name} is left out: {why_not}", flush=True)
            continue
        notes[environment.name] = " ".join(environment.packages)
        for model, peers in lineups.items():
            peers.append(start(exported[model]))
    plan, bench = Plan(options, exported, lineups), Bench(exported, options.raw_seconds)
    bench.run(plan.closed(), options.rounds)
    results = plan.results(bench, notes)
    results.save(given.out or FOLDER / "peers.json")
    show(results, [raw(results), *(closed(results, model) for model in COMPARED), starts(results)])


if __name__ == "__main__":
    main()
