"""`carousel serve` as a process of its own, on an ephemeral port."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import carousel_client as cc
from carousel_protos.v1.carousel_pb2 import ModelState, ModelStatus

CAROUSEL = Path(sys.executable).with_name("carousel")


class ServerProcess:
    """`settings` are those of `ServerConfig`. The log is kept in `log`."""

    def __init__(self, models: Path, **settings: object) -> None:
        settings = {"models": models, "listen": "127.0.0.1:0", "drain_timeout_s": 0.2, "threads": 1, **settings}
        flags = [(f"--{name.removesuffix('_s').replace('_', '-')}", str(value)) for name, value in settings.items()]
        arguments = [str(CAROUSEL), "serve", *(word for flag in flags for word in flag)]
        self.log: list[str] = []
        self._listening = threading.Event()
        self._process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def address(self) -> str:
        found = re.search(r"listening on (\S+)", "".join(self.log))
        assert found is not None, self.log
        return found[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        return self.end(signal.SIGTERM)

    def end(self, how: signal.Signals) -> int:
        """A signal that ends it, and the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        code = self._process.wait(30)
        self._reader.join()
        return code

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.end(signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self.log.append(line)
                if "listening on" in line:
                    self._listening.set()
        self._listening.set()

    def wait_until_served(self) -> None:
        assert self._listening.wait(30), self.log
        with cc.connect(self.address) as client:
            deadline = time.monotonic() + 30
            while not _all_served(client.models()):
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)


def _all_served(models: list[ModelStatus]) -> bool:
    """Whether each model is, in some version."""
    served = {model.name for model in models if model.state == ModelState.MODEL_STATE_SERVING}
    return served == {model.name for model in models}


@contextmanager
def serving(models: Path, **settings: object) -> Iterator[ServerProcess]:
    """A server, stopped at the end."""
    server = ServerProcess(models, **settings)
    try:
        server.wait_until_served()
        yield server
    finally:
        server.stop()
