"""A forward and a backward layer over the same sequence, concatenated: one bidirectional layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from carousel_export.loops.program import Batched, Framed, Program, Register, Step

_CATS = (torch.cat, torch.concat, torch.concatenate)


def registers(tree: Any) -> list[Register]:
    """The registers in a step's arguments."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        inner = leaf.tensor if isinstance(leaf, Framed | Batched) else leaf
        if isinstance(inner, Register):
            found.append(inner)
    return found


def prune(program: Program) -> tuple[Program, dict[int, int]]:
    """The program without the steps that nothing uses, and where each step that is left has gone."""
    used = {register.step for register in registers(program.outputs)}
    for i in reversed(range(len(program.steps))):
        if i in used:
            step = program.steps[i]
            used |= {register.step for register in registers((step.args, step.kwargs or {}))}
    kept = {old: new for new, old in enumerate(i for i in range(len(program.steps)) if i in used)}

    def move(register: Register) -> Register:
        return register if register.step < 0 else Register(kept[register.step], register.leaf)

    steps = [program.steps[old] for old in kept]
    moved = [_mapped(step, move) for step in steps]
    return Program(tuple(moved), _map(program.outputs, move)), kept


def pairs(program: Program, backward: Mapping[int, bool]) -> list[tuple[int, int, int]]:
    """(forward layer's step, backward layer's step, concatenation's step) where these are one bidirectional layer.

    `backward` says for each layer's step whether it is a backward one.
    """
    users: dict[Register, list[int]] = {}
    for i, step in enumerate(program.steps):
        for register in registers((step.args, step.kwargs or {})):
            users.setdefault(register, []).append(i)
    for register in registers(program.outputs):
        users.setdefault(register, []).append(len(program.steps))
    found = []
    for i, step in enumerate(program.steps):
        if step.target not in _CATS:
            continue
        joined = [_origin(program, register) for register in registers(step.args)]
        if len(joined) != 2 or joined[0][1] != joined[1][1] or not _is_last(step):
            continue
        (a, path_a), (b, _) = joined
        layers = [register.step for register in (a, b) if register.leaf == 0 and register.step in backward]
        if [backward[layer] for layer in layers] != [False, True]:
            continue
        one, two = (program.steps[layer] for layer in layers)
        alone = all(len(users[register]) == 1 for register in (a, b)) and (
            not path_a or all(len(users[register]) == 1 for register in registers(step.args))
        )
        if one.args == two.args and len(one.args) == 1 and alone:
            found.append((layers[0], layers[1], i))
    return found


def fuse(program: Program, pair: tuple[int, int, int]) -> Program:
    """The program with the pair as one layer, at the forward one's module; the concatenation is only a layout now."""
    forward, backward, cat = pair
    place = min(forward, backward)
    steps = list(program.steps)
    steps[place] = replace(steps[forward])
    y = Register(place)
    first = registers(steps[cat].args)[0]
    layout = None if first.leaf == 0 and first.step in (forward, backward) else steps[first.step]
    # A step cannot be nothing: a layout that is none is a transposition of an axis with itself.
    steps[cat] = replace(layout, args=(y, *layout.args[1:])) if layout else Step(torch.movedim, (y, 0, 0))
    rows = {forward: 0, backward: 1}
    for i, step in enumerate(steps):
        if step.target is torch.squeeze and (given := registers(step.args)) and given[0].step in rows and given[0].leaf:
            steps[i] = Step(torch.select, (Register(place, given[0].leaf), 0, rows[given[0].step]))
    return Program(tuple(steps), program.outputs)


def _origin(program: Program, register: Register) -> tuple[Register, tuple[Any, ...]]:
    """What a register is the layout of, and how it was moved."""
    step = program.steps[register.step] if register.step >= 0 else None
    if step is not None and step.target is torch.movedim and not step.framewise:
        return step.args[0], step.args[1:]
    return register, ()


def _is_last(step: Step) -> bool:
    """Whether a concatenation of `[time, batch, size]` tensors is along their size."""
    dim = step.args[1] if len(step.args) > 1 else (step.kwargs or {}).get("dim", 0)
    return dim in (-1, 2) if not step.framewise else dim == -1


def _mapped(step: Step, move: Any) -> Step:
    return replace(step, args=_map(step.args, move), kwargs=_map(dict(step.kwargs or {}), move))


def _map(tree: Any, move: Any) -> Any:
    def leaf(value: Any) -> Any:
        if isinstance(value, Framed | Batched):
            return type(value)(leaf(value.tensor))
        return move(value) if isinstance(value, Register) else value

    return pytree.tree_map(leaf, tree)
