"""The scheduler, driven without a clock or a model."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate

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
def test_nobody_waits_for_more_steps_than_others_waited_when_it_came(given_owners, max_batch, ragged):
    """However much work others have, each step holds who waits longest, and whole lines are served together."""
    everyone = [Owner(number, graph, [lengths[0]] * 40) for number, (graph, lengths) in enumerate(given_owners)]
    scheduler = Scheduler(max_batch=max_batch, max_frames=1000, ragged=ragged)
    waited, bounds = dict[int, int](), dict[int, int]()

    def came(names: list[int]) -> None:
        for name in names:
            waited[name] = 0
            lines = Counter((owner.graph, owner.lengths[0]) for owner in everyone if owner.queued)
            bounds[name] = min(len(waited), sum(-(-each // max_batch) for each in lines.values()))

    for owner in everyone:
        scheduler.add(owner)
    came([owner.name for owner in everyone])
    for _ in range(30):
        step = scheduler.schedule()
        assert step is not None
        taken = [block.owner.name for block in step.blocks]
        assert max(waited.values()) == max(waited[name] for name in taken)
        for name in taken:
            assert waited.pop(name) < bounds.pop(name)
        waited = {name: steps + 1 for name, steps in waited.items()}
        scheduler.finish(step)
        came(taken)


arrivals = st.lists(
    # When it comes after the one before, in frames; and how many frames each of its blocks has.
    st.tuples(st.integers(0, 200), st.lists(st.sampled_from([1, 2, 9, 10, 40, 128]), min_size=1, max_size=8)),
    min_size=1,
    max_size=60,
)


@given(arrivals)
def test_the_time_that_anybody_waits_is_bounded(given_arrivals):
    """On a simulated clock nobody waits for longer than the running step and one for each that waited when it came."""
    scheduler = Scheduler(max_batch=8, max_frames=256, ragged=True)
    longest_step = 20 + 256 + 128  # what a call costs, its rows, and one row more
    moments = accumulate(after for after, _ in given_arrivals)
    coming = deque(
        (at, Owner(n, "model.onnx", list(g)))
        for n, (at, (_, g)) in enumerate(zip(moments, given_arrivals, strict=True))
    )
    now, allowed = 0, dict[int, int]()

    def add(owner: Owner, at: int) -> None:
        if owner.due:
            allowed[owner.name] = at + (2 + len(scheduler)) * longest_step
            scheduler.add(owner)

    while coming or len(scheduler):
        while coming and (coming[0][0] <= now or not len(scheduler)):
            at, owner = coming.popleft()
            now = max(now, at)
            add(owner, at)
        step = scheduler.schedule()
        assert step is not None
        cost = 20 + (len(step.blocks) + 1) * max(block.frames for block in step.blocks)
        assert cost <= longest_step
        now += cost
        for block in step.blocks:
            assert now <= allowed.pop(block.owner.name)
            block.owner.commit(block.frames, ())
            block.owner.queued = False
        for block in step.blocks:
            add(block.owner, now)
    assert not allowed


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


def test_an_owner_whose_block_changed_while_it_waited_stands_where_the_new_one_belongs():
    """Chunks that were withdrawn and replaced by longer ones never make a model that is not ragged run uneven rows."""
    scheduler = Scheduler(max_batch=8, max_frames=1000, ragged=False)
    everyone = [Owner(number, "model.onnx", [2]) for number in range(3)]
    for owner in everyone:
        scheduler.add(owner)
    everyone[0].lengths = [5]
    assert [[block.frames for block in step.blocks] for step in run(scheduler)] == [[2, 2], [5]]
    assert len(scheduler) == 0


def test_padding_is_counted():
    """A step of blocks of 9 and 10 frames has 1 frame of padding beside its 19 frames."""
    scheduler = Scheduler(max_batch=8, max_frames=1000, ragged=True)
    for length in (9, 10):
        scheduler.add(Owner(length, "model.onnx", [length]))
    (step,) = run(scheduler)
    assert (step.frames, step.padded_frames) == (19, 1)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=10), min_size=1, max_size=60), st.integers(1, 64))
def test_at_most_a_tenth_of_what_is_run_is_padding(given_lengths, max_batch):
    """Whatever lengths come, after each step at most a tenth of all frames run so far was padding."""
    scheduler = Scheduler(max_batch=max_batch, max_frames=1000, ragged=True)
    for number, lengths in enumerate(given_lengths):
        scheduler.add(Owner(number, "model.onnx", list(lengths)))
    frames = padded = 0
    for step in run(scheduler):
        frames += step.frames
        padded += step.padded_frames
        assert padded <= 0.1 * (frames + padded) + 1e-6


def test_what_was_saved_in_a_quiet_hour_does_not_pay_for_a_wasteful_one():
    """However long no step was padded, those that follow pad at most a tenth of a step more than their share."""
    scheduler = Scheduler(max_batch=64, max_frames=1000, ragged=True)
    for number in range(64):
        scheduler.add(Owner(number, "model.onnx", [10] * 100))
    run(scheduler)
    for number in range(64):
        scheduler.add(Owner(number, "model.onnx", [1 + number % 50, 50 - number % 50]))
    steps = run(scheduler)
    frames, padded = sum(step.frames for step in steps), sum(step.padded_frames for step in steps)
    assert 0 < padded <= 0.1 * (frames + padded) + 0.1 * 1000


def test_lengths_share_a_call_where_its_fixed_cost_is_more_than_their_padding():
    """Many rows of nearly one length share a step, and as many of very different lengths do not."""
    near, far = ((9, 10), (1, 10))
    for lengths, steps in ((near, 1), (far, 2)):
        scheduler = Scheduler(max_batch=64, max_frames=1000, ragged=True)
        for number in range(16):
            scheduler.add(Owner(number, "model.onnx", [lengths[number % 2]]))
        assert len(run(scheduler)) == steps


@given(st.lists(st.sampled_from([1, 10, 128]), min_size=1, max_size=150))
def test_a_step_is_full_exactly_where_another_owner_would_find_no_room(lengths):
    """`full` says so as soon as a line has as many owners as a step, or a step's rows wait in all, and no sooner."""
    scheduler = Scheduler(max_batch=64, max_frames=1024, ragged=True)
    capacity = {1: 64, 10: 64, 128: 8}
    waiting = Counter[int]()
    for number, length in enumerate(lengths):
        scheduler.add(Owner(number, "model.onnx", [length]))
        waiting[length] += 1
        full = any(waiting[each] >= capacity[each] for each in waiting) or waiting.total() >= 64
        assert scheduler.full == full
    while (step := scheduler.schedule()) is not None:
        for block in step.blocks:
            waiting[block.frames] -= 1
            block.owner.lengths.clear()
        scheduler.finish(step)
        full = any(waiting[each] >= capacity[each] for each in waiting) or waiting.total() >= 64
        assert (scheduler.full, len(scheduler)) == (full, waiting.total())


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
        assert len(step.blocks) == 1 or step.frames + step.padded_frames <= 4000
