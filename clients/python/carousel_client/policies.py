"""Policies: how blocks, frames ahead and h/c relate, as a session asks for them."""

from dataclasses import dataclass

from carousel_protos.v1 import manifest_pb2
from carousel_protos.v1.manifest_pb2 import PolicyKind


@dataclass(frozen=True)
class Causal:
    """The state is carried; any cut of the stream gives the same answer."""


@dataclass(frozen=True)
class Carry:
    """Both directions' states are fed back after each `block` frames; None: the bundle's block, or else the chunk."""

    block: int | None = None


@dataclass(frozen=True)
class Lookahead:
    """The backward direction sees `block` frames and `ahead` more; None for both: what the bundle says."""

    block: int | None = None
    ahead: int | None = None

    def __post_init__(self) -> None:
        if (self.block is None) != (self.ahead is None):
            raise ValueError("Lookahead takes block and ahead together, or neither")


@dataclass(frozen=True)
class Full:
    """Every frame is kept to the end; then the model runs once."""


Policy = Causal | Carry | Lookahead | Full


def to_message(policy: Policy) -> manifest_pb2.Policy:
    match policy:
        case Causal():
            return manifest_pb2.Policy(kind=PolicyKind.POLICY_KIND_CAUSAL)
        case Carry(block):
            return manifest_pb2.Policy(kind=PolicyKind.POLICY_KIND_CARRY, block=block or 0)
        case Lookahead(block, ahead):
            return manifest_pb2.Policy(kind=PolicyKind.POLICY_KIND_LOOKAHEAD, block=block or 0, ahead=ahead or 0)
        case Full():
            return manifest_pb2.Policy(kind=PolicyKind.POLICY_KIND_FULL)


def from_message(message: manifest_pb2.Policy) -> Policy:
    """The policy that a server says a session has. Raises `ValueError` for a kind that this client does not know."""
    match message.kind:
        case PolicyKind.POLICY_KIND_CAUSAL:
            return Causal()
        case PolicyKind.POLICY_KIND_CARRY:
            return Carry(message.block or None)
        case PolicyKind.POLICY_KIND_LOOKAHEAD:
            return Lookahead(message.block, message.ahead)
        case PolicyKind.POLICY_KIND_FULL:
            return Full()
    raise ValueError(f"policy kind {message.kind} is not known to this client; install a newer one")
