"""Policies: where the server cuts blocks, as a function of the stream and never of the chunks."""

from dataclasses import dataclass

from carousel_protos.v1.manifest_pb2 import Manifest, Policy, PolicyKind
from carousel_server.errors import PolicyError

CAUSAL = PolicyKind.POLICY_KIND_CAUSAL
CARRY = PolicyKind.POLICY_KIND_CARRY
LOOKAHEAD = PolicyKind.POLICY_KIND_LOOKAHEAD
FULL = PolicyKind.POLICY_KIND_FULL


@dataclass(frozen=True, slots=True)
class Blocking:
    """A policy as a rule for blocks.

    `block` 0 stands for the client's chunk (causal and carry). All counts are frames.
    """

    kind: PolicyKind.ValueType
    block: int = 0
    ahead: int = 0

    def final(self, received: int, *, ended: bool) -> int:
        """How many of a stream's first `received` frames have their answer settled."""
        if ended:
            return received
        if self.kind == FULL:
            return 0
        if self.block:
            return max(0, received - self.ahead) // self.block * self.block
        return received

    def cut(self, waiting: int) -> tuple[int, int]:
        """The next block and its ahead frames, where `waiting` frames are there and at least one is due."""
        block = min(self.block or waiting, waiting)
        return block, min(self.ahead, waiting - block)

    def message(self) -> Policy:
        return Policy(kind=self.kind, block=self.block, ahead=self.ahead)

    def __str__(self) -> str:
        name = PolicyKind.Name(self.kind).removeprefix("POLICY_KIND_").lower()
        if self.kind == LOOKAHEAD:
            return f"{name}({self.block}, {self.ahead})"
        return f"{name}({self.block})" if self.block else name


def choose_blocking(asked: Policy | None, manifest: Manifest, *, max_block: int) -> Blocking:
    """The rule for what a session asks, the bundle's default where it asks nothing.

    Raises `PolicyError` for a kind that the bundle does not allow, and for sizes that make no sense.
    """
    if asked is not None and not asked.kind and (asked.block or asked.ahead):
        raise PolicyError("a policy with a block or ahead names its kind too; set it, or leave the policy out")
    policy = asked if asked is not None and asked.kind else manifest.default_policy
    allowed = {known.kind: known for known in manifest.policies}
    if policy.kind not in allowed:
        names = ", ".join(PolicyKind.Name(kind).removeprefix("POLICY_KIND_").lower() for kind in allowed)
        raise PolicyError(f"{manifest.name} does not allow policy {_name(policy.kind)}; it allows {names}")
    block, ahead = policy.block, policy.ahead
    if policy.kind == LOOKAHEAD and block == 0:
        if ahead:
            raise PolicyError("lookahead needs a block of at least 1 frame beside its ahead frames")
        block, ahead = allowed[LOOKAHEAD].block, allowed[LOOKAHEAD].ahead
    elif policy.kind == CARRY and block == 0:
        block = allowed[CARRY].block
    if (block and policy.kind in (CAUSAL, FULL)) or (ahead and policy.kind != LOOKAHEAD):
        raise PolicyError(f"policy {_name(policy.kind)} takes no such block or ahead; leave them out")
    if policy.kind == LOOKAHEAD and ahead < manifest.right_context:
        raise PolicyError(
            f"lookahead({block}, {ahead}) has too few frames ahead: the convolutions of {manifest.name} need "
            f"{manifest.right_context}"
        )
    if block + ahead > max_block:
        raise PolicyError(
            f"block {block} and ahead {ahead} are {block + ahead} frames together; {max_block} are allowed"
        )
    return Blocking(policy.kind, block, ahead)


def _name(kind: PolicyKind.ValueType) -> str:
    return PolicyKind.Name(kind).removeprefix("POLICY_KIND_").lower() if kind in PolicyKind.values() else str(kind)
