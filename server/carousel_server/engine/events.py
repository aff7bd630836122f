"""What a session answers with, and where its answers go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from carousel_server.engine.spec import Array, Port
from carousel_server.errors import CarouselError


@dataclass(slots=True)  # frozen, it would take three times as long to make
class Result:
    """One chunk's answer: the frames [first_frame, first_frame + frames) that became final with it.

    `data` has one entry for each output: little-endian bytes of `[frames, …]`, or of `[…]` for an output with one value
    a sequence, None while there is no such value.
    """

    session_id: str
    index: int
    first_frame: int
    frames: int
    data: tuple[bytes | None, ...]

    def arrays(self, outputs: Sequence[Port]) -> dict[str, Array]:
        """The outputs by name, `[frames, …]` or `[…]`, viewed in place."""
        return {
            port.name: np.frombuffer(data, port.dtype).reshape(port.shape(self.frames))
            for port, data in zip(outputs, self.data, strict=True)
            if data is not None
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """Something asked of a session that was refused; `index` is the chunk it is about, if it is about one."""

    session_id: str
    error: CarouselError
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """The session has ended at its client's wish, with everything answered before."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A stream has the session from now on: a new one, or one that it took up."""

    session_id: str
    epoch: int
    next_index: int


Event = Result | Failure | Closed | Taken


class Sink(Protocol):
    """Where a session's answers go; it must not block, and may be called many times in a row."""

    def deliver(self, event: Event) -> None: ...
