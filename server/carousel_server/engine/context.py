"""What a session is given once, when it opens, and every one of its steps sees."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from carousel_server.engine.spec import Array, ModelSpec, Port, describe
from carousel_server.errors import TensorError


@dataclass(frozen=True)
class Context:
    """An array `[…]` for each of the model's contexts, in the spec's order. Raises nothing; `read_context` checks.

    `shapes` says which owners may share a step: contexts are stacked, never padded, since only the model could mask.
    """

    arrays: tuple[Array, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(array.shape for array in self.arrays))

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


NO_CONTEXT = Context()


def read_context(spec: ModelSpec, tensors: Mapping[str, Array], where: str) -> tuple[Context, tuple[Port, ...]]:
    """The context in the spec's order, and the outputs with their sizes in it.

    Raises `TensorError` for one that lacks, does not fit, or differs from another in a size that they share.
    """
    wanted = [port.name for port in spec.contexts]
    if sorted(tensors) != sorted(wanted):
        raise TensorError(f"{where} has the contexts {sorted(tensors)}; wanted {sorted(wanted)}")
    if not wanted:
        return NO_CONTEXT, spec.outputs
    sizes: dict[str, int] = {}
    for port in spec.contexts:
        array = tensors[port.name]
        port.check(array, where, ())
        for axis, dim in port.named:
            if sizes.setdefault(dim, array.shape[axis]) != array.shape[axis]:
                raise TensorError(
                    f"context {port.name!r} of {where} is {describe(array.dtype, array.shape)}, and {dim} is "
                    f"{sizes[dim]} in another; send the same {dim} in each",
                    tensor=port.name,
                )
    return Context(tuple(tensors[name] for name in wanted)), tuple(port.bind(sizes) for port in spec.outputs)


def read_contexts(spec: ModelSpec, tensors: Mapping[str, Array], batch: int) -> tuple[list[Context], tuple[Port, ...]]:
    """The contexts of a batch's rows, and the outputs with their sizes, the same for all.

    `tensors` has the contexts as `[batch, …]`, and may have others beside them. Raises `TensorError` as `read_context`
    does, and for an array without a row for each.
    """
    own = {port.name: tensors[port.name] for port in spec.contexts}
    for name, array in own.items():
        if array.ndim < 1 or len(array) != batch:
            raise TensorError(
                f"context {name!r} is {describe(array.dtype, array.shape)} beside {batch} rows; send it for each",
                tensor=name,
            )
    rows = [
        read_context(spec, {name: array[i] for name, array in own.items()}, f"row {i} of the request")
        for i in range(batch)
    ]
    return [context for context, _ in rows], rows[0][1] if rows else spec.outputs
