"""Messages to be written, in order, coalesced up to a size."""

from collections import deque

from carousel_client.errors import ResourceExhausted
from carousel_protos.v1.carousel_pb2 import Chunk, Close, Open, StreamRequest

# Bytes that wrapping a message as an item of a request can add, and what it says anew when it is sent again.
_ITEM_OVERHEAD = 32
# Items of one request; a server takes 4096.
_ITEMS = 1024

Message = Open | Chunk | Close


def measure(message: Message, limit: int) -> int:
    """Bytes of an item. Raises `ResourceExhausted` for one that is over the limit by itself."""
    size = message.ByteSize() + _ITEM_OVERHEAD
    if size > limit:
        raise ResourceExhausted(
            f"a message of {size} bytes is over max_message_bytes ({limit}); send shorter chunks, "
            "or raise it here and on the server"
        )
    return size


class Outbox:
    """What one Stream call has to write; true while something waits."""

    def __init__(self, max_message_bytes: int) -> None:
        self.limit = max_message_bytes
        self._waiting: deque[tuple[Message, int]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message) -> None:
        """`message` was measured when it was first made."""
        self._waiting.append((message, message.ByteSize() + _ITEM_OVERHEAD))

    def take(self) -> StreamRequest | None:
        """Everything that waits and fits into one message; None where nothing waits."""
        if not self._waiting:
            return None
        request, room = StreamRequest(), self.limit
        while self._waiting and len(request.items) < _ITEMS and (self._waiting[0][1] <= room or not request.items):
            message, size = self._waiting.popleft()
            room -= size
            item = request.items.add()
            match message:
                case Chunk():
                    item.chunk.CopyFrom(message)
                case Open():
                    item.open.CopyFrom(message)
                case Close():
                    item.close.CopyFrom(message)
        return request
