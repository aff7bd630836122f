"""`make soak`: a server that is killed, fuzzed and left to run; ends by itself, with a code that says whether all held.

    make soak                                   # all of it, in about fifty minutes
    make soak SOAK="--kills 20 --requests 50000 --minutes 10 --out build/soak"
    make soak SOAK="--only kills --store redis --seed 7"

Everything listens on loopback. What was found is written as JSON, each part as it ends, with its command and machine.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.machine import describe
from soak import fuzz, kills, memory
from soak.drawing import draw
from soak.errors import SoakError
from soak.models import export_all

PARTS = ("kills", "fuzz", "memory")
FOLDER = Path(__file__).parent / "results"


def _arguments() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__, formatter_class=form)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="the parts that are run")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs for each store (%(default)s)")
    parser.add_argument("--sessions", type=int, default=100, help="live sessions under the kills (%(default)s)")
    parser.add_argument("--store", choices=("sqlite", "redis"), nargs="+", default=["sqlite", "redis"])
    parser.add_argument("--requests", type=int, default=1_000_000, help="wrong requests (%(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of watching memory (%(default)s); 10 or more")
    parser.add_argument("--rate", type=float, default=8.0, help="sessions a second meanwhile (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (%(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the results' folder")
    return parser


def _kills(given: argparse.Namespace, models: Path, store: str) -> dict[str, Any]:
    found = kills.soak(models, store, wanted=given.kills, live=given.sessions, seed=given.seed)
    print(
        f"kills on {store}: {found.kills} in {found.seconds:g} s, {found.resumes} resumes, {found.sequences} sequences "
        f"of {found.chunks} chunks: {found.lost} lost, {found.doubled} doubled (counted in {found.counted_chunks}), "
        f"{found.differing} answers differ"
    )
    return _judged(found, lambda: found.judge(given.kills))


def _fuzz(given: argparse.Namespace, models: Path) -> dict[str, Any]:
    found = fuzz.soak(models, requests=given.requests, seed=given.seed)
    print(f"fuzz: {found.sent} requests in {found.seconds:g} s, {found.answers}")
    print(f"  beside it {found.control_answers} answers, {found.control_differing} differ")
    if found.sent < fuzz.LEAST_JUDGED:
        print(f"  its memory is not judged: that takes {fuzz.LEAST_JUDGED} requests")
        result = _judged(found, found.judge)
    else:
        result = _judged(found, found.judge, found.judge_memory)
    return result | {"rss_mb": found.thinned()}


def _memory(given: argparse.Namespace, models: Path) -> dict[str, Any]:
    found = memory.soak(models, minutes=given.minutes, rate=given.rate, seed=given.seed)
    result = _judged(found, found.judge)
    print(
        f"memory: {found.lowest_mb:.1f} to {found.highest_mb:.1f} MB after the first {found.warm_up_minutes:g} of "
        f"{given.minutes:g} minutes, {found.base_mb:.1f} MB in the minute behind them; {found.did}"
    )
    draw(found, given.out / "memory.svg")
    return result


def _judged(found: kills.Kills | fuzz.Fuzz | memory.Memory, *judges: Callable[[], None]) -> dict[str, Any]:
    """What was found, with what did not hold in it."""
    broken = []
    for judge in judges:
        try:
            judge()
        except SoakError as error:
            broken.append(str(error))
    return {**asdict(found), "broken": broken}


def _text(result: dict[str, Any]) -> str:
    """As JSON, a sample of memory on a line."""
    return re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(result, indent=1)) + "\n"


def _command() -> str:
    return f'make soak SOAK="{shlex.join(sys.argv[1:])}"' if sys.argv[1:] else "make soak"


def _parts(given: argparse.Namespace, models: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if "kills" in given.only:
        for store in given.store:
            yield f"kills-{store}", lambda store=store: _kills(given, models, store)
    if "fuzz" in given.only:
        yield "fuzz", lambda: _fuzz(given, models)
    if "memory" in given.only:
        yield "memory", lambda: _memory(given, models)


def main() -> None:
    given = _arguments().parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    broken: list[str] = []
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        export_all(models)
        for name, part in _parts(given, models):
            print(f"{name} …", flush=True)
            try:
                found = part()
            except SoakError as error:
                found = {"broken": [str(error)]}
            machine = {key: value for key, value in describe().items() if key != "system"}
            about = {"command": _command(), "machine": machine}
            (given.out / f"{name}.json").write_text(_text(about | found), encoding="utf-8")
            broken += [f"{name}: {what}" for what in found["broken"]]
    for what in broken:
        print(f"BROKEN {what}")
    print(f"results  {given.out}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
