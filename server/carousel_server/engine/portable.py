"""The envelope of a session's state: its format, and a checksum that a flipped bit does not pass."""

from hashlib import sha256

from google.protobuf.message import DecodeError

from carousel_protos.v1.state_pb2 import PortableState, SessionState
from carousel_server.errors import StateDamagedError, StateFormatError

FORMAT = 1


def seal(state: SessionState) -> bytes:
    """The state as a `PortableState`, serialized."""
    body = state.SerializeToString()
    return PortableState(format=FORMAT, state=body, sha256=sha256(body).digest()).SerializeToString()


def unseal(data: bytes) -> SessionState:
    """What `seal` was given. Raises `StateDamagedError` and `StateFormatError`."""
    try:
        envelope = PortableState.FromString(data)
    except DecodeError as error:
        raise _damaged("is no carousel.v1.PortableState") from error
    _check_format(envelope.format)
    body = envelope.state
    if sha256(body).digest() != envelope.sha256:
        raise _damaged("is not what was written (its sha256 differs)")
    try:
        state = SessionState.FromString(body)
    except DecodeError as error:
        raise _damaged("holds no carousel.v1.SessionState") from error
    _check_format(state.format)
    return state


def _check_format(found: int) -> None:
    if found > FORMAT:
        raise StateFormatError(
            f"the state has format {found} and this server reads up to {FORMAT}; put it into a newer server",
            format=found,
            supported=FORMAT,
        )
    if found == 0:
        raise _damaged("names no format")


def _damaged(what: str) -> StateDamagedError:
    return StateDamagedError(f"the state {what}; send the bytes that GetState or `carousel sessions export` gave")
