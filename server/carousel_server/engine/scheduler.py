"""The scheduler: whatever is ready when the model is free goes in the next step, oldest first, one block an owner.

It is pure: no clock, no I/O, no runtime. Owners whose blocks can share a call stand in one line; the line whose head
has waited longest is next. An owner that was served and is due again goes to the back, so nobody in a line is served
twice before everybody who waited in it is served once.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from itertools import count

from carousel_server.engine.step import Block, Runnable, Step

# Blocks up to this many frames share a step whatever their length: a call costs more than the padding saves.
_SHORT = 16


class Scheduler:
    """Lines of owners with a block due.

    `ragged` says whether blocks of different length may share a step; those within a factor of two then do. A step has
    at most `max_batch` rows, and `max_frames` frames with its padding, or one row that is longer.
    """

    def __init__(self, *, max_batch: int, max_frames: int, ragged: bool) -> None:
        self._max_batch = max_batch
        self._max_frames = max_frames
        self._ragged = ragged
        self._arrival = count()
        self._lines: dict[Hashable, deque[tuple[int, Runnable]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    @property
    def full(self) -> bool:
        """Whether a step is waiting that can have no more rows."""
        return any(len(line) >= self._max_batch for line in self._lines.values())

    def add(self, owner: Runnable) -> None:
        """Put an owner with a block due at the back of its line; one that is there or in a step stays where it is."""
        if not owner.queued:
            owner.queued = True
            self._lines.setdefault(self._line(owner), deque()).append((next(self._arrival), owner))

    def _line(self, owner: Runnable) -> Hashable:
        frames, ahead = owner.next_block()
        length = _bucket(frames + ahead) if self._ragged else (frames, ahead)
        return owner.graph, owner.context.shapes, length

    def schedule(self) -> Step | None:
        """The next step: the owner that has waited longest, and in their order those of its line behind it."""
        while self._lines:
            key = min(self._lines, key=lambda line: self._lines[line][0][0])
            blocks = list(self._take(self._lines[key]))
            if not self._lines[key]:
                del self._lines[key]
            if blocks:
                return Step(blocks[0].owner.graph, blocks)
        return None

    def _take(self, line: deque[tuple[int, Runnable]]) -> Iterator[Block]:
        rows = longest = 0
        while line and rows < self._max_batch:
            owner = line[0][1]
            if not owner.due:  # closed or failed while it waited
                owner.queued = False
                line.popleft()
                continue
            block = Block.cut(owner)
            longest = max(longest, block.frames + block.ahead)
            rows += 1
            if rows > 1 and rows * longest > self._max_frames:
                return
            line.popleft()
            yield block

    def finish(self, step: Step) -> None:
        """Call after the step was committed or failed: owners that are due again queue again, in the step's order."""
        for block in step.blocks:
            block.owner.queued = False
            if block.owner.due:
                self.add(block.owner)


def _bucket(frames: int) -> int:
    return 0 if frames <= _SHORT else (frames - 1).bit_length()
