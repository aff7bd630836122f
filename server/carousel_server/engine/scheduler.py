"""The scheduler: whatever is ready when the model is free goes in the next step, one block an owner, if that pays.

It is pure: no clock, no I/O, no runtime. Owners whose blocks are equally long, and can share a call, stand in one line.
A step takes whoever has waited longest of all, with its line, and beside it the lines nearest in length as long as they
save more of the call's fixed cost than their padding adds. So nobody waits for more steps than others waited when it
came; and one that was served and is due again goes to the back.
"""

from collections import deque
from collections.abc import Hashable
from itertools import count
from typing import NamedTuple

from carousel_server.engine.step import Block, Runnable, Step

# A call costs as much as so many frames more, and as one row more of its longest: docs/decisions/0014.
_CALL_FRAMES = 20
# Of all frames that are run, at most this share is padding.
_MOST_PADDING = 0.1
_CREDIT = _MOST_PADDING / (1 - _MOST_PADDING)


class _Line:
    """Owners with a block of the same size due, by arrival."""

    __slots__ = ("ahead", "capacity", "frames", "kind", "owners")

    def __init__(self, kind: Hashable, frames: int, ahead: int, capacity: int) -> None:
        # What a step's owners have in common.
        self.kind = kind
        self.frames = frames
        self.ahead = ahead
        # Of these, as many as one step can have.
        self.capacity = capacity
        self.owners: deque[tuple[int, Runnable]] = deque()

    @property
    def length(self) -> int:
        return self.frames + self.ahead


class _Mix(NamedTuple):
    """The size of a step that is being put together."""

    rows: int = 0
    frames: int = 0
    ahead: int = 0
    # Frames without the padding.
    useful: int = 0

    @property
    def padding(self) -> int:
        return self.rows * (self.frames + self.ahead) - self.useful

    @property
    def rate(self) -> float:
        """What the step costs for each frame that is not padding."""
        return (_CALL_FRAMES + (self.rows + 1) * (self.frames + self.ahead)) / self.useful


class Scheduler:
    """Lines of owners with a block due.

    `ragged` says whether blocks of different length may share a step; then at most a tenth of the frames that were run
    so far is padding. A step has at most `max_batch` rows, and `max_frames` frames with its padding, or one row that is
    longer.
    """

    def __init__(self, *, max_batch: int, max_frames: int, ragged: bool) -> None:
        self._max_batch = max_batch
        self._max_frames = max_frames
        self._ragged = ragged
        self._arrival = count()
        self._lines: dict[Hashable, _Line] = {}
        self._waiting = 0
        # Lines that have as many owners as a step can have.
        self._full_lines = 0
        # Frames of padding that the steps so far have left; bounded, or a quiet hour would pay for a wasteful one.
        self._credit = 0.0

    def __len__(self) -> int:
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether a step that is formed now would gain nothing, or little, by waiting for others."""
        return self._full_lines > 0 or self._waiting >= self._max_batch

    def add(self, owner: Runnable) -> None:
        """Put an owner with a block due at the back of its line; one that is there or in a step stays where it is."""
        if owner.queued:
            return
        owner.queued = True
        frames, ahead = owner.next_block()
        kind = owner.graph, owner.context.shapes
        key = kind, frames, ahead
        if (line := self._lines.get(key)) is None:
            line = self._lines[key] = _Line(kind, frames, ahead, self._capacity(frames + ahead))
        line.owners.append((next(self._arrival), owner))
        self._waiting += 1
        if len(line.owners) == line.capacity:
            self._full_lines += 1

    def _capacity(self, length: int) -> int:
        return min(self._max_batch, max(1, self._max_frames // length))

    def schedule(self) -> Step | None:
        """The next step, with the owner that has waited longest."""
        while self._lines:
            head = min(self._lines.values(), key=lambda line: line.owners[0][0])
            mix, lines = self._share(head)
            if blocks := self._take(lines, mix.rows):
                self._account(blocks)
                return Step(blocks[0].owner.graph, blocks)
        return None

    def _share(self, head: _Line) -> tuple[_Mix, list[_Line]]:
        """The head's line and those that make the step cheaper for each frame, nearest in length first; their size."""
        mix, lines = self._with(_Mix(), head), [head]
        if not self._ragged or len(self._lines) == 1 or mix.rows == self._max_batch:
            return mix, lines
        near = sorted((line for line in self._lines.values() if line.kind == head.kind), key=lambda line: line.length)
        at = near.index(head)
        sides = [near[:at], near[:at:-1]]
        while True:
            found = [(self._with(mix, side[-1]), side) for side in sides if side]
            allowed = [each for each in found if each[0].padding <= self._credit + each[0].useful * _CREDIT]
            wider, side = min(allowed, key=lambda each: each[0].rate, default=(mix, []))
            if wider.rows == mix.rows or wider.rate >= mix.rate:
                return mix, lines
            mix = wider
            lines.append(side.pop())

    def _with(self, mix: _Mix, line: _Line) -> _Mix:
        """As many owners of a line as have room beside others, possibly none."""
        frames, ahead = max(mix.frames, line.frames), max(mix.ahead, line.ahead)
        rows = max(0, min(len(line.owners), self._capacity(frames + ahead) - mix.rows))
        return _Mix(mix.rows + rows, frames, ahead, mix.useful + rows * line.length)

    def _take(self, lines: list[_Line], rows: int) -> list[Block]:
        blocks: list[Block] = []
        for line in lines:
            was_full = len(line.owners) >= line.capacity
            while line.owners and len(blocks) < rows:
                _, owner = line.owners.popleft()
                self._waiting -= 1
                block = Block.cut(owner) if owner.due else None
                if block is not None and (block.frames, block.ahead) == (line.frames, line.ahead):
                    blocks.append(block)
                    continue
                # Closed or failed while it waited; or what is due is not what was, and stands elsewhere.
                owner.queued = False
                if block is not None:
                    self.add(owner)
            if was_full and len(line.owners) < line.capacity:
                self._full_lines -= 1
            if not line.owners:
                del self._lines[line.kind, line.frames, line.ahead]
        return blocks

    def _account(self, blocks: list[Block]) -> None:
        mix = _Mix(
            len(blocks),
            max(block.frames for block in blocks),
            max(block.ahead for block in blocks),
            sum(block.frames + block.ahead for block in blocks),
        )
        self._credit = min(self._credit + mix.useful * _CREDIT - mix.padding, self._max_frames * _MOST_PADDING)

    def finish(self, step: Step) -> None:
        """Call after the step was committed or failed: owners that are due again queue again, in the step's order."""
        for block in step.blocks:
            block.owner.queued = False
            if block.owner.due:
                self.add(block.owner)
