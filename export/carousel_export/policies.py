"""The four policies: how blocks, frames ahead and recurrent state relate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from carousel_export.errors import PolicyError
from carousel_protos.v1 import manifest_pb2 as pb


@dataclass(frozen=True)
class Piece:
    """Frames that the model is run on at once: `block` of them from `start` on, then `ahead` more as right context."""

    start: int
    block: int
    ahead: int = 0


@dataclass(frozen=True)
class Causal:
    """Carry the state; no backward direction anywhere, so any cut of the stream gives the same answer."""

    def pieces(self, frames: int, cuts: Sequence[int] = ()) -> list[Piece]:
        """A stream of `frames` cut as the client cut it; without cuts, one piece."""
        return list(_cut(frames, cuts))


@dataclass(frozen=True)
class Carry:
    """Feed both directions' state back block by block, as eager PyTorch does when it is called chunk by chunk.

    `block` frames at once; without it, each client chunk is a block.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise PolicyError(f"carry has block {self.block}; give at least 1, or none for the client's chunks")

    def pieces(self, frames: int, cuts: Sequence[int] = ()) -> list[Piece]:
        """Blocks of the policy's own size, or the client's chunks."""
        return list(_cut(frames, cuts if self.block is None else [self.block] * -(-frames // self.block)))


@dataclass(frozen=True)
class Lookahead:
    """Latency-controlled bidirectional layers (Zhang et al. 2016): backward starts `ahead` frames after each block."""

    block: int
    ahead: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.ahead < 0:
            raise PolicyError(f"lookahead has block {self.block} and ahead {self.ahead}; give block ≥ 1 and ahead ≥ 0")

    def pieces(self, frames: int, cuts: Sequence[int] = ()) -> list[Piece]:  # noqa: ARG002 - the stream is re-blocked
        """Blocks of the policy's own size, whatever the chunks are; the last ones have what frames ahead there are."""
        blocks = _cut(frames, [self.block] * -(-frames // self.block))
        return [
            Piece(piece.start, piece.block, min(self.ahead, frames - piece.start - piece.block)) for piece in blocks
        ]


@dataclass(frozen=True)
class Full:
    """Buffer to the end, then run once: the offline answer."""

    def pieces(self, frames: int, cuts: Sequence[int] = ()) -> list[Piece]:  # noqa: ARG002 - the stream is buffered
        """The whole stream."""
        return [Piece(0, frames)]


Policy = Causal | Carry | Lookahead | Full


def to_message(policy: Policy) -> pb.Policy:
    """The policy as the manifest has it."""
    match policy:
        case Causal():
            return pb.Policy(kind=pb.POLICY_KIND_CAUSAL)
        case Carry(block):
            return pb.Policy(kind=pb.POLICY_KIND_CARRY, block=block or 0)
        case Lookahead(block, ahead):
            return pb.Policy(kind=pb.POLICY_KIND_LOOKAHEAD, block=block, ahead=ahead)
        case Full():
            return pb.Policy(kind=pb.POLICY_KIND_FULL)


def from_message(message: pb.Policy) -> Policy:
    """The policy that a manifest has. Raises `PolicyError` for a kind that this version does not know."""
    match message.kind:
        case pb.POLICY_KIND_CAUSAL:
            return Causal()
        case pb.POLICY_KIND_CARRY:
            return Carry(message.block or None)
        case pb.POLICY_KIND_LOOKAHEAD:
            return Lookahead(message.block, message.ahead)
        case pb.POLICY_KIND_FULL:
            return Full()
    raise PolicyError(f"policy kind {message.kind} is not known to this version; export the model again")


def to_json(policy: Policy) -> dict[str, str | int]:
    """The policy as parity.json and golden.safetensors have it: the manifest's fields, each one present."""
    message = to_message(policy)
    return {"kind": pb.PolicyKind.Name(message.kind), "block": message.block, "ahead": message.ahead}


def named(policies: Sequence[Policy]) -> str:
    """Their kinds, as "causal, carry, full"."""
    return ", ".join(type(policy).__name__.lower() for policy in policies)


def _cut(frames: int, sizes: Sequence[int]) -> Iterator[Piece]:
    start = 0
    for size in [*sizes, frames]:
        if block := min(size, frames - start):
            yield Piece(start, block)
        start += block
