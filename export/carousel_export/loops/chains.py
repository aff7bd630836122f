"""Chains: the calls of one cell that hand its state from frame to frame."""

from collections.abc import Sequence
from dataclasses import dataclass

from carousel_export.errors import ModelError
from carousel_export.loops.lanes import Numbering
from carousel_export.loops.trace import Call, Trace, Value, reaches


@dataclass(frozen=True, eq=False)
class Chain:
    """A cell's calls in the order of the loop. `initial` is the state that the first one is given, or empty: zero."""

    path: str
    calls: tuple[Call, ...]
    initial: tuple[Value, ...]
    # The first of them among all calls of the cell, and how many calls later the next one comes.
    start: int
    stride: int

    def where(self) -> str:
        """The cell, for messages."""
        return self.path or "the model itself"


def find_chains(trace: Trace, numbering: Numbering, frames: int) -> list[Chain]:
    """Every chain of a run over so many frames.

    Raises `ModelError`, naming the cell, where its calls do not hand on its state once a frame.
    """
    found = []
    for path, calls in trace.cells.items():
        links: list[list[Call]] = []
        for call in calls:
            given = [numbering.canonical(value) for value in state_of(call)]
            link = next((link for link in links if given and given == _returned(link[-1])), None)
            if link is None:
                links.append([call])
            else:
                link.append(call)
        for link in links:
            places = [calls.index(call) for call in link]
            stride = places[1] - places[0] if len(places) > 1 else 1
            even = places == [places[0] + i * stride for i in range(len(places))]
            if len(link) != frames or not even:
                raise ModelError(_unchained(path, calls, links, frames))
            found.append(Chain(path, tuple(link), tuple(state_of(link[0])), places[0], stride))
    return found


def input_of(call: Call) -> Value:
    """The frame that a cell is given."""
    value: Value = call.args[0] if call.args else call.kwargs["input"]
    return value


def state_of(call: Call) -> list[Value]:
    """The state that a cell is given: h, or h and c; empty where it is given none."""
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    return [] if given is None else [given] if isinstance(given, Value) else list(given)


def feeds_back(chain: Chain) -> bool:
    """Whether a frame's input is computed from what the cell answered to a frame before it."""
    own = set(chain.calls)
    return reaches((input_of(call).call for call in chain.calls), lambda call: call in own)


def _returned(call: Call) -> list[Value]:
    return [Value(call, leaf) for leaf in range(len(call.results))]


def _unchained(path: str, calls: Sequence[Call], links: Sequence[Sequence[Call]], frames: int) -> str:
    where = f"{path} is called {len(calls)} times over {frames} frames"
    if len(calls) % frames:
        return f"{where}, not once for each; loop over all frames of the input"
    starts = [value.call for link in links[1:] for value in state_of(link[0])]
    if reaches(starts, lambda call: call in calls):
        return (
            f"{where}, and its state does not go from one call to the next as it was returned; hand it on unchanged, "
            "or change the answer alone"
        )
    return f"{where}, and its state does not go from one call to the next; start it before the loop, not in it"
