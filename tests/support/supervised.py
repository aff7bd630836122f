"""A server that comes back on its port whenever it dies, as under an operator's supervisor, and what it dies of."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.client.process import CAROUSEL

import carousel_client as cc
from carousel_protos.v1.carousel_pb2 import ModelState


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


class Supervised:
    """Restarts `carousel serve` until it is told to stop; `deaths` counts the times that SIGKILL ended it."""

    def __init__(self, models: Path, options: list[str], faults: Callable[[], str], log: Path | None) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self.deaths = 0
        self._command = [str(CAROUSEL), "serve", "--models", str(models)]
        self._command += ["--listen", self.address, "--drain-timeout", "0.5", "--log-level", "warning", *options]
        self._faults = faults
        self._log = log
        self._stopping = self._restarting = False
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"CAROUSEL_FAULT": self._faults()}
        if self._log is None:
            return subprocess.Popen(self._command, env=environment)
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, env=environment, stderr=log)

    def _watch(self) -> None:
        while True:
            code = self._process.wait()
            if self._stopping:
                return
            if self._restarting:
                assert code == 0, f"the server was to stop, and ended with code {code}"
                self._restarting = False
            else:
                assert code == -9, f"the server ended by itself, with code {code}"
                self.deaths += 1
            self._process = self._start()

    def wait_until_served(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                with cc.connect(self.address) as client:
                    models = client.models()
                    served = {model.name for model in models if model.state == ModelState.MODEL_STATE_SERVING}
                    if served == {model.name for model in models}:
                        return
            except cc.Unavailable:
                pass
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()

    def restart(self) -> None:
        """SIGTERM, and a start."""
        self._restarting = True
        self._process.terminate()

    def stop(self) -> None:
        self._stopping = True
        self._process.terminate()
        self._thread.join()


@contextmanager
def supervised(
    models: Path, *options: str, faults: Callable[[], str] = lambda: "", log: Path | None = None
) -> Iterator[Supervised]:
    """A server until the block ends; all that it logs goes to `log`, where one is given."""
    server = Supervised(models, list(options), faults, log)
    try:
        server.wait_until_served()
        yield server
    finally:
        server.stop()
