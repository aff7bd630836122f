"""Steps that nobody asked for: drawn inputs of a full step, to measure a graph or to make it ready."""

from collections.abc import Sequence

import numpy as np

from carousel_server.engine.runner import AHEAD
from carousel_server.engine.spec import Array, ModelSpec, Port

_FRAMES = 10
# The size of an axis that a session's context says.
_CONTEXT = 5


def full_step(spec: ModelSpec, names: Sequence[str], rows: int, frames: int = _FRAMES) -> dict[str, Array]:
    """The graph inputs `names` for `rows` blocks of as many frames, with as many ahead where the graph takes them."""
    rng = np.random.default_rng(0)

    def draw(port: Port, *leading: int) -> Array:
        shape = (*leading, *(_CONTEXT if size < 0 else size for size in port.item))
        if port.dtype.kind == "f":
            return rng.standard_normal(shape).astype(port.dtype)
        return np.zeros(shape, port.dtype)

    feeds: dict[str, Array] = {}
    for suffix in ("", AHEAD):
        feeds |= {port.name + suffix: draw(port, rows, frames) for port in spec.inputs}
        feeds[spec.lengths + suffix] = np.full(rows, frames, np.int32)
    feeds |= {port.name: draw(port, rows) for port in spec.contexts}
    feeds |= {state.input: np.zeros((rows, *state.row), state.dtype) for state in spec.states}
    return {name: feeds[name] for name in names}
