"""The protocol of one Stream call and of those that follow it where it breaks: no I/O, no lock, time is passed in.

Both clients drive it: they hand it what they read, write what it gives them, and ask it what to do when a call ends.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from carousel_client.backoff import Backoff
from carousel_client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    CarouselError,
    DeadlineExceeded,
    Internal,
    Unavailable,
    from_status,
)
from carousel_client.outbox import Outbox
from carousel_client.session_state import SessionState
from carousel_protos.v1.carousel_pb2 import Failed, StreamResponse

# What gRPC and the proxies before a server say where a stream breaks.
_BROKEN = (Unavailable, Cancelled, Internal, DeadlineExceeded, Aborted)


def is_resumable(error: CarouselError) -> bool:
    """Whether a stream that ended so may be followed by another: it broke, and was not refused."""
    if error.reason:  # the server's own word
        return isinstance(error, Unavailable)
    return isinstance(error, _BROKEN) or type(error) is CarouselError


@dataclass(eq=False)
class Member:
    """A session on a stream. `backoff` counts the refusals of this session alone."""

    session: SessionState
    backoff: Backoff
    # Refused for now, and to be opened again: until then nothing is sent for it.
    waits: bool = False


class StreamState:
    """Every session of one stream, call after call."""

    def __init__(self, max_message_bytes: int, resume_timeout: float) -> None:
        self.outbox = Outbox(max_message_bytes)
        # When the server has said that it will stop.
        self.going_away: datetime | None = None
        # The same, and of the call before as long as nothing was answered since.
        self.announced: datetime | None = None
        # A session was opened here.
        self.served = False
        # New sessions go to another stream; this one ends with its last session.
        self.retired = False
        # No session comes here any more.
        self.finished = False
        self._resume_timeout = resume_timeout
        self._backoff = Backoff(resume_timeout)
        self._connected = True
        self._members: dict[str, Member] = {}
        # When those that wait are to be opened again.
        self._due: float | None = None

    @property
    def over(self) -> bool:
        """Nothing more is written once the outbox is empty."""
        return self.finished or (self.retired and not self._members)

    @property
    def oldest(self) -> str:
        """The id of the session that has been here for longest; "" where there is none."""
        return next(iter(self._members), "")

    def adopt(self, member: Member) -> None:
        """Put a session on the stream, which may have been on another. Raises `AlreadyExists` for one that is here."""
        if member.session.id in self._members:
            raise AlreadyExists(f"session {member.session.id} is open in this client; close it first")
        self._members[member.session.id] = member
        member.waits = False
        if self._connected:
            member.session.attach(self.outbox)
            member.session.send_again()

    def receive(self, response: StreamResponse, now: float) -> None:
        for item in response.items:
            match item.WhichOneof("item"):
                case "result":
                    # A session that is not there has ended on this side, and nobody waits for its answers.
                    if member := self._members.get(item.result.session_id):
                        member.session.on_result(item.result)
                        self._goes_on(member)
                case "opened":
                    self.served = True
                    if member := self._members.get(item.opened.session_id):
                        if not member.session.on_opened(item.opened):
                            del self._members[item.opened.session_id]
                        elif not member.session.unacknowledged:
                            self._goes_on(member)
                case "closed":
                    if member := self._members.pop(item.closed.session_id, None):
                        member.session.on_closed()
                        self._goes_on(member)
                case "failed":
                    self._receive_failed(item.failed, now)
                case "going_away":
                    at = datetime.fromtimestamp(item.going_away.deadline_unix_ms / 1000, UTC)
                    self.going_away = self.announced = at

    def take_due(self, now: float) -> list[Member]:
        """The sessions that were refused for now and whose time has come, to be put on a stream again."""
        if self._due is None or now < self._due:
            return []
        due = [member for member in self._members.values() if member.waits]
        self._due = None
        for member in due:
            del self._members[member.session.id]
        return due

    def until_due(self, now: float) -> float | None:
        """Seconds until `take_due` has some; None: not as things stand."""
        return None if self._due is None else max(0.0, self._due - now)

    def broken(self, error: CarouselError, now: float) -> float | None:
        """A call has ended. Seconds until `restart`; None where nothing follows, and the sessions have the error."""
        self.outbox = Outbox(self.outbox.limit)
        self._connected = False
        self._due = None
        for member in self._members.values():
            member.session.detach()
        delay = None
        if self._members and not self.finished and is_resumable(error):
            delay = self._backoff.delay(now)
            if delay is None and self._resume_timeout:
                error.args = (f"{error} (and was not back within resume_timeout, {self._resume_timeout:g} s)",)
        if delay is None:
            self.fail(error)
        return delay

    def restart(self) -> None:
        """Another call begins: open every session on it, and send again what was not acknowledged."""
        self._connected = True
        self.going_away = None
        for member in self._members.values():
            member.waits = False
            member.session.attach(self.outbox)
        for member in self._members.values():
            member.session.send_again()

    def release(self) -> list[Member]:
        """After `broken`: give up every session to another stream, and end."""
        members, self._members = list(self._members.values()), {}
        self.finished = True
        return members

    def fail(self, error: CarouselError) -> None:
        """The stream has ended for good: so have its sessions."""
        self.finished = True
        if self.announced is not None:
            error.args = (
                f"{error} (the server had announced that it stops by {self.announced:%Y-%m-%d %H:%M:%S} UTC)",
            )
        for member in self.release():
            member.session.end(error)

    def _goes_on(self, member: Member) -> None:
        """It was answered: what breaks next is another failure."""
        self.announced = self.going_away
        self._backoff.reset()
        member.backoff.reset()

    def _receive_failed(self, failed: Failed, now: float) -> None:
        member = self._members.get(failed.session_id)
        if member is None:
            return
        error = from_status(failed.status)
        if member.waits:
            return
        of_chunk = failed.HasField("index")
        # What was sent after a chunk that found a full queue was refused with it, and is sent again with it.
        refused_for_now = error.reason == "QUEUE_FULL" if of_chunk else isinstance(error, Unavailable)
        if refused_for_now and (delay := member.backoff.delay(now, least=error.retry_after or 0.0)) is not None:
            member.session.detach()
            member.waits = True
            self._due = now + delay if self._due is None else min(self._due, now + delay)
        elif of_chunk:
            member.session.on_chunk_failed(failed.index, error)
        else:
            del self._members[failed.session_id]
            member.session.end(error)
