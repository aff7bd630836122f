"""Wire tensors and NumPy arrays: protobuf copies the bytes out of a message once, then they are viewed."""

import math
from collections.abc import Iterable

import numpy as np

from carousel_protos.v1.carousel_pb2 import Result as ResultMessage
from carousel_protos.v1.carousel_pb2 import Tensor
from carousel_server.engine.events import Result
from carousel_server.engine.spec import Array, Port, numpy_dtype, wire_dtype
from carousel_server.errors import TensorError, shorten

# Axes of a tensor, and entries along one.
_RANK, _SIZE = 8, 2**31 - 1


def decode(tensors: Iterable[Tensor], names: Iterable[str]) -> dict[str, Array]:
    """Arrays by name; an unnamed tensor takes the name where `names` holds just one. Raises `TensorError`."""
    known = tuple(names)
    arrays: dict[str, Array] = {}
    for tensor in tensors:
        name = tensor.name or (known[0] if len(known) == 1 else "")
        if name in arrays:
            raise TensorError(f"tensor {name!r} came twice; send each once", tensor=name)
        dtype = numpy_dtype(tensor.dtype)
        shape = tuple(tensor.shape)
        data = tensor.data  # each access makes the bytes anew
        if len(shape) > _RANK or min(shape, default=0) < 0 or max(shape, default=0) > _SIZE:
            raise TensorError(
                f"tensor {shorten(name)!r} says a shape of {len(shape)} axes, {list(shape[:_RANK])}; "
                f"send at most {_RANK}, each from 0 to {_SIZE}",
                tensor=shorten(name),
            )
        if math.prod(shape) * dtype.itemsize != len(data):
            raise TensorError(
                f"tensor {name!r} says {dtype.name} {list(shape)} and has {len(data)} bytes; they do not agree",
                tensor=name,
            )
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


def fill_result(message: ResultMessage, result: Result, outputs: Iterable[Port]) -> None:
    """Write a result into a message in its place; building it apart and copying it in costs three times as much."""
    message.session_id = result.session_id
    message.index = result.index
    message.first_frame = result.first_frame
    message.frames = result.frames
    for port, data in zip(outputs, result.data, strict=True):
        if data is not None:
            shape = port.shape(result.frames)
            message.tensors.add(name=port.name, dtype=wire_dtype(port.dtype), shape=shape, data=data)


def encode(port: Port, array: Array) -> Tensor:
    return Tensor(name=port.name, dtype=wire_dtype(port.dtype), shape=array.shape, data=array.tobytes())
