"""Everything that the server can say no with. `front/status.py` maps the tree to gRPC codes, once."""


class CarouselError(Exception):
    """A refusal or failure that a client is told of.

    The message is one sentence that says what came, what was wanted, and how to mend it. `reason` is stable and goes
    into google.rpc.ErrorInfo, with `metadata`; `retry_after_s` becomes RetryInfo.
    """

    reason = "INTERNAL"

    def __init__(self, message: str, *, retry_after_s: float | None = None, **metadata: str | int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.metadata = {key: str(value) for key, value in metadata.items()}


def shorten(text: str, most: int = 64) -> str:
    """A client's own words, short enough to be said back to it."""
    return text if len(text) <= most else text[: most - 1] + "…"


class NotFoundError(CarouselError):
    reason = "NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    reason = "MODEL_NOT_FOUND"


class SessionNotFoundError(NotFoundError):
    reason = "SESSION_NOT_FOUND"


class SessionExpiredError(NotFoundError):
    reason = "SESSION_EXPIRED"


class AlreadyExistsError(CarouselError):
    reason = "SESSION_EXISTS"


class PreconditionError(CarouselError):
    reason = "FAILED_PRECONDITION"


class IndexGapError(PreconditionError):
    reason = "INDEX_GAP"


class SessionClosedError(PreconditionError):
    reason = "SESSION_CLOSED"


class SessionDetachedError(PreconditionError):
    reason = "SESSION_DETACHED"


class SessionDiffersError(PreconditionError):
    """What a resume asks is not what the session has."""

    reason = "SESSION_DIFFERS"


class StateFormatError(PreconditionError):
    """A state that a newer version wrote."""

    reason = "STATE_FORMAT"


class ModelDiffersError(PreconditionError):
    """The model has changed under a state: it is of another, of other weights, or of a version that is not served."""

    reason = "MODEL_DIFFERS"


class SignatureDiffersError(PreconditionError):
    """A state whose tensors mean nothing to this model."""

    reason = "SIGNATURE_DIFFERS"


class RetiredError(PreconditionError):
    """A version that was unloaded: it takes no new sessions, or the time of those it had is over."""

    reason = "MODEL_RETIRED"


class MoveError(PreconditionError):
    """There is no version that sessions could move to."""

    reason = "CANNOT_MOVE"


class FencedError(CarouselError):
    reason = "FENCED"


class InvalidError(CarouselError):
    reason = "INVALID_ARGUMENT"


class TensorError(InvalidError):
    reason = "BAD_TENSOR"


class StateDamagedError(InvalidError):
    """Bytes that are no session's state, or no longer."""

    reason = "STATE_DAMAGED"


class TooShortError(InvalidError):
    """A sequence with fewer frames than the model can be run on."""

    reason = "TOO_SHORT"


class PolicyError(InvalidError):
    reason = "POLICY_NOT_ALLOWED"


class VariantError(InvalidError):
    reason = "VARIANT_NOT_FOUND"


class InputRejectedError(InvalidError):
    """The model itself refused this row's values, alone as well as in a batch."""

    reason = "INPUT_REJECTED"


class UnauthenticatedError(CarouselError):
    """No credentials, or wrong ones."""

    reason = "UNAUTHENTICATED"


class ForbiddenError(CarouselError):
    reason = "PERMISSION_DENIED"


class ScopeError(ForbiddenError):
    """A call that the caller's token does not allow."""

    reason = "SCOPE_MISSING"


class AdminPortError(ForbiddenError):
    """An admin call, on a port that does not take them."""

    reason = "ADMIN_PORT"


class NotOwnerError(ForbiddenError):
    """Somebody else's session."""

    reason = "NOT_OWNER"


class ExhaustedError(CarouselError):
    reason = "RESOURCE_EXHAUSTED"


class TooManySessionsError(ExhaustedError):
    reason = "TOO_MANY_SESSIONS"


class QueueFullError(ExhaustedError):
    reason = "QUEUE_FULL"


class ContextFullError(ExhaustedError):
    reason = "CONTEXT_FULL"


class TooLargeError(ExhaustedError):
    reason = "TOO_LARGE"


class UnavailableError(CarouselError):
    reason = "UNAVAILABLE"


class DrainingError(UnavailableError):
    reason = "DRAINING"


class ModelLoadingError(UnavailableError):
    reason = "MODEL_LOADING"


class StoreError(UnavailableError):
    """The store was not reached, is full or took too long; whether the call took effect is not known."""

    reason = "STORE_UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1.0)


class StepError(CarouselError):
    """The model's run failed for a reason that is not this input's; the state has not moved."""

    reason = "STEP_FAILED"


class UndoneError(CarouselError):
    """The server has stopped, and left something undone."""

    reason = "UNDONE"


class LoadError(PreconditionError):
    """A bundle that cannot be served."""

    reason = "LOAD_FAILED"


class ConfigError(CarouselError):
    """A setting that cannot work; for the operator, never sent to a client."""

    reason = "CONFIG"
