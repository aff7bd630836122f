"""`--store`'s value as a store."""

from pathlib import Path

from carousel_server.errors import ConfigError
from carousel_server.store.memory import MemoryStore
from carousel_server.store.store import TIMEOUT_S, Store


def open_store(spec: str, *, timeout_s: float = TIMEOUT_S) -> Store:
    """The store that `spec` names; each of its calls has `timeout_s` seconds.

    `memory`; `sqlite:FILE`, with `?synchronous=normal` for commits that a loss of power may undo, though no crash of
    the process; `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]`, with `?prefix=…` for its keys, or the same with `rediss://`
    for TLS, which also knows `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`. Raises `ConfigError`.
    """
    kind, colon, rest = spec.partition(":")
    match kind:
        case "memory" if not colon:
            return MemoryStore()
        case "sqlite" if rest:
            from carousel_server.store.sqlite import SqliteStore  # noqa: PLC0415 - a server without it never needs it

            file, _, query = rest.partition("?")
            return SqliteStore(Path(file), synchronous=_synchronous(query), timeout_s=timeout_s)
        case "redis" | "rediss" if rest.startswith("//"):
            from carousel_server.store.redis import RedisStore  # noqa: PLC0415 - nor this client

            return RedisStore.from_url(spec, timeout_s=timeout_s)
    # What was given may hold a password in the wrong place, so it is not said back.
    raise ConfigError("the store must be memory, sqlite:FILE, redis://HOST:PORT or rediss://HOST:PORT")


def _synchronous(query: str) -> str:
    match query.partition("="):
        case ("", _, _):
            return "full"
        case ("synchronous", _, "full" | "normal" as level):
            return level
    raise ConfigError(
        f"the store's file is followed by ?{query}: only ?synchronous=full and ?synchronous=normal are known"
    )
