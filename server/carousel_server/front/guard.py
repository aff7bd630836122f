"""Who calls, and whether they may: the one place that decides."""

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from carousel_server.access import Access
from carousel_server.errors import (
    AdminPortError,
    ConfigError,
    QueueFullError,
    ScopeError,
    UnauthenticatedError,
)
from carousel_server.front.files import stamp, warn_if_readable
from carousel_server.front.scopes import ADMIN, needed
from carousel_server.front.tokens import Principal, Scope, Tokens, digest

log = logging.getLogger("carousel")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

# Seconds between two looks at the tokens' file.
_LOOK_S = 1.0

# Where nobody has to say who calls.
_ANYBODY = Principal("")
_caller: contextvars.ContextVar[Principal] = contextvars.ContextVar("caller", default=_ANYBODY)


def caller() -> Principal:
    """Who makes the call that is being handled; anybody where nothing guards the server."""
    return _caller.get()


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a call was admitted with; `digest` is of its token, if it came with one."""

    principal: Principal
    digest: bytes | None = None


class Guard:
    """Knows callers by their token or certificate. Raises `ConfigError` for a file of tokens that cannot be used."""

    def __init__(self, access: Access) -> None:
        self._path = access.tokens
        self._certificates = access.tls_client_ca is not None
        self._tokens: Tokens | None = None
        if self._path is not None:
            self._seen = stamp(self._path)
            self._tokens = Tokens.read(self._path)
            warn_if_readable(self._path, "what identifies callers")
        # Streams that last, by what is set when their token is withdrawn.
        self._streams: dict[asyncio.Future[None], tuple[Ticket, frozenset[Scope]]] = {}
        self._rows: Counter[str] = Counter()
        self._refused = 0
        self._refused_last = ""
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch the file of tokens."""
        if self._path is not None:
            self._watcher = asyncio.create_task(self._watch(self._path), name="tokens")

    def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    # Calls

    def admit(self, method: str, context: Context, *, takes_admin: bool) -> Ticket:
        """Let a call in, on a port that `takes_admin` calls or does not.

        Raises `UnauthenticatedError`, `ScopeError`, `AdminPortError`.
        """
        scopes = needed(method)
        if not scopes:
            ticket = Ticket(Principal("", frozenset()))
        else:
            ticket = self._identify(context)
            if scopes == ADMIN and not takes_admin:
                raise AdminPortError(f"{_name(method)} is an admin call: make it on this server's --admin port")
            if not scopes & ticket.principal.scopes:
                wanted = " or ".join(sorted(scopes))
                raise ScopeError(
                    f"{_name(method)} needs the scope {wanted}, which {ticket.principal.name} has not; "
                    "use a token that has it",
                    scope=wanted,
                )
        _caller.set(ticket.principal)
        return ticket

    async def serve(self, method: str, ticket: Ticket, call: Coroutine[Any, Any, T]) -> T:
        """Run a stream's handler, until its token is withdrawn. Raises `UnauthenticatedError` then."""
        if self._tokens is None:
            return await call
        withdrawn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._streams[withdrawn] = (ticket, needed(method))
        task = asyncio.create_task(call, name=f"call of {method}")
        try:
            either: set[asyncio.Future[Any]] = {task, withdrawn}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise UnauthenticatedError("the token of this stream was withdrawn; ask for a new one")
        finally:
            del self._streams[withdrawn]
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _identify(self, context: Context) -> Ticket:
        token = _bearer(context.invocation_metadata())
        if self._tokens is None:
            return Ticket(Principal(_certified(context)) if self._certificates else _ANYBODY)
        if token is not None:
            hashed = digest(token)
            if (principal := self._tokens.find_digest(hashed)) is not None:
                return Ticket(principal, hashed)
            self._refuse(context, "the token is not one that this server knows; ask whoever runs it for one")
        if self._certificates and (principal := self._tokens.certified(_certified(context))) is not None:
            return Ticket(principal)
        self._refuse(context, "a token is needed: send it as `authorization: Bearer TOKEN`")
        raise AssertionError("refused")

    def _refuse(self, context: Context, why: str) -> None:
        # Counted and logged from time to time: who floods the server does not flood its log.
        self._refused += 1
        self._refused_last = context.peer()
        raise UnauthenticatedError(why)

    # Limits

    def max_sessions(self, owner: str) -> int | None:
        """Sessions that a principal may have open, by what the file says now."""
        return principal.max_sessions if (principal := self._principal(owner)) is not None else None

    @contextmanager
    def rows(self, count: int) -> Iterator[None]:
        """Rows of an Infer request, while they wait for an answer. Raises `QueueFullError` over the caller's limit."""
        name = caller().name
        principal = self._principal(name)
        waiting = self._rows[name]
        if principal is not None and principal.max_rows is not None and waiting + count > principal.max_rows:
            raise QueueFullError(
                f"{waiting} rows of {name} are waiting and {principal.max_rows} are allowed; try again with fewer",
                retry_after_s=0.1,
            )
        self._rows[name] += count
        try:
            yield
        finally:
            self._rows[name] -= count
            if not self._rows[name]:
                del self._rows[name]

    def _principal(self, name: str) -> Principal | None:
        return self._tokens.principals.get(name) if self._tokens is not None else None

    # The file

    async def _watch(self, path: Path) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._refused:
                log.warning(
                    "refused %d calls without a known token, the last from %s", self._refused, self._refused_last
                )
                self._refused = 0
            if (now := stamp(path)) != self._seen:
                self._seen = now
                self._reload(path)

    def _reload(self, path: Path) -> None:
        try:
            tokens = Tokens.read(path)
            warn_if_readable(path, "what identifies callers")
        except (ConfigError, OSError) as error:
            log.error("%s; what it said before holds on", error)
            return
        self._tokens = tokens
        ended = 0
        for withdrawn, (ticket, scopes) in self._streams.items():
            name = ticket.principal.name
            holds = tokens.find_digest(ticket.digest) if ticket.digest is not None else tokens.certified(name)
            kept = holds is not None and holds.name == name and scopes & holds.scopes
            if not kept and not withdrawn.done():
                withdrawn.set_result(None)
                ended += 1
        log.info("took the new %s; principals: %d, streams ended: %d", path, len(tokens.principals), ended)


def _name(method: str) -> str:
    return method.rpartition("/")[2]


def _bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":
                return token.strip()
    return None


def _certified(context: Context) -> str:
    """The name in a client's certificate: its SPIFFE ID, or its subject's common name.

    Raises `UnauthenticatedError` for a certificate without either.
    """
    properties = context.auth_context()
    for key in ("peer_spiffe_id", "x509_common_name"):
        for value in properties.get(key, ()):
            if name := value.decode("utf-8", "replace"):
                return name
    raise UnauthenticatedError("the certificate has no common name and no SPIFFE ID; use one that says whose it is")
