"""Everything that can go wrong with a call, as one tree; a class for each gRPC status code."""

# ruff: noqa: N818 -- the classes bear the names of the gRPC codes, which users look up

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


class CarouselError(Exception):
    """A call that failed; the message is one sentence.

    `reason` is the server's stable word for it (such as `INDEX_GAP`; empty where it did not come from a Carousel
    server), `metadata` its details, `retry_after` the seconds after which the server says a retry can help.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


class NotFound(CarouselError):
    """No such model or session."""

    code = grpc.StatusCode.NOT_FOUND


class SessionNotFound(NotFound):
    """No such session; after a server without a store was restarted, none of those before."""


class SessionExpired(NotFound):
    """The session was there, and expired or was evicted."""


class AlreadyExists(CarouselError):
    """A session with this id is open already."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(CarouselError):
    """Not in this state: an index gap, a closed session, a closed client."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(CarouselError):
    """A newer stream or owner has taken the session."""

    code = grpc.StatusCode.ABORTED


class Fenced(Aborted):
    """Another client has resumed the session, and has it from then on."""


class InvalidArgument(CarouselError):
    """A shape, dtype, size or value that the model does not take."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class ResourceExhausted(CarouselError):
    """Over a limit of the server's, or of `max_message_bytes`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(CarouselError):
    """Nobody answers there, the connection broke, or the server is draining or still loading the model."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(CarouselError):
    """No answer within `timeout`."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(CarouselError):
    """The call was cancelled, mostly because the client was closed."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(CarouselError):
    """No credentials, or wrong ones."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(CarouselError):
    """Somebody else's session, or a call that these credentials do not allow."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(CarouselError):
    """The server does not know the call: no Carousel server, or an older one."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(CarouselError):
    """The server's own fault."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {kind.code.value[0]: kind for kind in CarouselError.__subclasses__()}
_BY_REASON = {"SESSION_EXPIRED": SessionExpired, "SESSION_NOT_FOUND": SessionNotFound, "FENCED": Fenced}


def from_status(status: status_pb2.Status) -> CarouselError:
    """The error that a `google.rpc.Status` stands for."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after = None
    for detail in status.details:
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        else:
            detail.Unpack(info)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(status.code, CarouselError)
    return kind(status.message, reason=info.reason, metadata=info.metadata, retry_after=retry_after)


def from_rpc(error: grpc.RpcError, target: str, *, connected: bool) -> CarouselError:
    """The error that a failed RPC to `target` stands for, whether the server said it or gRPC itself.

    `connected`: a server has answered there before.
    """
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "a failed RPC has a code"
    if (status := _said(error)) is not None:
        return from_status(status)
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        if connected:
            return Unavailable(f"the server at {target} is gone, or its connection broke; try again once it is back")
        why = f"no connection to {target} ({_why(details)})"
        return Unavailable(f"{why}; check the address, and that a server runs there")
    return _BY_CODE.get(code.value[0], CarouselError)(f"{target} answered {code.name}: {details}")


def _said(error: grpc.Call | grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """The server's own words. The call may have another code: a proxy that has passed them on may reset the stream."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None  # not a Carousel server's
    return None


_PLAIN = {
    "Connection refused": "nobody listens there",
    "errors resolving": "there is no such host; write HOST:PORT",
    "DNS resolution failed": "there is no such host; write HOST:PORT",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority that is trusted here",
    "Hostname Verification Check failed": "its certificate is for another name",
    "WRONG_VERSION_NUMBER": "what listens there speaks no TLS",
    "Socket closed": "it hung up; it may want TLS, or a certificate from its clients",
}


def _why(details: str) -> str:
    """gRPC's reason for a connection that did not come about, in plain words where it is a common one."""
    return next((words for known, words in _PLAIN.items() if known in details), details)
