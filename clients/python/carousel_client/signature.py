"""What a model takes and gives: arrays to tensors and back, checked against its manifest before anything is sent."""

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carousel_client.errors import InvalidArgument
from carousel_protos.v1.carousel_pb2 import InferResponse, Result, Tensor
from carousel_protos.v1.manifest_pb2 import DataType, Manifest, TensorSpec

Array = NDArray[Any]
# A NumPy array for a model with one output and a dict of them by output name otherwise. A sequence-level output is None
# while it has no value. One model always gives the one or the other, so callers are spared a union.
Answer = Any
# Numbers may be converted from a narrower kind to a wider one, and within a kind: never 1.5 to 1.
_WIDTH = {"b": 0, "u": 1, "i": 1, "f": 2}


class _Tensors(Protocol):
    """A repeated field of tensors, filled in place."""

    def add(self) -> Tensor: ...


def dtype_of(dtype: DataType.ValueType) -> np.dtype[Any]:
    """The little-endian NumPy dtype of a wire dtype."""
    if dtype not in DataType.values() or dtype == DataType.DATA_TYPE_UNSPECIFIED:
        raise InvalidArgument(f"dtype {dtype} is not known to this client; install a newer one")
    return np.dtype(DataType.Name(dtype).removeprefix("DATA_TYPE_").lower()).newbyteorder("<")


def encode(tensor: Tensor, name: str, array: Array) -> None:
    tensor.name = name
    tensor.dtype = DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}")
    tensor.shape.extend(array.shape)
    tensor.data = np.ascontiguousarray(array).tobytes()


def decode(tensor: Tensor) -> Array:
    # A copy: an array over the message's own bytes could not be written to, which torch.from_numpy warns of.
    return np.frombuffer(tensor.data, dtype_of(tensor.dtype)).reshape(tuple(tensor.shape)).copy()


