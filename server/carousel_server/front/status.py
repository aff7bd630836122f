"""The error tree as google.rpc.Status: the one place where a reason meets a gRPC code."""

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from carousel_server.errors import (
    AlreadyExistsError,
    CarouselError,
    ExhaustedError,
    FencedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    shorten,
)

DOMAIN = "carousel"
# Characters of a message, and of a value in its metadata; gRPC drops a status whose metadata is over 8 KB.
_MESSAGE, _METADATA = 1000, 200
_CODES = {
    NotFoundError: Code.NOT_FOUND,
    AlreadyExistsError: Code.ALREADY_EXISTS,
    PreconditionError: Code.FAILED_PRECONDITION,
    FencedError: Code.ABORTED,
    InvalidError: Code.INVALID_ARGUMENT,
    ExhaustedError: Code.RESOURCE_EXHAUSTED,
    UnavailableError: Code.UNAVAILABLE,
    UnauthenticatedError: Code.UNAUTHENTICATED,
    ForbiddenError: Code.PERMISSION_DENIED,
}


def to_status(error: CarouselError) -> Status:
    """Code, message, ErrorInfo with the stable reason, and RetryInfo where a retry can help."""
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), Code.INTERNAL)
    metadata = {key: _clean(value, _METADATA) for key, value in error.metadata.items()}
    details = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.retry_after_s is not None:
        delay = Duration(nanos=round(error.retry_after_s * 1e9) % 10**9, seconds=int(error.retry_after_s))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=code, message=_clean(str(error), _MESSAGE))
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _clean(text: str, most: int) -> str:
    """One line that any terminal and any log can take, whatever a client's own words in it are."""
    text = shorten(text, most)
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
