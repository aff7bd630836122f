"""What takes long to make is made once in a run, however many processes the tests are spread over."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, which `make` fills in the first process that asks; the others wait. Tests only read it."""
    base = factory.getbasetemp()
    # Each worker's folder lies in the run's.
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    done = root / f"shared-{name}"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            begun = factory.mktemp(name)
            make(begun)
            begun.rename(done)
    return done
