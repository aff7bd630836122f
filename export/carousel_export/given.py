"""Axes as the caller names them: which axis of each input is batch, time, or one of a context's own."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from carousel_export.errors import ExampleError
from carousel_export.signature import BATCH, TIME

# For each input the axis that has a role, None where it has none.
Axes = tuple[int | None, ...]


def given_axes(
    names: Sequence[str], example: tuple[Tensor, ...], dims: Mapping[str, Sequence[str]] | None
) -> dict[str, Axes | None]:
    """The axes that the caller names; empty where it names none."""
    if dims is None:
        return {}
    if set(dims) != set(names):
        raise ExampleError(f"dims names {sorted(dims)}, the inputs are {sorted(names)}; name the axes of each")
    for name, x in zip(names, example, strict=True):
        roles = [dim for dim in dims[name] if not dim.isdecimal()]
        wanted = [str(size) if dim.isdecimal() else dim for dim, size in zip(dims[name], x.shape, strict=False)]
        if list(dims[name]) != wanted or len(dims[name]) != x.dim() or len(set(roles)) != len(roles):
            raise ExampleError(
                f"dims of {name!r} are {','.join(dims[name])} and its example is {list(x.shape)}; give {x.dim()} "
                "dims, each role once, and sizes as they are"
            )
    if not any(TIME in dims[name] for name in names):
        raise ExampleError("dims name no axis that is time; name it in each input that has a value for each frame")
    if len({BATCH in dims[name] for name in names}) != 1:
        raise ExampleError("dims name the batch axis of some inputs only; name one for each input, or for none")
    return {
        TIME: _axes(names, dims, TIME),
        BATCH: _axes(names, dims, BATCH) if BATCH in dims[names[0]] else None,
    }


def given_sources(names: Sequence[str], dims: Mapping[str, Sequence[str]]) -> list[tuple[str, Axes]]:
    """The named axes that are neither batch nor time."""
    found = dict.fromkeys(dim for name in names for dim in dims[name] if dim not in (BATCH, TIME))
    return [(dim, _axes(names, dims, dim)) for dim in found if not dim.isdecimal()]


def _axes(names: Sequence[str], dims: Mapping[str, Sequence[str]], role: str) -> Axes:
    return tuple(list(dims[name]).index(role) if role in dims[name] else None for name in names)