@dataclass(frozen=True)
class Port:
    """An input, output or state: its dtype, the graph's dimensions (batch first) and the eager model's."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    eager_dims: tuple[str, ...]

    @classmethod
    def read(cls, spec: TensorSpec) -> "Port":
        dims = tuple(spec.dims)
        return cls(spec.name, dtype_of(spec.dtype), dims, tuple(spec.eager_dims) or dims)

    @property
    def frame(self) -> tuple[str, ...]:
        """Dimensions of a chunk, `[frames, …]`, or of a sequence's value."""
        return tuple("frames" if dim == "time" else dim for dim in self.dims if dim != "batch")

    def convert(self, value: object, dims: tuple[str, ...], where: str) -> Array:
        """`value` as an array of this dtype and of `dims`.

        Arrays must have the dtype; numbers and lists of them are converted to it where that loses nothing but
        precision. Raises `InvalidArgument`.
        """
        wanted = f"wanted {self.dtype.name} [{', '.join(dims)}]"
        try:
            array = np.asarray(value)
            if not hasattr(value, "__array__") and _WIDTH.get(array.dtype.kind, 9) <= _WIDTH[self.dtype.kind]:
                array = np.array(value, self.dtype)
        except (ValueError, OverflowError, TypeError) as error:
            raise InvalidArgument(f"tensor {self.name!r} of {where} is no array ({error}); {wanted}") from error
        fits = len(array.shape) == len(dims) and all(
            not dim.isdecimal() or int(dim) == size for dim, size in zip(dims, array.shape, strict=True)
        )
        if array.dtype.newbyteorder("<") != self.dtype or not fits:
            shape = ", ".join(map(str, array.shape))
            way = f"; convert it with .astype(numpy.{self.dtype.name})" if fits else ""
            raise InvalidArgument(f"tensor {self.name!r} of {where} is {array.dtype.name} [{shape}]; {wanted}{way}")
        return array.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Signature:
    """A model's inputs, outputs, states and contexts, read from its manifest once."""

    model: str
    version: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[Port, ...]
    contexts: tuple[Port, ...] = ()

    @classmethod
    def read(cls, manifest: Manifest) -> "Signature":
        return cls(
            manifest.name,
            manifest.version,
            tuple(map(Port.read, manifest.inputs)),
            tuple(map(Port.read, manifest.outputs)),
            tuple(
                Port(state.input, dtype_of(state.dtype), tuple(state.dims), tuple(state.dims))
                for state in manifest.states
            ),
            tuple(map(Port.read, manifest.contexts)),
        )

    def encode_chunk(self, tensors: _Tensors, chunk: object, *, end: bool) -> None:
        """Write a chunk, `[frames, …]` for each input, into `tensors`. None is the chunk without frames, for the end.

        Raises `InvalidArgument`.
        """
        if chunk is None:
            if not end:
                raise InvalidArgument("a chunk without frames can only end the sequence; send frames, or set end")
            return
        where = f"a chunk for {self.model}"
        arrays = [port.convert(value, port.frame, where) for port, value in self._match(chunk, where, self.inputs)]
        frames = {port.name: len(array) for port, array in zip(self.inputs, arrays, strict=True)}
        if len(set(frames.values())) > 1:
            raise InvalidArgument(
                f"the tensors of {where} differ in their frames ({frames}); send the same number of each"
            )
        if not end and 0 in frames.values():
            raise InvalidArgument(f"{where} has no frames; only a chunk with end may be empty")
        for port, array in zip(self.inputs, arrays, strict=True):
            encode(tensors.add(), port.name, array)

    def decode_chunk(self, result: Result) -> Answer:
        """The frames that became final, `[frames, …]` for each output."""
        arrays = {tensor.name: decode(tensor) for tensor in result.tensors}
        return self._pick({port.name: arrays.get(port.name, _nothing(port)) for port in self.outputs})

    def encode_batch(self, tensors: _Tensors, batch: object) -> None:
        """Write whole sequences in the eager model's own dimensions into `tensors`. Raises `InvalidArgument`."""
        where = f"a call of {self.model}"
        for port, value in self._match(batch, where, (*self.inputs, *self.contexts)):
            array = port.convert(value, port.eager_dims, where)
            encode(tensors.add(), port.name, _arrange(array, port.eager_dims, port.dims))

    def decode_batch(self, response: InferResponse) -> Answer:
        """The outputs in the eager model's own dimensions."""
        arrays = {tensor.name: decode(tensor) for tensor in response.tensors}
        return self._pick({port.name: _arrange(arrays[port.name], port.dims, port.eager_dims) for port in self.outputs})

    def encode_state(self, tensors: _Tensors, state: Mapping[str, object]) -> None:
        """Write state rows, `[layers × directions, size]` by the state input's name. Raises `InvalidArgument`."""
        known = {port.name: port for port in self.states}
        for name, value in state.items():
            if name not in known:
                raise InvalidArgument(f"{self.model} has no state {name!r}; it has {', '.join(known)}")
            encode(tensors.add(), name, known[name].convert(value, known[name].frame, "the initial state"))

    def encode_context(self, tensors: _Tensors, context: Mapping[str, object]) -> None:
        """Write what a session sees in every step, `[…]` by the context's name. Raises `InvalidArgument`."""
        wanted = [port.name for port in self.contexts]
        if set(context) != set(wanted):
            raise InvalidArgument(
                f"a session of {self.model} was given the context {sorted(context)}; wanted {sorted(wanted)}"
            )
        for port in self.contexts:
            encode(tensors.add(), port.name, port.convert(context[port.name], port.frame, "the context"))

    def _match(self, value: object, where: str, ports: Sequence[Port]) -> list[tuple[Port, object]]:
        if not isinstance(value, Mapping):
            if len(ports) > 1:
                names = ", ".join(port.name for port in ports)
                raise InvalidArgument(f"{self.model} has several inputs; give {where} as a dict with {names}")
            return [(ports[0], value)]
        wanted = [port.name for port in ports]
        if set(value) != set(wanted):
            raise InvalidArgument(f"{where} has the tensors {sorted(value)}; wanted {sorted(wanted)}")
        return [(port, value[port.name]) for port in ports]

    def _pick(self, arrays: dict[str, Array | None]) -> Answer:
        return arrays if len(self.outputs) > 1 else arrays[self.outputs[0].name]


def _nothing(port: Port) -> Array | None:
    """What an output is where a result has left it out."""
    if "frames" not in port.frame:
        return None
    return np.empty([int(dim) if dim.isdecimal() else 0 for dim in port.frame], port.dtype)


def _arrange(array: Array, source: Sequence[str], target: Sequence[str]) -> Array:
    """`array` of dimensions `source` in the order of `target`; the batch is added or taken away where one lacks it."""
    if "batch" in target and "batch" not in source:
        array, source = array[None], ("batch", *source)
    left: MutableSequence[str | None] = list(source)
    axes = []
    for dim in target:
        axes.append(left.index(dim))
        left[axes[-1]] = None  # two dimensions of the same size keep their order
    if "batch" in source and "batch" not in target:
        axes.append(left.index("batch"))
        return array.transpose(axes)[..., 0]
    return array.transpose(axes)
