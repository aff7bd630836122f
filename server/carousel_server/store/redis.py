"""Records in a Redis or a Valkey that replicas share.

What survives there is for its own settings to say: `appendonly yes` for its end, with `appendfsync always` also for a
loss of power, and the `maxmemory-policy` must be `noeviction`, or it forgets sessions when it is full.
"""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from carousel_server.errors import ConfigError
from carousel_server.store.store import TIMEOUT_S, Record, failed

_PREFIX = "carousel:"
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CONNECTIONS = 16
# A connection that broke while it was idle is made anew; beyond that, the caller is told.
_RETRIES = 3
_SWEPT_AT_ONCE = 1000

# Keys, below the prefix: `session:ID` is a record, with a TTL. `live` and `live:OWNER` are sorted sets of live
# sessions' ids, for lists; `due` has OWNER NUL ID by the minute in which the record has surely expired, for `sweep`,
# which takes from the lists what the TTL has deleted.
#
# `write` numbers the calls of one store object: a commit that was given up, and that a slow server runs after the
# commit that followed it, changes nothing.
_COMMIT = """
local prefix, holder, write = ARGV[1], ARGV[2], tonumber(ARGV[3])
local refused = {}
for at = 4, #ARGV, 9 do
  local id, epoch, owner, model, version, gone, expires_at, due, payload = unpack(ARGV, at, at + 8)
  local key = prefix .. 'session:' .. id
  local stored = redis.call('HMGET', key, 'holder', 'epoch', 'gone', 'write', 'owner')
  local own = stored[1] == holder and tonumber(stored[2]) <= tonumber(epoch)
  local buried = stored[1] and stored[3] ~= '' and tonumber(stored[2]) < tonumber(epoch)
  if stored[1] and not own and not buried then
    table.insert(refused, id)
  elseif not own or tonumber(stored[4]) <= write then
    if stored[1] and (stored[5] ~= owner or gone ~= '') then
      redis.call('ZREM', prefix .. 'live:' .. stored[5], id)
      redis.call('ZREM', prefix .. 'live', id)
      redis.call('ZREM', prefix .. 'due', stored[5] .. '\\0' .. id)
    end
    redis.call('HSET', key, 'holder', holder, 'write', write, 'epoch', epoch, 'owner', owner, 'model', model,
      'version', version, 'payload', payload, 'gone', gone, 'expires_at', expires_at)
    redis.call('PEXPIREAT', key, math.floor(tonumber(expires_at) * 1000))
    if gone == '' then
      redis.call('ZADD', prefix .. 'live', 0, id)
      redis.call('ZADD', prefix .. 'live:' .. owner, 0, id)
      redis.call('ZADD', prefix .. 'due', due, owner .. '\\0' .. id)
    end
  end
end
return refused
"""
_FIELDS = ("epoch", "owner", "model", "version", "payload", "gone", "expires_at")
_NAMES = ", ".join(f"'{name}'" for name in _FIELDS)
_CLAIM = f"""
local key = ARGV[1] .. 'session:' .. ARGV[4]
if ARGV[5] ~= '' and redis.call('HGET', key, 'epoch') ~= ARGV[5] then
  return {{}}
end
if redis.call('HGET', key, 'gone') == '' then
  redis.call('HINCRBY', key, 'epoch', 1)
  redis.call('HSET', key, 'holder', ARGV[2], 'write', ARGV[3])
end
return redis.call('HMGET', key, {_NAMES})
"""
_DROP = """
local prefix, id = ARGV[1], ARGV[2]
local key = prefix .. 'session:' .. id
local owner = redis.call('HGET', key, 'owner')
if not owner then
  return 0
end
redis.call('ZREM', prefix .. 'live', id)
redis.call('ZREM', prefix .. 'live:' .. owner, id)
redis.call('ZREM', prefix .. 'due', owner .. '\\0' .. id)
return redis.call('DEL', key)
"""
_SWEEP = """
local prefix, freed = ARGV[1], 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'due', '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])) do
  local nul = string.find(member, '\0', 1, true)
  local owner, id = string.sub(member, 1, nul - 1), string.sub(member, nul + 1)
  local stored = redis.call('HMGET', prefix .. 'session:' .. id, 'owner', 'gone')
  local live = stored[2] == ''
  if not live then
    redis.call('ZREM', prefix .. 'live', id)
  end
  if not live or stored[1] ~= owner then
    redis.call('ZREM', prefix .. 'live:' .. owner, id)
    redis.call('ZREM', prefix .. 'due', member)
    freed = freed + 1
  end
end
return freed
"""


