"""From a model with loops over cells to the same model with recurrent layers, read from top to bottom.

The model is run at three small sizes; in each run the calls that are made alike for every frame become one call on the
whole sequence, a cell's chain of calls a recurrent layer with the cell's weights. What the three runs agree on, with
the sizes that follow batch and time, is the model for any size. It is believed only where it answers as the loops do.
"""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.eager import Eager, call_name
from carousel_export.errors import ModelError, one_line
from carousel_export.given import Axes
from carousel_export.loops.fuse import fuse, pairs, prune
from carousel_export.loops.layers import Cell, alike, layer_of, layer_of_both
from carousel_export.loops.program import Program, Rolled, Size, filled, fit, generalise, tensors_of
from carousel_export.loops.roll import Roller
from carousel_export.loops.trace import trace
from carousel_export.runs import candidates, grow_all
from carousel_export.signature import BATCH, TIME

log = logging.getLogger(__name__)
_FRAMES = (5, 7, 6)
# (batch, time) at which the layers have to answer as the loops do.
_TRIALS = ((1, 1), (2, 1), (1, 2), (3, 5), (2, 13))
# So many frames more show a loop that a stride has made shorter.
_MANY = 32
_SAME = {"rtol": 1e-5, "atol": 1e-6}


@dataclass(frozen=True)
class Loop:
    """A chain of a cell's calls, and what it became: row `row` of the states of a call of the layer at path `layer`.

    `start`: which of the cell's calls is the chain's first; `stride`: how many calls later its next one comes.
    """

    cell: str
    layer: str
    call: str
    row: int
    reverse: bool
    start: int | Size
    stride: int

    @property
    def weights(self) -> dict[str, str]:
        """For each name of a parameter of the cell its name in the layer."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return {f"{self.cell}.{name}": f"{self.layer}.{name}_l0{'_reverse' * self.row}" for name in names}


@dataclass(frozen=True)
class Rerolled:
    """A model without loops, and where its layers come from. `axes`: an input and its axis for batch and for time."""

    module: nn.Module
    loops: tuple[Loop, ...]
    axes: Mapping[str, tuple[int, int]]


def reroll(eager: Eager, example: Sequence[Any]) -> Rerolled:
    """The model with its loops over cells as layers, from an example of its arguments.

    Raises `ModelError`, naming the cell, where that cannot be.
    """
    roles = _find_axes(eager, example)
    programs, found, sizes = [], [], []
    # No other axis has these sizes.
    for frames, batch in zip(_FRAMES, eager.free_sizes(3, least=11), strict=True):
        size = {BATCH: batch, TIME: frames}
        run = trace(eager.module, list(eager.cells), _draw(example, roles, size))
        roller = Roller(eager.module, run, frames, batch)
        program, places = prune(roller.program())
        programs.append(program)
        found.append({places[layer.step]: layer for layer in roller.layers.values() if layer.step in places})
        sizes.append(size)
    program = generalise(programs, sizes, eager.name)
    loops = {}
    for step, layer in found[0].items():
        chain = layer.chain
        start = fit([layers[step].chain.start for layers in found], sizes, eager.name)
        both = any(other.chain.path == chain.path and other.reverse != layer.reverse for other in found[0].values())
        name = f"{chain.path}_backward" if both and layer.reverse else chain.path
        loops[step] = (Loop(chain.path, name, "", 0, layer.reverse, start, chain.stride),)
    # Of a tensor that has both: a state that is passed in may stand for another batch's.
    axes = next(
        {TIME: (i, time), BATCH: (i, batch)}
        for i, (time, batch) in enumerate(zip(roles[TIME], roles[BATCH], strict=True))
        if time is not None and batch is not None
    )
    rerolled = _assemble(eager, program, loops, axes)
    for batch, frames in _TRIALS:
        inputs = _draw(example, roles, {BATCH: batch, TIME: frames})
        if not _agree(eager.run(inputs), _run(rerolled.module, inputs)):
            raise ModelError(
                f"{_names(eager)} cannot be exported for any number of frames: as layers over whole sequences they "
                f"answer otherwise for {batch} × {frames} frames; write forward so that each frame is treated alike"
            )
    return rerolled


def _assemble(
    eager: Eager, program: Program, loops: Mapping[int, tuple[Loop, ...]], axes: Mapping[str, tuple[int, int]]
) -> Rerolled:
    """The module of a program, two layers that are the directions of one made that one."""
    model = copy.deepcopy(eager.module)
    cells: dict[str, Cell] = {path: model.get_submodule(path) for path in eager.cells}  # type: ignore[misc]
    steps = [replace(step, target=loops[i][0].layer) if i in loops else step for i, step in enumerate(program.steps)]
    program, layers = Program(tuple(steps), program.outputs), dict(loops)
    while pair := _next_pair(program, layers, cells):
        forward, backward = layers.pop(pair[0]), layers.pop(pair[1])
        layers[min(pair[:2])] = (*forward, replace(backward[0], layer=forward[0].layer, row=1))
        program, places = prune(fuse(program, pair))
        layers = {places[step]: both for step, both in layers.items()}
    counts: Counter[str] = Counter()
    named = []
    for _, directions in sorted(layers.items()):
        path = directions[0].layer
        parent, _, name = path.rpartition(".")
        own = [cells[loop.cell] for loop in directions]
        layer = layer_of_both(*own) if len(own) == 2 else layer_of(own[0], reverse=directions[0].reverse)
        if not counts[path]:
            model.get_submodule(parent)._modules[name] = layer  # noqa: SLF001 - a name in a ModuleList is a number
        named += [replace(loop, call=call_name(path, layer, counts[path])) for loop in directions]
        counts[path] += 1
    for path in {loop.cell for loop in named} - counts.keys():
        # Its weights are in the layer that it is a direction of.
        parent, _, name = path.rpartition(".")
        del model.get_submodule(parent)._modules[name]  # noqa: SLF001
    return Rerolled(Rolled(model, program, axes), tuple(named), axes)


def _next_pair(
    program: Program, layers: Mapping[int, tuple[Loop, ...]], cells: Mapping[str, Cell]
) -> tuple[int, int, int] | None:
    single = {step: own[0].reverse for step, own in layers.items() if len(own) == 1}
    names = Counter(own[0].layer for own in layers.values())
    for pair in pairs(program, single):
        forward, backward = (layers[step][0] for step in pair[:2])
        if alike(cells[forward.cell], cells[backward.cell]) and names[forward.layer] == names[backward.layer] == 1:
            return pair
    return None


def _find_axes(eager: Eager, example: Sequence[Any]) -> dict[str, Axes]:
    """Each tensor's axis that is batch and that is time: growing them grows the cells' rows, and their calls."""
    first = _cell_calls(eager, example)
    if first is None:
        eager.run(example)
    assert first is not None, "a model that fails on its example was refused just now"
    counts, rows = first
    if not any(counts.values()):
        raise ModelError(f"{eager.name} did not call any of its cells ({', '.join(eager.cells)})")
    found: dict[str, Axes] = {}
    tensors = tensors_of(example)
    for axes in candidates(tensors):
        size = next(x.shape[axis] for x, axis in zip(tensors, axes, strict=True) if axis is not None)
        if (calls := _cell_calls(eager, filled(example, grow_all(tuple(tensors), axes)))) is None:
            continue
        now, now_rows = calls
        if now_rows == rows and all(now[path] * size == counts[path] * (size + 1) for path in counts):
            found.setdefault(TIME, axes)
        if now == counts and all(now_rows[path] == rows[path] + 1 for path in rows):
            found.setdefault(BATCH, axes)
    if TIME not in found:
        for axes in candidates(tensors):
            calls = _cell_calls(eager, filled(example, grow_all(tuple(tensors), axes, _MANY)))
            if calls is not None and calls[1] == rows and calls[0] != counts:
                raise ModelError(
                    f"{_names(eager)}: the loop is over another number of frames than forward is given, as behind a "
                    "stride in time; use the layer, such as nn.LSTM, in place of the cell"
                )
        raise ModelError(
            f"{_names(eager)}: no axis of the inputs has one entry for each call; loop over all frames of the input, "
            "not over a number that is written in the code"
        )
    if BATCH not in found:
        raise ModelError(f"{_names(eager)}: a cell has to be given a batch; write forward for [batch, time, …] inputs")
    return found


def _cell_calls(eager: Eager, inputs: Sequence[Any]) -> tuple[dict[str, int], dict[str, int]] | None:
    """How often each cell is called, and with how many rows; None where the model does not run on such inputs."""
    counts = dict.fromkeys(eager.cells, 0)
    rows: dict[str, int] = {}

    def count(path: str) -> Any:
        def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            counts[path] += 1
            rows[path] = x.shape[0] if x.dim() == 2 else 0

        return note

    handles = [cell.register_forward_pre_hook(count(path), with_kwargs=True) for path, cell in eager.cells.items()]
    try:
        return None if eager.try_run(inputs) is None else (counts, rows)
    finally:
        for handle in handles:
            handle.remove()


def _draw(example: Sequence[Any], roles: Mapping[str, Axes], sizes: Mapping[str, int]) -> list[Any]:
    """Arguments like the example at these sizes, no frame like another."""
    generator = torch.Generator().manual_seed(sizes[BATCH] * sizes[TIME])
    drawn = []
    for i, x in enumerate(tensors_of(example)):
        shape = list(x.shape)
        for role, size in sizes.items():
            if (axis := roles[role][i]) is not None:
                shape[axis] = size
        if x.is_floating_point():
            spread = x.std(correction=0)
            drawn.append(torch.randn(shape, generator=generator) * (spread if spread > 0 else 1.0))
        else:
            drawn.append(torch.randint(int(x.min()), int(x.max()) + 1, shape, generator=generator).to(x.dtype))
    return filled(example, drawn)


def _run(module: nn.Module, inputs: Sequence[Any]) -> list[Tensor] | None:
    try:
        with torch.no_grad():
            return pytree.tree_leaves(module(*inputs))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        log.debug("the layers fail on %s: %s", [list(x.shape) for x in tensors_of(inputs)], one_line(error))
        return None


def _agree(wanted: Sequence[Tensor], got: Sequence[Tensor] | None) -> bool:
    return (
        got is not None
        and len(wanted) == len(got)
        and all(
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.allclose(a.double(), b.double(), equal_nan=True, **_SAME)
            for a, b in zip(wanted, got, strict=True)
        )
    )


def _names(eager: Eager) -> str:
    return ", ".join(f"{path} ({type(cell).__name__})" for path, cell in eager.cells.items())
