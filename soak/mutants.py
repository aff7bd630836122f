"""Requests that are wrong in every way that we could think of, and right ones that were flipped, cut and joined."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from soak.models import MARKS
from soak.work import Array
from tests.support.stream import tensor as tensor_message

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.manifest_pb2 import Policy
from carousel_protos.v1.state_pb2 import PortableState, SessionState

SERVICE = "/carousel.v1.Carousel/"
MODELS = ("tagger", "speaker", "tally")
# Sessions that everybody asks for, and those that a stream has for itself.
_SHARED, _OWN = 24, 12
_NUMBERS = (0, 1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_FEATURES = 5
_SIZES = (-(2**63), -1, 0, 1, 2, 5, 64, 10_001, 2**31 - 1, 2**31, 2**62, 2**63 - 1)


@dataclass(frozen=True)
class Unary:
    """A call's method, its bytes, and whether it is an admin call."""

    method: str
    request: bytes
    admin: bool = False


class Mutants:
    """Draws requests, always the same ones for a seed. `states` are sealed states that a server gave."""

    def __init__(self, seed: int, states: list[bytes]) -> None:
        self._random = random.Random(seed)
        self._states = states
        self._turn = 0
        self._items: list[Callable[[], pb.RequestItem]] = [
            self._open, self._chunk, self._chunk, self._chunk, self._close, self._strange,
        ]  # fmt: skip
        self._unary: list[Callable[[], Unary]] = [
            self._infer, self._infer, self._infer, self._put_state, self._put_state, self._get_state, self._fork,
            self._list, self._models, self._admin, self._anything,
        ]  # fmt: skip

    # Streams

    def messages(self, count: int, items: int) -> list[bytes]:
        """`StreamRequest`s of one stream."""
        self._turn += 1
        return [message(self.items(items)) for _ in range(count)]

    def items(self, count: int) -> list[bytes]:
        """Serialized `RequestItem`s for a stream's next message, each of which can be read as one."""
        found: list[bytes] = []
        while len(found) < count:
            kind = self._random.random()
            if kind < 0.1:
                found += [item.SerializeToString() for item in self._story()]
                continue
            item = self._random.choice(self._items)().SerializeToString()
            if kind < 0.5:
                item = self._flipped(item)
                if not _reads(item):
                    continue
            found.append(item)
        return found[:count]

    def broken(self) -> bytes:
        """What may be no `StreamRequest`."""
        if self._random.random() < 0.2:
            return self._random.randbytes(self._random.randint(0, 200))
        return self._flipped(message([item.SerializeToString() for item in self._story()]))

    def _story(self) -> list[pb.RequestItem]:
        """A session that is used as it should be, but for a chunk."""
        name, model = self._name(), self._random.choice(MODELS)
        chunks = [
            pb.RequestItem(chunk=pb.Chunk(session_id=name, index=index, tensors=[self._good(model)]))
            for index in range(self._random.randint(1, 3))
        ]
        chunks.insert(self._random.randint(0, len(chunks)), self._chunk(name))
        opening = pb.RequestItem(open=pb.Open(session_id=name, model=model, resume=self._random.random() < 0.5))
        return [opening, *chunks, *([self._close(name)] if self._random.random() < 0.5 else [])]

    def _open(self) -> pb.RequestItem:
        draw = self._random.random
        asked = pb.Open(session_id=self._name(), model=self._model(), resume=draw() < 0.3)
        if draw() < 0.1:
            asked.version = self._text()
        if draw() < 0.5:
            asked.policy.CopyFrom(self._policy())
        if draw() < 0.2:
            asked.initial_state.extend(self._tensor() for _ in range(self._random.randint(1, 5)))
        if draw() < 0.1:
            asked.context.append(self._tensor())
        if draw() < 0.1:
            asked.variant = self._random.choice(("float16", "int8", self._text()))
        if draw() < 0.5:
            asked.holder = self._random.choice(("a", "b", self._text()))
        if draw() < 0.2:
            asked.epoch = self._random.choice(_NUMBERS)
        if draw() < 0.2:
            asked.acknowledged = self._random.choice(_NUMBERS)
        return pb.RequestItem(open=asked)

    def _chunk(self, name: str = "") -> pb.RequestItem:
        draw = self._random.random
        asked = pb.Chunk(session_id=name or self._name(), end=draw() < 0.1)
        asked.index = self._random.randint(0, 4) if draw() < 0.7 else self._random.choice(_NUMBERS)
        asked.tensors.extend(self._tensor() for _ in range(1 if draw() < 0.9 else self._random.randint(0, 4)))
        if draw() < 0.2:
            asked.acknowledged = self._random.choice(_NUMBERS)
        return pb.RequestItem(chunk=asked)

    def _close(self, name: str = "") -> pb.RequestItem:
        return pb.RequestItem(close=pb.Close(session_id=name or self._name()))

    def _strange(self) -> pb.RequestItem:
        """Nothing, or a field that nobody knows."""
        item = pb.RequestItem()
        if self._random.random() < 0.8:
            size = self._random.randint(0, 100)
            item.MergeFromString(b"\xba\x3e" + _varint(size) + self._random.randbytes(size))
        return item

    # Unary calls

    def unary(self) -> Unary:
        call = self._random.choice(self._unary)()
        kind = self._random.random()
        if kind < 0.6 and not call.admin:
            return call
        request = self._flipped(call.request) if kind < 0.9 else self._random.randbytes(self._random.randint(0, 300))
        return Unary(call.method, request, call.admin)

    def _infer(self) -> Unary:
        model = self._random.choice(MODELS)
        batch, time = self._random.choice((0, 1, 2, 5)), self._random.choice((0, 1, 3, 9))
        if self._random.random() < 0.6:
            tensors = [tensor_message(self._frames(model, batch * time).reshape(batch, time, *self._item(model)))]
        else:
            tensors = [self._tensor() for _ in range(self._random.randint(0, 3))]
        lengths = [
            self._random.choice((-1, 0, 1, 3, 9, 2**31 - 1)) for _ in range(self._random.choice((0, 0, batch, 3)))
        ]
        return Unary("Infer", pb.InferRequest(model=model, tensors=tensors, lengths=lengths).SerializeToString())

    def _put_state(self) -> Unary:
        """A state that was flipped, or forged: what is wrong in it has the right checksum."""
        envelope = PortableState.FromString(self._random.choice(self._states))
        if self._random.random() < 0.3:
            sealed = self._flipped(envelope.SerializeToString())
        else:
            body = self._forged(envelope.state)
            envelope.state, envelope.sha256 = body, hashlib.sha256(body).digest()
            sealed = envelope.SerializeToString()
        request = pb.PutStateRequest(state=sealed, session_id=self._name(), move=self._random.random() < 0.3)
        return Unary("PutState", request.SerializeToString())

    def _forged(self, body: bytes) -> bytes:
        if self._random.random() < 0.4:
            return self._flipped(body)
        state = SessionState.FromString(body)
        for field in self._random.sample(("next_index", "answered", "acknowledged", "epoch"), 2):
            setattr(state, field, self._random.choice(_NUMBERS))
        if self._random.random() < 0.5:
            state.policy.CopyFrom(self._policy())
        if self._random.random() < 0.5:
            state.holder = self._text()
        for tensors in (state.states, state.waiting):
            if self._random.random() < 0.3:
                if tensors and self._random.random() < 0.5:
                    del tensors[self._random.randrange(len(tensors))]
                tensors.append(self._tensor())
        for result in state.results:
            result.frames = self._random.choice(_NUMBERS)
        return state.SerializeToString()

    def _get_state(self) -> Unary:
        return Unary("GetState", pb.GetStateRequest(session_id=self._name()).SerializeToString())

    def _fork(self) -> Unary:
        request = pb.ForkRequest(session_id=self._name(), new_session_id=self._name())
        return Unary("Fork", request.SerializeToString())

    def _list(self) -> Unary:
        size = self._random.choice((0, 1, 2**32 - 1))
        request = pb.ListSessionsRequest(model=self._model(), page_size=size, page_token=self._text())
        return Unary("ListSessions", request.SerializeToString())

    def _models(self) -> Unary:
        return Unary("GetModel", pb.GetModelRequest(model=self._model(), version=self._text()).SerializeToString())

    def _admin(self) -> Unary:
        """Of models that nobody has."""
        name = "no-" + self._text()
        if self._random.random() < 0.5:
            return Unary("LoadModel", pb.LoadModelRequest(model=name).SerializeToString(), admin=True)
        return Unary("UnloadModel", pb.UnloadModelRequest(model=name).SerializeToString(), admin=True)

    def _anything(self) -> Unary:
        method = self._random.choice(
            ("ListModels", "GetModel", "GetState", "Fork", "ListSessions", "Infer", "PutState")
        )
        return Unary(method, self._random.randbytes(self._random.randint(0, 300)))

    # Parts

    def noise(self) -> bytes:
        """Bytes for a connection that speaks no HTTP/2."""
        return self._random.randbytes(self._random.randint(1, 2000))

    def _flipped(self, data: bytes) -> bytes:
        """With some bytes changed, cut, put in or said twice."""
        changed = bytearray(data)
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(changed) + 1)
            kind = self._random.random()
            if kind < 0.5 and at < len(changed):
                changed[at] ^= 1 << self._random.randrange(8)
            elif kind < 0.65:
                changed[at:at] = self._random.randbytes(self._random.randint(1, 8))
            elif kind < 0.8:
                del changed[at : at + self._random.randint(1, 16)]
            elif kind < 0.9:
                changed[at:at] = changed[at : at + self._random.randint(1, 40)]
            else:
                del changed[at:]
        return bytes(changed)

    def _name(self) -> str:
        kind = self._random.random()
        if kind < 0.8:
            return f"fuzz-{self._turn}-{self._random.randrange(_OWN)}"
        return f"fuzz-{self._random.randrange(_SHARED)}" if kind < 0.95 else self._text()

    def _model(self) -> str:
        return self._random.choice(MODELS) if self._random.random() < 0.85 else self._text()

    def _text(self) -> str:
        return self._random.choice(
            ("", "..", "/", "../../etc/passwd", "\0", "a\nb", "%s%n{0}", "x" * 129, "é" * 60, "\u202e", "9" * 5000, "1")
        )

    def _policy(self) -> Policy:
        block, ahead = (min(self._random.choice(_NUMBERS), 2**32 - 1) for _ in range(2))
        return Policy(kind=self._random.randint(0, 6), block=block, ahead=ahead)  # type: ignore[arg-type]  # what is none

    def _item(self, model: str) -> tuple[int, ...]:
        return (_FEATURES,) if model == "tagger" else ()

    def _frames(self, model: str, count: int) -> Array:
        if model == "tagger":
            return np.frombuffer(self._random.randbytes(count * _FEATURES), np.uint8).astype(np.float32)
        return np.frombuffer(self._random.randbytes(count), np.uint8).astype(np.int64) % (
            MARKS if model == "tally" else 11
        )

    def _good(self, model: str) -> pb.Tensor:
        count = self._random.randint(1, 12)
        return tensor_message(self._frames(model, count).reshape(count, *self._item(model)))

    def _tensor(self) -> pb.Tensor:
        model = self._random.choice(MODELS)
        tensor = self._good(model)
        match self._random.randrange(11):
            case 0:
                tensor.dtype = self._random.randint(-1, 20)  # type: ignore[assignment]  # some are none
            case 1:
                tensor.shape[:] = [self._random.choice(_SIZES) for _ in range(self._random.randint(0, 9))]
            case 2:
                tensor.data = self._random.randbytes(self._random.randint(0, 100))
            case 3:
                values = np.full((3, _FEATURES), self._random.choice((np.nan, np.inf, -np.inf, 3e38)), np.float32)
                tensor = tensor_message(values)
            case 4:
                tensor = tensor_message(
                    np.zeros((0, *self._item(model)), np.float32 if model == "tagger" else np.int64)
                )
            case 5:
                tensor = tensor_message(np.array([self._random.choice((-1, 11, 48, 2**31, 2**63 - 1, -(2**63)))]))
            case 6:
                tensor.name = self._random.choice(("lstm.h_0", "x", "tokens", self._text()))
            case 7:
                tensor.shape[:] = [0] * self._random.choice((1, 3, 100))
                tensor.data = b""
            case 8 if self._random.random() < 0.02:
                tensor = tensor_message(np.zeros((10_001, _FEATURES), np.float32))
            case _:
                pass
        return tensor


def message(items: list[bytes]) -> bytes:
    """The `StreamRequest` that holds these items."""
    return b"".join(b"\x0a" + _varint(len(item)) + item for item in items)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _reads(item: bytes) -> bool:
    try:
        pb.RequestItem.FromString(item)
    except Exception:  # noqa: BLE001 (protobuf's implementations raise errors of their own)
        return False
    return True