class RedisStore:
    """See `Store`. Scripts decide who may write; each call is one of them, in one round trip.

    Their keys follow from their arguments, so a Redis Cluster is not one of the servers this works with.
    """

    def __init__(self, pool: BlockingConnectionPool, name: str, *, prefix: str, timeout_s: float) -> None:
        self.name = name
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._holder = uuid4().hex
        self._writes = itertools.count(1)
        self._redis = Redis(connection_pool=pool)
        self._scripts = {text: self._redis.register_script(text) for text in (_COMMIT, _CLAIM, _DROP, _SWEEP)}

    @classmethod
    def from_url(cls, url: str, *, timeout_s: float = TIMEOUT_S) -> "RedisStore":
        """`open_store` says what the URL may be. Connects when it is first used. Raises `ConfigError`."""
        # What urlsplit would say of a wrong URL can be a piece of its password.
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "localhost", parts.port or 6379
            options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query), max_num_fields=8))
            db = int(parts.path.strip("/") or 0)
            if parts.fragment:
                raise ValueError
        except ValueError:
            raise ConfigError(
                "the store's URL cannot be read: it must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], "
                "and signs such as / # ? @ in a password are written as %2F %23 %3F %40"
            ) from None
        tls = parts.scheme == "rediss"
        prefix = options.pop("prefix", _PREFIX)
        for name, value in options.items():
            if name not in _TLS_FILES or not tls:
                known = ", ".join(("prefix", *(_TLS_FILES if tls else ())))
                raise ConfigError(f"the store's URL asks for what is not known: {parts.scheme}:// knows only {known}")
            if not Path(value).is_file():
                raise ConfigError(f"the store's URL has {name}={value}: there is no such file")
        connection: dict[str, Any] = {
            "host": host,
            "port": port,
            "db": db,
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password) if parts.password else None,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.2), _RETRIES),
            "protocol": 2,
            **options,
        }
        pool = BlockingConnectionPool(
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            connection_class=SSLConnection if tls else Connection,
            **connection,
        )
        return cls(pool, f"{parts.scheme}://{host}:{port}/{db}", prefix=prefix, timeout_s=timeout_s)

    async def commit(self, records: Sequence[Record]) -> set[str]:
        fields: list[str | int | float | bytes] = []
        for record in records:
            fields += (record.session_id, record.epoch, record.owner, record.model, record.version, record.gone)
            fields += (record.expires_at, math.ceil(record.expires_at / 60), record.payload)
        refused = await self._run(_COMMIT, self._holder, next(self._writes), *fields)
        return {session_id.decode() for session_id in refused}

    async def claim(self, session_id: str, *, epoch: int | None = None) -> Record | None:
        expected = "" if epoch is None else epoch
        values = await self._run(_CLAIM, self._holder, next(self._writes), session_id, expected)
        return _record(session_id, values) if values else None

    async def read(self, session_id: str) -> Record | None:
        return _record(session_id, await self._call(self._redis.hmget(self._key(session_id), _FIELDS)))

    async def list(self, owner: str | None, *, limit: int, after: str = "") -> list[Record]:
        index = f"{self._prefix}live" if owner is None else f"{self._prefix}live:{owner}"
        found: list[Record] = []
        while len(found) < limit:
            first, most = f"({after}" if after else "-", limit - len(found)
            ids = [member.decode() for member in await self._call(self._redis.zrangebylex(index, first, "+", 0, most))]
            for session_id, values in zip(ids, await self._call(self._look(ids)), strict=True):
                record = _record(session_id, values)
                # The lists have what expired, or was opened by another owner since, until it is swept.
                if record is not None and not record.gone and owner in (None, record.owner):
                    found.append(record)
            if len(ids) < most:
                break
            after = ids[-1]
        return found

    async def drop(self, session_id: str) -> bool:
        return bool(await self._run(_DROP, session_id))

    async def sweep(self, now: float) -> int:
        swept = 0
        while True:
            freed: int = await self._run(_SWEEP, int(now // 60), _SWEPT_AT_ONCE)
            swept += freed
            if freed < _SWEPT_AT_ONCE:
                return swept

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    def _key(self, session_id: str) -> str:
        return f"{self._prefix}session:{session_id}"

    async def _look(self, ids: Sequence[str]) -> Sequence[Sequence[bytes | None]]:
        fields = [b"" if name == "payload" else name for name in _FIELDS]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for session_id in ids:
                pipeline.hmget(self._key(session_id), fields)
            answers: Sequence[Sequence[bytes | None]] = await pipeline.execute()
            return answers

    async def _run(self, script: str, *arguments: str | int | float | bytes) -> Any:  # what a script answers
        return await self._call(self._scripts[script](args=[self._prefix, *arguments]))

    async def _call(self, answer: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError as error:
            raise failed(self.name, f"no answer within {self._timeout_s:g} s") from error
        except (RedisError, OSError) as error:
            raise failed(self.name, str(error)) from error


def _record(session_id: str, values: Sequence[bytes | None]) -> Record | None:
    """A record from its `_FIELDS`."""
    epoch, owner, model, version, payload, gone, expires_at = (value or b"" for value in values)
    if not epoch:
        return None
    return Record(
        session_id=session_id,
        epoch=int(epoch),
        owner=owner.decode(),
        model=model.decode(),
        version=version.decode(),
        payload=payload,
        gone=gone.decode(),
        expires_at=float(expires_at),
    )
