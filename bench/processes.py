"""CPU seconds and memory of a process and all that it started, as the kernel counts them."""

import os
import re
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


class Tree:
    """A process and its descendants, whichever are there when it is asked."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu_seconds(self) -> float:
        """User and system time so far, with that of children that have ended."""
        return sum(sum(map(int, fields[11:15])) for fields in self._stats().values()) / _TICKS

    def memory_mb(self) -> float:
        """Resident memory now; pages that two processes share count twice."""
        total = 0
        for pid in self._stats():
            try:
                status = (_PROC / str(pid) / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended since
            total += sum(map(int, re.findall(r"VmRSS:\s+(\d+)", status)))
        return total / 1024

    def pids(self) -> list[int]:
        """The process itself first."""
        return list(self._stats())

    def _stats(self) -> dict[int, list[str]]:
        """The fields of /proc/<pid>/stat after the name, of each process of the tree."""
        everybody: dict[int, list[str]] = {}
        for entry in _PROC.iterdir():
            if entry.name.isdecimal():
                try:
                    everybody[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended since
        tree, found = {}, [self._pid]
        while found:
            pid = found.pop()
            if pid in everybody:
                tree[pid] = everybody[pid]
            found += [child for child, fields in everybody.items() if int(fields[1]) == pid]
        return tree
