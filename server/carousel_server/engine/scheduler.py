"""The scheduler: whatever is ready when the model is free goes in the next step, oldest first, one block an owner.

It is pure: no clock, no I/O, no runtime. An owner that was served and is due again goes to the back of the queue, so
every owner in the queue is served before any is served twice.
"""

from collections import deque

from carousel_server.engine.step import Block, Runnable, Step


class Scheduler:
    """A queue of owners with a block due. `ragged` says whether blocks of different length may share a step."""

    def __init__(self, *, max_batch: int, ragged: bool) -> None:
        self._max_batch = max_batch
        self._ragged = ragged
        self._queue: deque[Runnable] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, owner: Runnable) -> None:
        """Put an owner with a block due at the back of the queue; one that is there or in a step stays where it is."""
        if not owner.queued:
            owner.queued = True
            self._queue.append(owner)

    def schedule(self) -> Step | None:
        """The next step: the oldest owner, and in their order those behind it that fit beside it."""
        blocks: list[Block] = []
        passed: list[Runnable] = []
        while self._queue and len(blocks) < self._max_batch:
            owner = self._queue.popleft()
            if not owner.due:  # closed or failed while it waited
                owner.queued = False
                continue
            block = Block.cut(owner)
            if not blocks or self._fits(block, blocks[0]):
                blocks.append(block)
            else:
                passed.append(owner)
        self._queue.extendleft(reversed(passed))
        return Step(blocks[0].owner.graph, blocks) if blocks else None

    def _fits(self, block: Block, first: Block) -> bool:
        one, other = block.owner, first.owner
        same_length = (block.frames, block.ahead) == (first.frames, first.ahead)
        return one.graph == other.graph and one.context.shapes == other.context.shapes and (self._ragged or same_length)

    def finish(self, step: Step) -> None:
        """Call after the step was committed or failed: owners that are due again queue again, in the step's order."""
        for block in step.blocks:
            block.owner.queued = False
            if block.owner.due:
                self.add(block.owner)
