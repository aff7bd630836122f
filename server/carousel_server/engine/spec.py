"""What a model takes and gives, read from its manifest once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import DataType, Extent, Manifest, StateSpec, TensorSpec
from carousel_server.errors import TensorError, TooLargeError

Array = NDArray[Any]


_DTYPES = {
    value: np.dtype(name.removeprefix("DATA_TYPE_").lower()).newbyteorder("<")
    for name, value in DataType.items()
    if value != DataType.DATA_TYPE_UNSPECIFIED
}
_WIRE = {dtype: value for value, dtype in _DTYPES.items()}


def numpy_dtype(dtype: DataType.ValueType) -> np.dtype[Any]:
    """The little-endian NumPy dtype of a wire dtype. Raises `TensorError` for one that is not known."""
    if (known := _DTYPES.get(dtype)) is None:
        raise TensorError(f"dtype {dtype} is not one of carousel.v1.DataType")
    return known


def wire_dtype(dtype: np.dtype[Any]) -> DataType.ValueType:
    """The wire dtype of a NumPy dtype that `numpy_dtype` gave."""
    return _WIRE[dtype]


def _is_finite(array: Array) -> bool:
    # The sum of squares is one pass, and only values that are not finite, or huge, make it so.
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def describe(dtype: np.dtype[Any], shape: tuple[int | str, ...]) -> str:
    return f"{dtype.name} [{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class Port:
    """An input, context or output: the shape of one frame, or of one sequence's value where there is no time axis.

    `named` are the axes of `item` whose size a session's context says, with their names; `item` has -1 there.
    """

    name: str
    dtype: np.dtype[Any]
    item: tuple[int, ...]
    per_frame: bool
    named: tuple[tuple[int, str], ...] = ()
    # Token ids lie from 0 to below this; 0: not known.
    vocabulary: int = 0
    # An output's first axis, beside `item`, whose size follows the sequence's length: (length + offset) / stride.
    extent: Extent | None = None

    @classmethod
    def read(cls, spec: TensorSpec, extents: Mapping[str, Extent] = MappingProxyType({})) -> "Port":
        extent = next((extents[dim] for dim in spec.dims if dim in extents), None)
        dims = [dim for dim in spec.dims if dim not in ("batch", "time") and dim not in extents]
        item = tuple(int(dim) if dim.isdecimal() else -1 for dim in dims)
        named = tuple((axis, dim) for axis, dim in enumerate(dims) if not dim.isdecimal())
        return cls(spec.name, numpy_dtype(spec.dtype), item, "time" in spec.dims, named, spec.vocabulary, extent)

    def shape(self, frames: int) -> tuple[int, ...]:
        """The shape of its value for so many frames."""
        if self.per_frame:
            return (frames, *self.item)
        if self.extent is None:
            return self.item
        return ((frames + self.extent.offset) // self.extent.stride, *self.item)

    def bind(self, sizes: Mapping[str, int]) -> "Port":
        """The port with these sizes of its named axes."""
        if not self.named:
            return self
        names = dict(self.named)
        item = tuple(sizes[names[axis]] if axis in names else size for axis, size in enumerate(self.item))
        return replace(self, item=item, named=())

    def check(self, array: Array, where: str, leading: tuple[str, ...] = ("frames",)) -> None:
        """Raise `TensorError` unless `array` is dtype `[*leading, *item]` and every float in it is finite."""
        sizes = array.shape[len(leading) :]
        if array.dtype != self.dtype or array.ndim < len(leading) or not (sizes == self.item or self._fits(sizes)):
            names = dict(self.named)
            item = [names.get(axis, size) for axis, size in enumerate(self.item)]
            wanted = describe(self.dtype, (*leading, *item))
            raise TensorError(
                f"tensor {self.name!r} of {where} is {describe(array.dtype, array.shape)}; wanted {wanted}",
                tensor=self.name,
            )
        if self.dtype.kind == "f" and not _is_finite(array):
            raise TensorError(
                f"tensor {self.name!r} of {where} has values that are not finite; send numbers only", tensor=self.name
            )
        if self.vocabulary and array.size and not (array.min() >= 0 and array.max() < self.vocabulary):
            raise TensorError(
                f"tensor {self.name!r} of {where} has ids from {array.min()} to {array.max()}; "
                f"the model knows 0 to {self.vocabulary - 1}",
                tensor=self.name,
            )

    def _fits(self, sizes: tuple[int, ...]) -> bool:
        names = dict(self.named)
        return len(sizes) == len(self.item) and all(
            size > 0 if axis in names else size == self.item[axis] for axis, size in enumerate(sizes)
        )


@dataclass(frozen=True)
class State:
    """A recurrent tensor: one row `[layers × directions, size]` a session, in under one name and out under another."""

    input: str
    output: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    # What a session starts from, where that is not zero.
    initial: Array | None = field(default=None, compare=False)

    @classmethod
    def read(cls, spec: StateSpec) -> "State":
        dtype, row = numpy_dtype(spec.dtype), tuple(int(dim) for dim in spec.dims[1:])
        initial = np.frombuffer(spec.initial, dtype).reshape(row) if spec.initial else None
        return cls(spec.input, spec.output, dtype, row, initial)


def frame_bytes(ports: Iterable[Port]) -> int:
    """Bytes of one frame of those that have a time axis."""
    return sum(port.dtype.itemsize * math.prod(port.item) for port in ports if port.per_frame)


@dataclass(frozen=True)
class ModelSpec:
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[State, ...]
    lengths: str
    ragged: bool
    contexts: tuple[Port, ...] = ()
    # The shortest sequence that the model can be run on.
    least_frames: int = 1

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(port.name for port in self.inputs)

    @cached_property
    def _input_set(self) -> frozenset[str]:
        return frozenset(self.input_names)

    @classmethod
    def read(cls, manifest: Manifest) -> "ModelSpec":
        extents = {extent.name: extent for extent in manifest.extents}
        return cls(
            tuple(Port.read(spec) for spec in manifest.inputs),
            tuple(Port.read(spec, extents) for spec in manifest.outputs),
            tuple(State.read(spec) for spec in manifest.states),
            manifest.lengths,
            manifest.ragged,
            tuple(Port.read(spec) for spec in manifest.contexts),
            max(1, manifest.least_frames),
        )

    def check_chunk(self, tensors: dict[str, Array], *, end: bool, where: str, max_frames: int) -> int:
        """The number of frames of a chunk whose tensors all fit. Raises `TensorError` or `TooLargeError`."""
        if end and not tensors:
            return 0
        if tensors.keys() != self._input_set:
            self.check_names(tensors, where, self.inputs)
        for port in self.inputs:
            port.check(tensors[port.name], where)
        count = len(tensors[self.inputs[0].name])
        if len(self.inputs) > 1 and any(len(tensor) != count for tensor in tensors.values()):
            frames = {name: len(tensor) for name, tensor in tensors.items()}
            raise TensorError(f"the tensors of {where} differ in their frames ({frames}); send the same number of each")
        if count == 0 and not end:
            raise TensorError(f"{where} has no frames; only a chunk with `end` may be empty")
        if count > max_frames:
            raise TooLargeError(f"{where} has {count} frames and {max_frames} are allowed; send shorter chunks")
        return count

    def check_states(self, tensors: Mapping[str, Array], where: str) -> None:
        """Raise `TensorError` unless each is one of the states' rows, by input name, and finite."""
        rows = {state.input: state for state in self.states}
        for name, array in tensors.items():
            if name not in rows:
                raise TensorError(f"{where} has a state {name!r}; the model has {', '.join(rows)}", tensor=name)
            wanted = rows[name]
            if (array.dtype, array.shape) != (wanted.dtype, wanted.row) or not np.isfinite(array).all():
                raise TensorError(
                    f"state {name!r} of {where} is {describe(array.dtype, array.shape)}; "
                    f"wanted finite {describe(wanted.dtype, wanted.row)}",
                    tensor=name,
                )

    def check_names(self, tensors: dict[str, Array], where: str, ports: Sequence[Port]) -> None:
        wanted = {port.name for port in ports}
        if tensors.keys() != wanted:
            raise TensorError(f"{where} has the tensors {sorted(tensors)}; wanted {sorted(wanted)}")
