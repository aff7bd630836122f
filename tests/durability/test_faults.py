"""Faults of stores and owners, on real processes: paused, killed, full, slow, and cold sessions by the hundred."""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import ServerProcess, serving
from tests.support.models import Speaker, make, whole
from tests.support.redis_server import RedisServer
from tests.support.supervised import supervised

import carousel_client as cc

MODEL = make(Speaker)


class Line:
    """A session that sends chunks one by one, and knows what eager PyTorch answers to all that it sent."""

    def __init__(self, client: cc.Client, name: str, *, resume: bool = False, tokens: list[int] | None = None) -> None:
        self.tokens = list(tokens or [])
        self.session = client.session("speaker", session_id=name, resume=resume)
        self.session.__enter__()
        self._draw = np.random.default_rng(len(name))

    def go_on(self) -> None:
        new = self._draw.integers(0, 11, 3)
        self.tokens += new.tolist()
        wanted = whole(MODEL, torch.tensor(self.tokens)).numpy()[-3:]
        np.testing.assert_allclose(self.session.send(new, timeout=50), wanted, rtol=0, atol=1e-5)

    def close(self) -> None:
        self.session.__exit__(None, None, None)


@contextmanager
def a_store(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:{folder / 'sessions'}"
        return
    redis = RedisServer(kind, folder)
    try:
        yield redis.url
    finally:
        redis.kill()


@contextmanager
def paused(server: ServerProcess) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_older_of_two_owners_is_refused(models: Path, tmp_path: Path, kind: str):
    """A server that slept while another took its sessions over writes nothing more of them, and tells its clients."""
    with (
        a_store(kind, tmp_path) as store,
        serving(models, store=store) as older,
        serving(models, store=store) as newer,
        cc.connect(older.address) as one,
        cc.connect(newer.address) as another,
        cc.connect(older.address) as third,
    ):
        first, back = Line(one, "first"), Line(one, "back")
        for line in (first, back):
            line.go_on()
            line.go_on()
        with paused(older):
            taken = Line(another, "first", resume=True, tokens=first.tokens)
            lent = Line(another, "back", resume=True, tokens=back.tokens)
            for line in (taken, lent):
                line.go_on()
            late: list[BaseException] = []

            def send() -> None:
                try:
                    first.session.send(np.array([1, 2]), timeout=50)
                except cc.CarouselError as error:
                    late.append(error)

            asked = threading.Thread(target=send)
            asked.start()
            time.sleep(0.3)
        asked.join()
        assert isinstance(late[0], cc.Fenced), late
        taken.go_on()
        # What the older has in memory is of the past: it is neither told nor gone on with.
        assert {each.session_id: each.next_index for each in one.sessions()} == {"first": 4, "back": 3}
        assert one.get_state("back") == another.get_state("back")
        again = Line(third, "back", resume=True, tokens=lent.tokens)
        again.go_on()
        with pytest.raises(cc.Fenced):
            lent.go_on()
        taken.close()
        again.close()


def test_a_redis_that_is_killed_or_slow_delays_and_loses_nothing(models: Path, tmp_path: Path):
    """Killed and started again, or silent for 2 s: no answer comes before its commit, and then each does."""
    redis = RedisServer("redis", tmp_path)
    try:
        with (
            serving(models, store=redis.url) as server,
            serving(models) as apart,
            cc.connect(server.address) as client,
            cc.connect(apart.address) as other,
        ):
            lines = [Line(client, f"line-{number}") for number in range(8)]
            unaffected = Line(other, "other")

            def go_on() -> None:
                with ThreadPoolExecutor(len(lines)) as threads:
                    list(threads.map(Line.go_on, lines))

            go_on()
            for fault, mend in ((redis.kill, redis.start), (redis.pause, redis.go_on)):
                fault()
                running = threading.Thread(target=go_on)
                running.start()
                time.sleep(2)
                unaffected.go_on()
                assert running.is_alive()
                mend()
                running.join()
                go_on()
            for line in (*lines, unaffected):
                line.close()
    finally:
        redis.kill()


def test_a_full_disk_fails_sessions_in_time_and_they_go_on_once_there_is_room(models: Path, tmp_path: Path):
    """With no room for a commit a session is told STORE_UNAVAILABLE after the patience, and resumes by itself later."""
    store = tmp_path / "sessions"
    with (
        serving(models, store=f"sqlite:{store}", store_patience_s=1) as server,
        cc.connect(server.address, resume_timeout=0) as hasty,
        cc.connect(server.address) as patient,
    ):
        lines = [Line(hasty, "hasty"), Line(patient, "patient")]
        for line in lines:
            line.go_on()
        written = tmp_path.joinpath("sessions-wal").stat().st_size
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
        waiting = threading.Thread(target=lines[1].go_on)
        waiting.start()
        with pytest.raises(cc.Unavailable) as told:
            lines[0].go_on()
        assert told.value.reason == "STORE_UNAVAILABLE"
        assert waiting.is_alive()
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        waiting.join()
        lines[1].go_on()
        with cc.connect(server.address) as again:
            resumed = Line(again, "hasty", resume=True, tokens=lines[0].tokens[:-3])
            assert resumed.session.next_index == 1
            resumed.go_on()
            resumed.close()
        lines[1].close()


def test_durability_drain(models: Path, tmp_path: Path):
    """Sessions go on after SIGTERM and a start; after SIGKILL each client is told whether its state was lost."""
    options = ("--store", f"sqlite:{tmp_path / 'sessions'}", "--durability", "drain")
    with supervised(models, *options) as server, cc.connect(server.address) as client:
        lines = [Line(client, f"line-{number}") for number in range(3)]
        for line in lines:
            line.go_on()
        server.restart()
        for line in lines[:2]:
            line.go_on()
        new = Line(client, "new")
        new.go_on()
        server.kill()
        # One that had moved since it was written is lost, and so is one that never was; one that had not moved is not.
        for line in lines[:2]:
            with pytest.raises(cc.FailedPrecondition, match=r"is at chunk 1 on the server, which had answered"):
                line.go_on()
        with pytest.raises(cc.NotFound, match="answered up to chunk 1, is not on this server any more"):
            new.go_on()
        lines[2].go_on()
        lines[2].close()


def test_hundreds_of_sessions_in_the_memory_of_fifty(models: Path, tmp_path: Path):
    """500 open sessions, 50 of them in memory: each comes back on its next chunk, is listed, exported and branched."""
    with (
        serving(models, store=f"sqlite:{tmp_path / 'sessions'}", cold_after_s=0.3, max_sessions=50) as server,
        cc.connect(server.address) as client,
    ):
        lines = [Line(client, f"line-{number:03}") for number in range(500)]

        def go_on() -> None:
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(Line.go_on, lines))
            assert client.model("speaker").statistics.open_sessions <= 50

        for _ in range(2):
            go_on()
        time.sleep(1)
        assert client.model("speaker").statistics.open_sessions == 0
        found = client.sessions()
        assert [(each.session_id, each.next_index, each.attached) for each in found] == [
            (line.session.id, 2, True) for line in lines
        ]
        state = client.get_state("line-007")
        client.put_state(state, session_id="copy")
        client.fork("line-007", new_id="branch")
        for name in ("copy", "branch"):
            Line(client, name, resume=True, tokens=lines[7].tokens).go_on()
        go_on()
