"""Which input is the state that which output hands on: by name, by structure or by shape, and never by a coin."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from carousel_export.errors import ExampleError
from carousel_export.imported.foreign import Value
from carousel_export.signature import BATCH

_PLACE = {"in", "out", "input", "output", "next", "new", "prev", "previous", "init", "initial", "final", "last", "cur"}
_PLACE |= {"current", "updated"}
_LENGTHS = re.compile(r"len", re.IGNORECASE)


def find_pairs(
    inputs: Sequence[Value], outputs: Sequence[Value], given: Mapping[str, str], *, timed: Sequence[str]
) -> dict[str, str]:
    """State input → state output. `timed` are inputs with a value for each frame, which are none.

    Raises `ExampleError`, with the candidates, for a pair that is given and does not fit.
    """
    by_name = {value.name: value for value in outputs}
    for name, output in given.items():
        known = {value.name: value for value in inputs}
        if name not in known or output not in by_name:
            raise ExampleError(
                f"--state {name}={output} names no input and output; there are {', '.join(known)} and "
                f"{', '.join(by_name)}"
            )
        if not fits(known[name], by_name[output]):
            raise ExampleError(f"--state {name}={output}: {known[name]} and {by_name[output]} differ")
    pairs = dict(given)
    if given and not timed:
        return pairs  # a file of one frame a call: an input may be like an output, so what is given is all
    rules: list[Callable[[Value], Hashable]] = [_stem, _bare, _place]
    if timed:
        rules.append(lambda _: "any")
    for rule in rules:
        left = [v for v in inputs if v.name not in pairs and v.name not in timed and v.dtype is not None]
        free = [v for v in outputs if v.name not in pairs.values()]
        for value in left:
            mates = [v for v in free if rule(v) == rule(value) is not None and fits(value, v)]
            rivals = [v for v in left if any(rule(v) == rule(mate) and fits(v, mate) for mate in mates)]
            if len(mates) == 1 and rivals == [value]:
                pairs[value.name] = mates[0].name
    return pairs


def fits(value: Value, output: Value) -> bool:
    """Whether what comes out as `output` can go in as `value`: their axes are known here."""
    return (value.dtype, value.dims) == (output.dtype, output.dims)


def is_lengths(value: Value) -> bool:
    """Whether an input looks like the valid frames of each row: whole numbers, one a row, and called so."""
    whole = value.dtype in (torch.int32, torch.int64)
    return whole and value.dims == (BATCH,) and bool(_LENGTHS.search(value.name))


def _words(value: Value) -> tuple[str, ...]:
    split = re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Za-z])", "_", value.name)
    return tuple(word for word in re.split(r"[^A-Za-z0-9]+", split.lower()) if word)


def _stem(value: Value) -> tuple[str, ...] | None:
    """The name without words for in and out: `cache_out.0` is `cache.0`."""
    return tuple(word for word in _words(value) if word not in _PLACE) or None


def _bare(value: Value) -> tuple[str, ...] | None:
    """Without the first and last index of a sequence as well: h0 and hn are h, stateN is state."""
    stem = _stem(value) or ()
    if stem and re.fullmatch(r"[hc]n", stem[-1]):
        return (*stem[:-1], stem[-1][0])
    return (stem[:-1] if len(stem) > 1 and stem[-1] in ("0", "1", "n", "t") else stem) or None


def _place(value: Value) -> str | None:
    """The place in a tuple, the second of `hx.1`."""
    found = re.fullmatch(r".+\.(\d+)", value.name)
    return found[1] if found else None
