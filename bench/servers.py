"""Servers under test: each a process on a port of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.client.phase import Measured, Phase
from bench.processes import Tree

_PATIENCE_S = 120.0
_ADDRESS = r"listening on (\S+)"


class PeerError(Exception):
    """A server or its client ended, or answered wrongly; the message says which, and what it said last."""


@dataclass(frozen=True)
class Peer:
    """How a server is started, and the wire that its client talks."""

    name: str
    wire: str
    command: Sequence[str]
    # Of its output, what says that it serves.
    ready: str = _ADDRESS
    # Where it will be; empty: its output says it.
    target: str = ""
    # One that may fail without the benchmark's failing.
    optional: bool = False
    environment: Mapping[str, str] | None = field(default=None, repr=False)


class Running:
    """A server that serves at `target`, `start_s` after it was started."""

    def __init__(self, peer: Peer, pid: int, target: str, start_s: float) -> None:
        self.peer, self.target, self.start_s = peer, target, start_s
        self._pid = pid

    def measure(self, phases: Sequence[Phase]) -> list[Measured]:
        """Run phases in turn from one client process. Raises `PeerError`."""
        command = [sys.executable, "-m", "bench.client.main", "--target", self.target, "--pid", str(self._pid)]
        asked = json.dumps([asdict(phase) for phase in phases])
        client = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
        if client.returncode:
            raise PeerError(f"{self.peer.name}: its client ended with {client.stderr[-2000:]}")
        return [Measured(**json.loads(line)) for line in client.stdout.splitlines()]


def free_port() -> int:
    """A port that nobody has, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    """A server for as long as the block runs. Raises `PeerError` where it does not come to serve."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        began = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                peer.command, stdout=output, stderr=subprocess.STDOUT, env=peer.environment, start_new_session=True
            )
        try:
            target = _wait(peer, process, log)
            yield Running(peer, process.pid, target, time.perf_counter() - began)
        finally:
            _end(process)


def _wait(peer: Peer, process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Until it serves; its address."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        said = log.read_text(encoding="utf-8", errors="replace")
        address = re.search(_ADDRESS, said)
        target = peer.target or (address[1] if address else "")
        if target and re.search(peer.ready, said):
            return target
        if ended:
            raise PeerError(f"{peer.name} ended before it served, with code {process.returncode}: {said[-2000:]}")
        time.sleep(0.01)
    raise PeerError(f"{peer.name} did not serve within {_PATIENCE_S:g} s")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the server, and by their pids what it started and left."""
    helpers = Tree(process.pid).pids()[1:]
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in helpers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
