"""The requests that both clients build alike."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carousel_client.errors import FailedPrecondition, ResourceExhausted, Unavailable
from carousel_client.policies import Policy, to_message
from carousel_client.session_state import new_session_id
from carousel_client.signature import Signature
from carousel_protos.v1.carousel_pb2 import (
    GetModelResponse,
    InferRequest,
    ModelState,
    Open,
    PutStateRequest,
    UnloadModelRequest,
)

# What a server takes by default.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# Seconds that a server may be gone before its sessions fail.
RESUME_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class SessionOptions:
    """What a caller asks of a session; `Client.session` says what each means."""

    model: str
    version: str
    policy: Policy | None
    session_id: str | None
    initial_state: Mapping[str, object] | None
    context: Mapping[str, object] | None
    timeout: float | None
    variant: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        if self.resume and not self.session_id:
            raise ValueError("resume takes up the session that session_id names; give both")

    def request(self, signature: Signature) -> Open:
        """Raises `InvalidArgument` for a state or a context that does not fit."""
        request = Open(
            session_id=self.session_id or new_session_id(),
            model=self.model,
            version=self.version,
            variant=self.variant,
            resume=self.resume,
            holder=secrets.token_hex(8),
        )
        if self.policy is not None:
            request.policy.CopyFrom(to_message(self.policy))
        signature.encode_state(request.initial_state, self.initial_state or {})
        signature.encode_context(request.context, self.context or {})
        return request


def read_signature(response: GetModelResponse) -> Signature:
    """Raises `Unavailable` or `FailedPrecondition` for a model that is not served now."""
    if response.HasField("manifest"):
        return Signature.read(response.manifest)
    status = response.status
    if status.state == ModelState.MODEL_STATE_LOADING:
        raise Unavailable(f"model {status.name!r} is loading; try again", retry_after=1.0)
    why = f" ({status.reason})" if status.reason else ""
    raise FailedPrecondition(f"version {status.version} of model {status.name!r} is not loaded{why}; load it first")


def infer_request(
    signature: Signature,
    inputs: object,
    lengths: Sequence[int] | None,
    version: str,
    variant: str,
    max_message_bytes: int,
) -> InferRequest:
    """Raises `InvalidArgument` for inputs that do not fit, `ResourceExhausted` for a message over the limit."""
    request = InferRequest(model=signature.model, version=version, variant=variant)
    request.lengths.extend(map(int, lengths if lengths is not None else ()))
    signature.encode_batch(request.tensors, inputs)
    if (size := request.ByteSize()) > max_message_bytes:
        raise ResourceExhausted(
            f"a call of {size} bytes is over max_message_bytes ({max_message_bytes}); send fewer rows, or raise it "
            "here and on the server"
        )
    return request


def put_request(state: bytes, session_id: str, version: str, move: bool, max_message_bytes: int) -> PutStateRequest:
    """Raises `ResourceExhausted` for a state over the limit."""
    request = PutStateRequest(state=state, session_id=session_id, version=version, move=move)
    if (size := request.ByteSize()) > max_message_bytes:
        raise ResourceExhausted(
            f"a state of {size} bytes is over max_message_bytes ({max_message_bytes}); raise it here and on the server"
        )
    return request


def drop_request(session_id: str) -> Open:
    """Takes a session up, so that it can be closed."""
    return Open(session_id=session_id, resume=True)


def unload_request(model: str, version: str, deadline: float | None, move: bool, move_to: str) -> UnloadModelRequest:
    return UnloadModelRequest(model=model, version=version, deadline_s=deadline, move=move, move_to=move_to)
