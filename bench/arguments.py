"""What both benchmarks take on their command lines."""

import argparse
import signal
from dataclasses import replace
from pathlib import Path

from bench.plan import Options


def arguments(what: str) -> argparse.ArgumentParser:
    """A parser with the flags that change how much is measured."""
    # Told to stop, a benchmark ends its servers, as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--sessions", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    for name in ("seconds", "arrival-seconds", "warmup", "raw-seconds"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--models", type=Path, default=Path("models/bench"), help="where the bundles are, or will be")
    parser.add_argument("--out", type=Path, help="the results' file")
    return parser


def changed(options: Options, given: argparse.Namespace) -> Options:
    """The options with what was given in their place."""
    every = {name: getattr(given, name, None) for name in Options.__dataclass_fields__}
    return replace(options, **{name: value for name, value in every.items() if value is not None})
