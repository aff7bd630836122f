"""`make bench`: Carousel, Triton, servers by hand and the raw onnxruntime call side by side; JSON, plots and tables.

What is compared is throughput, latency, and the server's CPU seconds per chunk with its ratio to the raw call at batch
64 in the same round. Servers take turns, round after round; figures are medians, ratios are taken within a round.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from bench import lineup, names, plots
from bench.arguments import arguments, changed
from bench.findings import FOLDER, Results
from bench.models import export_all
from bench.peers.triton.server import Settings
from bench.plan import QUICK, Options, Plan
from bench.show import show
from bench.sizes import COMPARED
from bench.tables import everything
from bench.targets import targets
from bench.trials import Bench


def run(options: Options, models: Path) -> Results:
    """Measure all that `options` ask for."""
    torch.set_num_threads(1)
    exported = export_all(models)
    why_not = lineup.triton_reason()
    lineups = {name: lineup.lineup(exported[name], with_triton=not why_not) for name in COMPARED}
    plan, bench = Plan(options, exported, lineups), Bench(exported, options.raw_seconds)
    if why_not:
        print(f"Triton is left out: {why_not}", flush=True)
    bench.run([*plan.closed(), *plan.variants(), *plan.lengths(), *plan.lookahead()], options.rounds)
    bench.run([*plan.arrivals(), *plan.opened()], 1)
    results = plan.results(bench, {names.TRITON: f"left out: {why_not}" if why_not else str(Settings())})
    results.targets = [asdict(target) | {"reached": target.reached} for target in targets(results)]
    return results


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="fewer sessions and one round; leaves the results alone")
    given = parser.parse_args()
    options = changed(QUICK if given.quick else Options(), given)
    out = given.out or (Path("build/bench") if given.quick else FOLDER) / "bench.json"
    results = run(options, given.models)
    results.save(out)
    plots.write(results, out.parent)
    show(results, everything(results))
    print(f"results  {out}")


if __name__ == "__main__":
    main()
