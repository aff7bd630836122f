"""Who is compared: Carousel in two ways, three servers by hand, and Triton where it can be had."""

import sys
from pathlib import Path

from bench import environments
from bench.models import Exported
from bench.names import BY_HAND, EAGER, OWN, QUEUE, SHARED
from bench.peers.triton import server as triton
from bench.servers import Peer


def carousel(exported: Exported, wire: str = "own") -> Peer:
    """`carousel serve` as it is, but for the sessions that it may hold and the wait at its end."""
    command = str(Path(sys.executable).with_name("carousel"))
    options = {"models": exported.folder, "listen": "127.0.0.1:0", "drain-timeout": 0, "max-sessions": 20_000}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return Peer(OWN if wire == "own" else SHARED, wire, (command, "serve", *flags), ready=r"serving \S+ version")


def queue(exported: Exported) -> Peer:
    return _by_hand(QUEUE, "bench.peers.by_hand_queue", exported)


def _by_hand(name: str, module: str, exported: Exported, *options: str) -> Peer:
    command = (sys.executable, "-m", module, "--graph", str(exported.graph), "--model", exported.name, *options)
    return Peer(name, "plain", command)


def triton_reason() -> str:
    """Why Triton is not among them; empty where it is."""
    return environments.TRITON.ready()


def lineup(exported: Exported, *, with_triton: bool) -> list[Peer]:
    """All that one round compares, in the order in which they take turns."""
    peers = [
        carousel(exported, "own"),
        queue(exported),
        carousel(exported, "shared"),
        _by_hand(BY_HAND, "bench.peers.by_hand", exported),
        _by_hand(EAGER, "bench.peers.by_hand", exported, "--engine", "eager"),
    ]
    if with_triton:
        peers.insert(1, triton.peer(environments.TRITON, exported, triton.Settings()))
    return peers
