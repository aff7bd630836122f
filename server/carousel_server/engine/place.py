"""Where a session is: what is kept of it, moved and branched, beside its state rows."""

from dataclasses import dataclass, replace

from carousel_server.engine.events import Result
from carousel_server.engine.frames import Piece

# Characters of what a client names a session, or itself, by.
MOST_NAME = 128


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session is after the chunk that it answered last; with the state rows, all that its next answers need."""

    next_index: int
    # Frames whose answer was given.
    answered: int
    ended: bool
    # Frames received and not yet answered.
    waiting: list[Piece]
    # Kept for a chunk that comes again, oldest first.
    results: tuple[Result, ...]
    # One for each output, as in `Result`; those of outputs with frames have no meaning.
    values: tuple[bytes | None, ...]
    # The answers to all chunks before this index have arrived; None: the client has not said.
    acknowledged: int | None
    epoch: int
    holder: str

    def branch(self) -> "Place":
        """The place of a session that another client goes on with."""
        return replace(self, results=self.results[-1:], acknowledged=None, epoch=1, holder="")
