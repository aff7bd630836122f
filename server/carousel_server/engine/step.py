"""What passes from the scheduler to the runner: one batched model call."""

from typing import NamedTuple, Protocol

from carousel_server.engine.context import Context
from carousel_server.engine.frames import Piece
from carousel_server.engine.spec import Array
from carousel_server.errors import CarouselError


class Runnable(Protocol):
    """Something with blocks to run, one at a time: a session, or a row of an Infer request."""

    # Its row in the arena; 0 is the row to start from, which is read and never written.
    slot: int
    graph: str
    context: Context
    # In the scheduler's queue or in a step.
    queued: bool
    # The state rows before the first block of what it is answering now, kept where that takes more than one.
    rollback: list[Array] | None

    @property
    def closed(self) -> bool: ...
    @property
    def due(self) -> bool: ...
    def next_block(self) -> tuple[int, int]: ...
    def pieces(self, start: int, count: int) -> list[Piece]: ...
    def completes(self, frames: int) -> bool: ...
    def commit(self, frames: int, outputs: tuple[bytes, ...]) -> None: ...
    def fail(self, error: CarouselError) -> None: ...


class Block(NamedTuple):
    """One row of a step."""

    owner: Runnable
    # Frames it is run on, at least 1, and the frames after them that backward directions see.
    frames: int
    ahead: int
    # Where the inputs of both lie.
    pieces: list[Piece]
    ahead_pieces: list[Piece]

    @classmethod
    def cut(cls, owner: Runnable) -> "Block":
        frames, ahead = owner.next_block()
        return cls(owner, frames, ahead, owner.pieces(0, frames), owner.pieces(frames, ahead) if ahead else [])


class Step(NamedTuple):
    """Blocks of different owners that share a call, at least one, with contexts of one shape.

    Their length may differ if the model is ragged.
    """

    # The graph's file name.
    graph: str
    blocks: list[Block]

    @property
    def frames(self) -> int:
        return sum(block.frames + block.ahead for block in self.blocks)

    @property
    def padded_frames(self) -> int:
        """Frames of padding beside them."""
        longest = max(block.frames for block in self.blocks) + max(block.ahead for block in self.blocks)
        return longest * len(self.blocks) - self.frames
