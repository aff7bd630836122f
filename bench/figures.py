"""The documents' figures, written from bench/results: `make figures`, or `--check`.

A document has `<!-- figures: NAME -->` before a figure and `<!-- end of figures -->` behind it.
"""

import argparse
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
_NONE = "*No results yet: `make {}` writes them.*\n"


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


def _plot(name: str, what: str) -> Callable[[Results], str]:
    return lambda _: f"![{what}](../{FOLDER}/{name}.svg)"


# By name in the documents: the run it is of, and how it is written.
FIGURES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "machine": ("bench", _machine),
    "compared-at-128": ("bench", lambda results: _compared(results, (names.SESSIONS,))),
    "compared": ("bench", _compared),
    "cpu-plot": ("bench", _plot("cpu", "Server CPU per chunk by sessions")),
    "throughput-plot": ("bench", _plot("throughput", "Chunks a second by sessions")),
    "latency-plot": ("bench", _plot("latency", "Latency by arriving chunks a second")),
    "raw": ("bench", lambda results: tables.raw(results).markdown()),
    "targets": ("bench", lambda results: tables.goals(results).markdown()),
    "arrivals": ("bench", lambda results: tables.arrivals(results).markdown()),
    "variants": ("bench", lambda results: tables.part(results, names.VARIANTS).markdown()),
    "lengths": ("bench", lambda results: tables.part(results, names.LENGTHS).markdown()),
    "lookahead": ("bench", lambda results: tables.part(results, names.LOOKAHEAD).markdown()),
    "open-sessions": ("bench", lambda results: tables.opened(results).markdown()),
    "idle-sessions": ("bench", lambda results: tables.idle(results).markdown()),
    "start-up": ("bench", lambda results: tables.starts(results).markdown()),
    "others-machine": ("peers", _machine),
    "others": ("peers", _compared),
}


def written(text: str) -> str:
    """A document's text with every figure in it written anew. Exits for a name that no figure has."""

    def write(block: re.Match[str]) -> str:
        if block[2] not in FIGURES:
            sys.exit(f"there is no figure {block[2]!r}; there are {', '.join(FIGURES)}")
        run, form = FIGURES[block[2]]
        path = _ROOT / FOLDER / f"{run}.json"
        target = run if run == "bench" else f"bench-{run}"
        body = f"{form(Results.load(path))}\n" if path.exists() else _NONE.format(target)
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
