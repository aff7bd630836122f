"""The documents' figures, written from bench/results: `make figures`, or `--check`.

A document has `<!-- figures: NAME -->` before a figure and `<!-- end of figures -->` behind it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import names, tables
from bench.findings import FOLDER, Results
from bench.sizes import COMPARED

_ROOT = Path(__file__).parents[1]
DOCUMENTS = (Path("README.md"), Path("docs/performance.md"))
_BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_NONE = "*No results yet: `{}` writes them.*\n"


def _compared(results: Results, sessions: tuple[int, ...] = ()) -> str:
    return "\n\n".join(
        f"Model {model}; a raw call at batch 64 costs {results.raw[model]['64']:.0f} µs a chunk:\n\n"
        f"{tables.closed(results, model, sessions).markdown()}"
        for model in COMPARED
    )


def _machine(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    notes = "; ".join(f"{name}: {note}" for name, note in results.notes.items())
    return (
        f"{machine['date']}; {machine['cores']} cores of {machine['processor']}; Python {machine['python']}, "
        f"{versions}. {notes}."
    )


def _plot(name: str, what: str) -> Callable[[Path], str]:
    return lambda _: f"![{what}](../{FOLDER}/{name}.svg)"


def _budget(path: Path) -> str:
    """The stages of a chunk, and what gRPC costs by itself where that was measured, too."""
    budget = json.loads(path.read_text(encoding="utf-8"))["budget"]
    rows = [[stage, *(f"{budget[model][stage]:.1f}" for model in budget)] for stage in budget["A"]]
    floor = path.with_name("floor.json")
    if floor.exists():
        costs = json.loads(floor.read_text(encoding="utf-8"))["cpu_us_per_message"]
        rows.append(["gRPC alone, a message a chunk", *(f"{costs[model]:.1f}" for model in budget)])
    return tables.Table("", ["CPU µs per chunk", *(f"model {model}" for model in budget)], rows).markdown()


def _read(form: Callable[[Results], str]) -> Callable[[Path], str]:
    return lambda path: form(Results.load(path))


# By name in the documents: the run it is of, and how it is written from that run's file.
FIGURES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "machine": ("bench", _read(_machine)),
    "compared-at-128": ("bench", _read(lambda results: _compared(results, (names.SESSIONS,)))),
    "compared": ("bench", _read(_compared)),
    "cpu-plot": ("bench", _plot("cpu", "Server CPU per chunk by sessions")),
    "throughput-plot": ("bench", _plot("throughput", "Chunks a second by sessions")),
    "latency-plot": ("bench", _plot("latency", "Latency by arriving chunks a second")),
    "raw": ("bench", _read(lambda results: tables.raw(results).markdown())),
    "targets": ("bench", _read(lambda results: tables.goals(results).markdown())),
    "arrivals": ("bench", _read(lambda results: tables.arrivals(results).markdown())),
    "variants": ("bench", _read(lambda results: tables.part(results, names.VARIANTS).markdown())),
    "lengths": ("bench", _read(lambda results: tables.part(results, names.LENGTHS).markdown())),
    "lookahead": ("bench", _read(lambda results: tables.part(results, names.LOOKAHEAD).markdown())),
    "open-sessions": ("bench", _read(lambda results: tables.opened(results).markdown())),
    "idle-sessions": ("bench", _read(lambda results: tables.idle(results).markdown())),
    "start-up": ("bench", _read(lambda results: tables.starts(results).markdown())),
    "others-machine": ("peers", _read(_machine)),
    "others": ("peers", _read(_compared)),
    "budget": ("budget", _budget),
    "durable": ("durable", _read(lambda results: tables.closed(results, "A").markdown())),
}
# How each run is made.
_COMMANDS = {
    "bench": "make bench",
    "peers": "make bench-peers",
    "budget": "python -m bench.budget",
    "durable": "python -m bench.durable",
}


def written(text: str) -> str:
    """A document's text with every figure in it written anew. Exits for a name that no figure has."""

    def write(block: re.Match[str]) -> str:
        if block[2] not in FIGURES:
            sys.exit(f"there is no figure {block[2]!r}; there are {', '.join(FIGURES)}")
        run, form = FIGURES[block[2]]
        path = _ROOT / FOLDER / f"{run}.json"
        body = f"{form(path)}\n" if path.exists() else _NONE.format(_COMMANDS[run])
        return f"{block[1]}{body}{block[3]}"

    return _BLOCK.sub(write, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a figure is stale")
    check = parser.parse_args().check
    for document in (_ROOT / name for name in DOCUMENTS):
        text = document.read_text(encoding="utf-8")
        wanted = written(text)
        if check and wanted != text:
            sys.exit(f"the figures in {document.name} are stale; run `make figures` and commit")
        document.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
