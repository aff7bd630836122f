"""Wire tensors and NumPy arrays. Request bytes are viewed, never copied."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from carousel_protos.v1.carousel_pb2 import Result as ResultMessage
from carousel_protos.v1.carousel_pb2 import Tensor
from carousel_protos.v1.manifest_pb2 import DataType
from carousel_server.engine.session import Result
from carousel_server.engine.spec import Array, Port, numpy_dtype
from carousel_server.errors import TensorError


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
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(tensor.data):
            raise TensorError(
                f"tensor {name!r} says {dtype.name} {list(shape)} and has {len(tensor.data)} bytes; they do not agree",
                tensor=name,
            )
        arrays[name] = np.frombuffer(tensor.data, dtype).reshape(shape)
    return arrays


def encode_result(result: Result, outputs: Sequence[Port]) -> ResultMessage:
    return ResultMessage(
        session_id=result.session_id,
        index=result.index,
        first_frame=result.first_frame,
        frames=result.frames,
        tensors=[
            Tensor(
                name=port.name,
                dtype=wire_dtype(port),
                shape=(result.frames, *port.item) if port.per_frame else port.item,
                data=data,
            )
            for port, data in zip(outputs, result.data, strict=True)
            if data is not None
        ],
    )


def encode(port: Port, array: Array) -> Tensor:
    return Tensor(name=port.name, dtype=wire_dtype(port), shape=array.shape, data=array.tobytes())


def wire_dtype(port: Port) -> DataType.ValueType:
    return DataType.Value(f"DATA_TYPE_{port.dtype.name.upper()}")
