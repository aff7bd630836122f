"""Servers under test: each a process on an ephemeral port, whose CPU seconds and memory the kernel counts."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Peer:
    """How a server is started and how it is talked to: `kind` is one of bench.load's."""

    name: str
    kind: str
    command: tuple[str, ...]
    # The line of its output after which it serves, beside that with its address.
    ready: str = ""


class Running:
    """A server that listens at `target`."""

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self.process = process
        self.target = target

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_mb(self) -> float:
        """Resident memory now."""
        (line,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(line) / 1024


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    process = subprocess.Popen(peer.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        target, ready = "", not peer.ready
        while not (target and ready):
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"{peer.name} ended before it served, with code {process.wait()}")
            found = re.search(r"listening on (\S+)", line)
            target = found[1] if found else target
            ready = ready or peer.ready in line
        yield Running(process, target)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def peers(models: Path, model: str) -> list[Peer]:
    """All that one run compares."""
    carousel = (str(Path(sys.executable).with_name("carousel")), "serve", "--models", str(models / model))
    by_hand = (sys.executable, "-m", "bench.peers.by_hand", "--models", str(models / model), "--model", model)
    queue = (sys.executable, "-m", "bench.peers.by_hand_queue", *by_hand[3:])
    served = (*carousel, "--listen", "127.0.0.1:0", "--drain-timeout", "0")
    return [
        Peer("Carousel, a stream each", "own", served, "serving"),
        Peer("Carousel, one stream", "shared", served, "serving"),
        Peer("by hand, a queue", "plain", queue),
        Peer("by hand", "plain", by_hand),
        Peer("by hand, eager", "plain", (*by_hand, "--engine", "eager")),
    ]
