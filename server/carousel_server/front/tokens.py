"""Who may call what: principals, and the tokens that they are known by.

The file is TOML, a line for each principal:

    anna = { scopes = ["infer"], sha256 = "9f86d0…", max_sessions = 100, max_rows = 64 }

`sha256` is that of the token, or a list where there are several (an old and a new one). A principal without it is known
by a client's certificate. A token is 256 random bits: nobody finds it by trying, so that a plain SHA-256 keeps it as
well as a salted, slow hash would, which is there for passwords that people choose, and would cost every call.
"""

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from carousel_server.errors import ConfigError

Scope = Literal["infer", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))

_PREFIX = "carousel_"  # for those who search logs and repositories for secrets
_BYTES = 32
_KEYS = {"scopes", "sha256", "max_sessions", "max_rows"}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. None as a limit: only the server's own holds."""

    name: str
    scopes: frozenset[Scope] = SCOPES
    # Sessions open at once.
    max_sessions: int | None = None
    # Rows of Infer requests that wait for their answer at once.
    max_rows: int | None = None
    # Of each of its tokens.
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What the file says.

    A look-up compares with every token, in a time that does not tell how near a wrong one is: 60 µs for 1,000 tokens.
    """

    principals: dict[str, Principal]

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """Raises `ConfigError` for a file that cannot be read, and for anything in it that has no meaning."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--tokens {path} cannot be read ({error.strerror}); `carousel token` makes its lines"
            ) from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--tokens {path} is not TOML: {error}; `carousel token` makes its lines") from error
        try:
            principals = {name: _principal(name, entry) for name, entry in table.items()}
            _refuse_shared(principals.values())
        except ValueError as error:
            raise ConfigError(f"--tokens {path}: {error}") from error
        return cls(principals)

    def find(self, token: str) -> Principal | None:
        """Whose token it is."""
        return self.find_digest(digest(token))

    def find_digest(self, wanted: bytes) -> Principal | None:
        """Whose token has this SHA-256."""
        found = None
        for principal in self.principals.values():
            for known in principal.digests:
                if hmac.compare_digest(known, wanted):
                    found = principal
        return found

    def certified(self, name: str) -> Principal | None:
        """The principal that a certificate stands for, which is one without tokens."""
        principal = self.principals.get(name)
        return principal if principal is not None and not principal.digests else None


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def make_token() -> str:
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def line(name: str, scopes: Iterable[str], token: str) -> str:
    """The file's line for a principal and its token. Raises `ConfigError` for a name that cannot be one."""
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    return f'{key} = {{ scopes = {json.dumps(sorted(set(scopes)))}, sha256 = "{digest(token).hex()}" }}'


def check_name(name: str) -> None:
    """Raise `ValueError` for what cannot be a principal's name."""
    if not 1 <= len(name) <= 256 or not name.isprintable():
        raise ValueError(f"principal {name[:64]!r}: a name has 1 to 256 printable characters")


def _principal(name: str, entry: Any) -> Principal:
    check_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f'{name} must be a table, such as {name} = {{ scopes = ["infer"], sha256 = "…" }}')
    if unknown := sorted(entry.keys() - _KEYS):
        raise ValueError(f"{name} has an unknown key {unknown[0]!r}; there are {', '.join(sorted(_KEYS))}")
    scopes = entry.get("scopes")
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise ValueError(f'{name}: scopes must be a list of "infer" and "admin"')
    hashes = entry.get("sha256", [])
    hashes = hashes if isinstance(hashes, list) else [hashes]
    if not all(isinstance(text, str) and re.fullmatch(r"[0-9a-fA-F]{64}", text) for text in hashes):
        raise ValueError(f"{name}: sha256 must be 64 hexadecimal digits, or a list of such")
    for key in ("max_sessions", "max_rows"):
        value = entry.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name}: {key} must be a whole number, 0 or greater")
    return Principal(
        name, frozenset(scopes), entry.get("max_sessions"), entry.get("max_rows"), tuple(map(bytes.fromhex, hashes))
    )


def _refuse_shared(principals: Iterable[Principal]) -> None:
    owner: dict[bytes, str] = {}
    for principal in principals:
        for known in principal.digests:
            if owner.setdefault(known, principal.name) != principal.name:
                raise ValueError(f"{owner[known]} and {principal.name} have the same token; make one for each")
