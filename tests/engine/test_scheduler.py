"""The scheduler, driven without a clock or a model."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from carousel_server.engine.context import NO_CONTEXT, Context
from carousel_server.engine.frames import Piece
from carousel_server.engine.scheduler import Scheduler
from carousel_server.engine.spec import Array
from carousel_server.engine.step import Step
from carousel_server.errors import CarouselError


@dataclass(eq=False)
class Owner:
    """Has blocks of given lengths to run."""

    name: int
    graph: str
    lengths: list[int]
    context: Context = NO_CONTEXT
    slot: int = 1
    queued: bool = False
    closed: bool = False
    rollback: list[Array] | None = None
    served: list[int] = field(default_factory=list)

    @property
    def due(self) -> bool:
        return not self.closed and bool(self.lengths)

    def next_block(self) -> tuple[int, int]:
        return self.lengths[0], 0

    def pieces(self, start: int, count: int) -> list[Piece]:
        return []

    def completes(self, frames: int) -> bool:
        return True

    def commit(self, frames: int, outputs: tuple[bytes, ...]) -> None:
        self.served.append(frames)
        self.lengths.pop(0)

    def fail(self, error: CarouselError) -> None:
        raise AssertionError


def run(scheduler: Scheduler) -> list[Step]:
    steps = []
    while (step := scheduler.schedule()) is not None:
        for block in step.blocks:
            block.owner.commit(block.frames, ())
        scheduler.finish(step)
        steps.append(step)
    return steps


owners = st.lists(
    st.tuples(st.sampled_from(["model.onnx", "lookahead.onnx"]), st.lists(st.integers(1, 5), min_size=1, max_size=6)),
    min_size=1,
    max_size=30,
)


@given(owners, st.integers(1, 9), st.booleans())
def test_every_block_runs_once_in_its_owners_order(given_owners, max_batch, ragged):
    """Every block of every owner is run exactly once, in order, at most one of an owner in a step."""
    everyone = [Owner(number, graph, list(lengths)) for number, (graph, lengths) in enumerate(given_owners)]
    scheduler = Scheduler(max_batch=max_batch, max_frames=1000, ragged=ragged)
    for owner in everyone:
        scheduler.add(owner)
        scheduler.add(owner)  # twice in the queue would run it twice
    steps = run(scheduler)
    assert [owner.served for owner in everyone] == [lengths for _, lengths in given_owners]
    for step in steps:
        assert 1 <= len(step.blocks) <= max_batch
        assert len({id(block.owner) for block in step.blocks}) == len(step.blocks)
        assert {block.owner.graph for block in step.blocks} == {step.graph}
        if not ragged:
            assert len({block.frames for block in step.blocks}) == 1


@given(owners, st.integers(1, 9), st.booleans())
def test_nobody_is_served_twice_before_everybody_who_waits_is_served_once(given_owners, max_batch, ragged):
    """An owner with endless work never delays another: each step holds the owner that waits longest."""
    everyone = [Owner(number, graph, [lengths[0]] * 20) for number, (graph, lengths) in enumerate(given_owners)]
    scheduler = Scheduler(max_batch=max_batch, max_frames=1000, ragged=ragged)
    for owner in everyone:
        scheduler.add(owner)
    waited = {owner.name: 0 for owner in everyone}
    kinds = len({(owner.graph, None if ragged else owner.lengths[0]) for owner in everyone})
    bound = kinds * -(-len(everyone) // max_batch)
    for _ in range(20):
        step = scheduler.schedule()
        assert step is not None
        assert waited[step.blocks[0].owner.name] == max(waited.values())
        taken = {block.owner.name for block in step.blocks}
        waited = {name: 0 if name in taken else steps + 1 for name, steps in waited.items()}
        assert max(waited.values()) <= bound
        scheduler.finish(step)


def test_arrival_order_is_kept_within_a_step():
    """Rows of a step stand in the order in which they became ready."""
    scheduler = Scheduler(max_batch=8, max_frames=1000, ragged=True)
    everyone = [Owner(number, "model.onnx", [1]) for number in range(20)]
    for owner in everyone:
        scheduler.add(owner)
    order = [block.owner.name for step in run(scheduler) for block in step.blocks]
    assert order == list(range(20))


@given(st.lists(st.sampled_from([1, 4, 7]), min_size=1, max_size=12))
def test_contexts_of_one_shape_share_a_step(sizes):
    """A step's contexts have one shape, since none is padded, and all that have it and fit are in it."""
    scheduler = Scheduler(max_batch=20, max_frames=1000, ragged=True)
    for number, size in enumerate(sizes):
        scheduler.add(Owner(number, "model.onnx", [1], context=Context((np.zeros((size, 2)),))))
    steps = run(scheduler)
    shapes = [{block.owner.context.shapes for block in step.blocks} for step in steps]
    assert all(len(each) == 1 for each in shapes)
    assert len(steps) == len(set(sizes))


def test_an_owner_that_closed_while_it_waited_is_left_out():
    """What closes in the queue is never run, and an empty step is never made."""
    scheduler = Scheduler(max_batch=8, max_frames=1000, ragged=True)
    owner = Owner(0, "model.onnx", [1])
    scheduler.add(owner)
    owner.closed = True
    assert scheduler.schedule() is None
    assert not owner.queued


def test_padding_is_counted():
    """A step of blocks of 1 and 4 frames has 3 frames of padding beside its 5 frames."""
    scheduler = Scheduler(max_batch=8, max_frames=1000, ragged=True)
    for length in (1, 4):
        scheduler.add(Owner(length, "model.onnx", [length]))
    (step,) = run(scheduler)
    assert (step.frames, step.padded_frames) == (5, 3)


def test_a_long_row_does_not_pad_short_ones():
    """Rows of very different length go in steps of their own, and a step's frames with padding are bounded."""
    scheduler = Scheduler(max_batch=64, max_frames=4000, ragged=True)
    for number in range(63):
        scheduler.add(Owner(number, "model.onnx", [1]))
    scheduler.add(Owner(63, "model.onnx", [1040]))
    for number in range(64, 80):
        scheduler.add(Owner(number, "model.onnx", [600]))
    steps = run(scheduler)
    assert sum(len(step.blocks) for step in steps) == 80
    for step in steps:
        assert step.padded_frames <= step.frames
        assert len(step.blocks) == 1 or step.frames + step.padded_frames <= 4000
