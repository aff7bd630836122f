"""HAProxy as a process of its own, with the configuration that is shipped, before two servers."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


@dataclass(frozen=True)
class Haproxy:
    """Where it listens, and what it says of its servers."""

    address: str
    _log: Path

    def wait_for(self, words: str) -> None:
        """Until it has said so."""
        deadline = time.monotonic() + 20
        while words not in self._log.read_text():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)


@contextmanager
def haproxy(replicas: Sequence[str], folder: Path) -> Iterator[Haproxy]:
    """HAProxy before two servers, which it calls a and b.

    The program is Debian's package, which `make test` installs where it may.
    """
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert program is not None, "there is no haproxy here: apt-get install haproxy"
    address = f"127.0.0.1:{free_ports(1)[0]}"
    addresses = {"CAROUSEL_PROXY": address, "CAROUSEL_REPLICA_A": replicas[0], "CAROUSEL_REPLICA_B": replicas[1]}
    path = folder / "haproxy.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [program, "-db", "-f", str(_CONFIGURATION)], env=os.environ | addresses, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 20
        while not _listens(address):
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.02)
        yield Haproxy(address, path)
    finally:
        process.kill()
        process.wait()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
