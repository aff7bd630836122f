"""The user's own loops as the reference: run as they are written, from a state, and watched for the state they leave.

So the exported layers are compared with the cells themselves under every policy. Causal and carry start each chain of
calls from the state that the block before left. Lookahead is one run over a block and the frames ahead of it: forward
chains start from what is carried, and hand on their state after the block; backward ones start from zero.
"""

import copy
import functools
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from carousel_export.eager import Eager, Handler
from carousel_export.loops.framed import with_cells
from carousel_export.loops.program import Size, tensors_of
from carousel_export.loops.reroll import Loop, Rerolled, reroll
from carousel_export.recurrent import States, as_hx, as_states, find_recurrent
from carousel_export.signature import TIME


def without_loops(eager: Eager, example: Sequence[Tensor]) -> Eager:
    """The model with its loops over cells, and over layers frame by frame, as layers; it knows the loops as well.

    A model without such loops is itself.

    Raises `ModelError`, naming the cell, where its loop is no layer.
    """
    eager = with_cells(eager, example)
    if not eager.cells:
        return eager
    rerolled = reroll(eager, example)
    result = copy.copy(eager)
    result.module, result.cells = rerolled.module, {}
    result.recurrent = find_recurrent(rerolled.module)
    names = {name for loop in rerolled.loops for old, name in loop.weights.items() if old in eager.trainable}
    result.trainable = eager.trainable | names
    result.written = Written(eager, rerolled, result)
    return result


class Written:
    """The model as its user wrote it, which can be asked from any state."""

    def __init__(self, eager: Eager, rerolled: Rerolled, result: Eager) -> None:
        """`eager` has the loops, `result` their layers, and what is found out of how the model is called."""
        self.eager = eager
        self._rerolled = rerolled
        self._result = result

    def run(
        self,
        inputs: Sequence[Tensor],
        handler: Handler,
        memory: MutableMapping[str, States],
        block: int | None,
        *,
        plain: bool,
    ) -> list[Tensor]:
        """The outputs; `memory` has each layer's states `[rows, batch, size]` by call, and is given those at the end.

        `block`: of the frames, how many are not ahead, under lookahead; else None. `plain`: the loops start as they are
        written, but for a state that is passed in. Recurrent layers beside the loops are answered by `handler`.
        """
        self.eager.calling = self._result.calling
        i, axis = self._rerolled.axes[TIME]
        frames = tensors_of(self.eager.calling.arguments(inputs, None))[i].shape[axis]
        places = self._places(frames)
        ended: dict[str, dict[int, States]] = {}
        counts: Counter[str] = Counter()

        def answer(path: str, *args: Any, **kwargs: Any) -> Any:
            cell: Any = self.eager.cells[path]
            loop, step = places.get((path, counts[path]), (None, 0))
            counts[path] += 1
            if loop is None:
                return type(cell).forward(cell, *args, **kwargs)
            anew = loop.reverse and block is not None
            passed = loop.call in self.eager.calling.passed
            if step == 0 and (passed or not plain) and not anew:
                before = tuple(state[loop.row] for state in memory[loop.call])
                args, kwargs = (args[0] if args else kwargs["input"], as_hx(before)), {}
            result = type(cell).forward(cell, *args, **kwargs)
            if anew and step == 0:
                # Each block starts the backward row where the loop has it start, which is what it hands on.
                hx = args[1] if len(args) > 1 else kwargs.get("hx")
                zeros = tuple(torch.zeros_like(state) for state in as_states(result))
                ended.setdefault(loop.call, {})[loop.row] = zeros if hx is None else as_states(hx)
            elif not anew and step == (frames if block is None else block) - 1:
                ended.setdefault(loop.call, {})[loop.row] = as_states(result)
            return result

        for path, cell in self.eager.cells.items():
            cell.__dict__["forward"] = functools.partial(answer, path)
        try:
            outputs = self.eager.run(inputs, handler)
        finally:
            for cell in self.eager.cells.values():
                del cell.__dict__["forward"]
        for call, rows in ended.items():
            memory[call] = tuple(
                torch.stack(states) for states in zip(*(rows[row] for row in sorted(rows)), strict=True)
            )
        return outputs

    def _places(self, frames: int) -> Mapping[tuple[str, int], tuple[Loop, int]]:
        """For each of a cell's calls the loop that it belongs to, and how far that one is."""
        found = {}
        for loop in self._rerolled.loops:
            start = loop.start.value({TIME: frames}) if isinstance(loop.start, Size) else loop.start
            found.update({(loop.cell, start + step * loop.stride): (loop, step) for step in range(frames)})
        return found
