"""How a policy cuts a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import carousel_export as cx
from carousel_export.policies import from_message, to_message

POLICIES = [cx.Causal(), cx.Carry(), cx.Carry(3), cx.Lookahead(4, 2), cx.Lookahead(1, 0), cx.Full()]


@given(policy=st.sampled_from(POLICIES), frames=st.integers(1, 60), cuts=st.lists(st.integers(1, 9)))
def test_every_frame_is_in_one_block(policy: cx.Policy, frames: int, cuts: list[int]) -> None:
    """Blocks follow each other without a gap, and no piece looks beyond the end or further ahead than allowed."""
    at = 0
    for piece in policy.pieces(frames, cuts):
        assert piece.start == at
        assert piece.block >= 1
        at += piece.block
        assert piece.ahead == (min(policy.ahead, frames - at) if isinstance(policy, cx.Lookahead) else 0)
    assert at == frames


@given(frames=st.integers(1, 60), cuts=st.lists(st.integers(1, 9)))
def test_own_blocks_ignore_the_cuts(frames: int, cuts: list[int]) -> None:
    """Lookahead, full and a carry with a block cut the stream alike however the client cut it; plain carry does not."""
    for policy in (cx.Carry(3), cx.Lookahead(4, 2), cx.Full()):
        assert policy.pieces(frames, cuts) == policy.pieces(frames)
    sizes = [piece.block for piece in cx.Carry().pieces(frames, cuts)]
    assert sizes[: len(cuts)] == cuts[: len(sizes)] or sum(cuts) > frames


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_manifest_round_trip(policy: cx.Policy) -> None:
    """A policy comes back from the manifest as it went in."""
    assert from_message(to_message(policy)) == policy
