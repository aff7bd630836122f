"""Which axes of a file's tensors are batch and time: by its own symbols, by what the caller says, or by running it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from carousel_export.errors import ExampleError
from carousel_export.imported.foreign import Foreign, Scalar, Value
from carousel_export.signature import BATCH, TIME, Dims

_BATCH_WORDS = {"batch", "batch_size", "bs", "b", "n"}
_TIME_WORDS = {
    "time",
    "t",
    "seq",
    "sequence",
    "seq_len",
    "seq_length",
    "sequence_length",
    "frames",
    "num_frames",
    "length",
}
# Sizes to try, unlike each other and most others.
_SIZES = {BATCH: 3, TIME: 11}


def name_inputs(
    foreign: Foreign, given: Mapping[str, Dims], constants: Mapping[str, Tensor | Scalar]
) -> dict[str, Dims]:
    """The axes of each input that is no constant. Raises `ExampleError` where more than one reading works, or none."""
    values = [value for value in foreign.inputs if value.name not in constants]
    if unknown := sorted(given.keys() - {value.name for value in values}):
        raise ExampleError(f"{unknown[0]!r} is no input of {foreign.path.name}; it has {_names(foreign.inputs)}")
    for value in values:
        if value.number or (value.dims == () and value.name not in given):
            raise ExampleError(f"{value.name!r} is a single value; give it with --constant {value.name}=VALUE")
        if value.dims is None and value.name not in given:
            raise ExampleError(
                f"{foreign.path.name} does not say what {value.name!r} is; give --input {value.name}:DTYPE:DIMS, as "
                f"{value.name}:float32:batch,time,80, or {value.name}:float32:2,batch,128 for a state"
            )
        if value.name not in given and not value.dynamic:
            raise ExampleError(
                f"{value} has sizes alone; say which axis is the batch with --input, or give it with --constant"
            )
    readings = [
        dict(zip((value.name for value in values), dims, strict=True))
        for dims in itertools.product(*([given[v.name]] if v.name in given else _readings(v) for v in values))
    ]
    working = [dims for dims in readings if _runs(foreign, values, dims, constants)]
    if len(working) == 1:
        return working[0]
    if not working:
        # The message of the file's own first failure says most.
        foreign.run({**constants, **draw(values, readings[0])})
    unclear = next(v for v in values if len({dims[v.name] for dims in working}) > 1)
    ways = " and as ".join(sorted({",".join(dims[unclear.name]) for dims in working}))
    raise ExampleError(f"{unclear} can be read as {ways}; say which with --input {unclear.name}:DTYPE:DIMS")


def name_outputs(
    foreign: Foreign, inputs: Mapping[str, Dims], constants: Mapping[str, Tensor | Scalar]
) -> dict[str, Value]:
    """The outputs with their dtypes and axes: those that grow with the batch's and with time's."""
    values = [value for value in foreign.inputs if value.name in inputs]
    base = foreign.run({**constants, **draw(values, inputs)})
    named = [[str(size) for size in y.shape] for y in base]
    for role in (BATCH, TIME):
        if not any(role in dims for dims in inputs.values()):
            continue
        grown = foreign.run({**constants, **draw(values, inputs, {role: _SIZES[role] + 2})})
        for value, dims, was, now in zip(foreign.outputs, named, base, grown, strict=True):
            axes = [axis for axis, (a, b) in enumerate(zip(was.shape, now.shape, strict=True)) if a != b]
            if len(axes) > 1 or (role == BATCH and not axes):
                raise ExampleError(
                    f"output {value.name!r} {list(was.shape)} has {len(axes)} axes that follow {role}; one is wanted"
                )
            if axes and was.shape[axes[0]] != _SIZES[role]:
                raise ExampleError(
                    f"output {value.name!r} has {was.shape[axes[0]]} entries along {role} where the input has "
                    f"{_SIZES[role]}; a bundle has a value for each frame, or one for the sequence"
                )
            for axis in axes:
                dims[axis] = role
    return {
        value.name: replace(value, dtype=y.dtype, dims=tuple(dims))
        for value, dims, y in zip(foreign.outputs, named, base, strict=True)
    }


def draw(
    values: Sequence[Value], dims: Mapping[str, Dims], sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Some tensor for each input: small numbers, and 1 for whole ones, which ids, lengths and counters may be."""
    sizes = {**_SIZES, **(sizes or {})}
    generator = torch.Generator().manual_seed(4)
    drawn = {}
    for value in values:
        assert value.dtype is not None, "a plain number is a constant"
        shape = [sizes.get(dim) or int(dim) for dim in dims[value.name]]
        drawn[value.name] = (
            torch.randn(shape, generator=generator).to(value.dtype)
            if value.dtype.is_floating_point
            else torch.ones(shape, dtype=value.dtype)
        )
    return drawn


def _readings(value: Value) -> Iterator[Dims]:
    """The ways to read a declared shape: two axes without a size are batch and time, one is the batch."""
    assert value.dims is not None, "asked for above"
    words = {axis: _word(value.dims[axis]) for axis in value.dynamic}
    if len(value.dynamic) > 2:
        raise ExampleError(
            f"{value} has {len(value.dynamic)} axes without a size, of which one can be batch and one time; say what "
            "it is with --input"
        )
    alone = TIME if TIME in words.values() else BATCH
    orders = itertools.permutations((BATCH, TIME)) if len(value.dynamic) == 2 else [(alone,)]
    found = [dict(zip(value.dynamic, order, strict=True)) for order in orders]
    named = [roles for roles in found if all(words[axis] in (None, role) for axis, role in roles.items())]
    for roles in named or found:
        yield tuple(roles.get(axis) or str(dim) for axis, dim in enumerate(value.dims))


def _word(dim: int | str | None) -> str | None:
    word = dim.lower() if isinstance(dim, str) else ""
    return BATCH if word in _BATCH_WORDS else TIME if word in _TIME_WORDS else None


def _runs(
    foreign: Foreign, values: Sequence[Value], dims: Mapping[str, Dims], constants: Mapping[str, Tensor | Scalar]
) -> bool:
    try:
        foreign.run({**constants, **draw(values, dims)})
    except ExampleError:
        return False
    return True


def _names(values: Sequence[Value]) -> str:
    return ", ".join(map(str, values))
