"""What the machine is, and what a server makes of it: the one place where threads are chosen."""

import asyncio
import os
import platform
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from carousel_server.config import EventLoop, Threading

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Processor, cores, memory in bytes. `quota` is the cores' worth of time that the control group grants, if any."""

    processor: str
    cores: int
    quota: float | None
    memory: int
    memory_limit: int | None

    @property
    def usable(self) -> int:
        """Threads that can run at once, at least one: a thread more only waits for its share of the quota."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))

    @classmethod
    def look(cls, cgroup: Path = _CGROUP) -> Self:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _number(cgroup / "memory.max") or _number(cgroup / "memory" / "memory.limit_in_bytes")
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            quota=_quota(cgroup),
            memory=memory,
            # Version 1 says no limit with a number beyond any memory.
            memory_limit=limit if limit is not None and limit < memory else None,
        )


@dataclass(frozen=True)
class Choice:
    """One setting, in words: `flag` is what overrides it."""

    name: str
    value: str
    why: str
    flag: str


@dataclass(frozen=True)
class Plan:
    """How a server uses its machine; `threads` are those inside one model call."""

    threads: int
    runners: int
    spinning: bool
    loop: EventLoop
    choices: tuple[Choice, ...]


def choose(machine: Machine, config: Threading) -> Plan:
    """The settings for this machine, where the configuration leaves them open (0, "auto")."""
    threads = config.threads or max(1, machine.usable // 2)
    runners = config.runners or 1
    loop: EventLoop = config.loop if config.loop != "auto" else "uvloop" if find_spec("uvloop") else "asyncio"
    why = {
        "threads": "as asked"
        if config.threads
        else f"half of {machine.usable} usable cores: the others decode and answer",
        "runners": "as asked"
        if config.runners
        else "a second takes the event loop's core: heavy models answer a third more with it, light ones a fifth less",
        "spinning": "as asked"
        if config.spinning
        else "a thread that waits awake burns a core, for 0.3 ms less at low load",
        "loop": "as asked" if config.loop != "auto" else "it takes the least CPU of a message, where it is installed",
    }
    return Plan(
        threads,
        runners,
        config.spinning,
        loop,
        (
            Choice("threads in a model call", f"{threads}", why["threads"], "--threads"),
            Choice("calls that may overlap", f"{runners} of a model", why["runners"], "--runners"),
            Choice("spinning", "on" if config.spinning else "off", why["spinning"], "--spinning / --no-spinning"),
            Choice("event loop", loop, why["loop"], "--loop"),
            Choice(
                "affinity",
                f"{machine.cores} cores",
                "as given: a pinned thread queues while a core idles",
                "taskset -c",
            ),
        ),
    )


def run_in(loop: EventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a new event loop of that kind."""
    start: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 -- there is none for Windows

        start = uvloop.run
    start(main)


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _quota(cgroup: Path) -> float | None:
    """The cores' worth of time in the control group, of version 2 or 1; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except OSError:
        quota = str(_number(cgroup / "cpu" / "cpu.cfs_quota_us") or "max")
        period = str(_number(cgroup / "cpu" / "cpu.cfs_period_us") or 100_000)
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None
