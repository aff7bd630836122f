"""Streams to try a model on: drawn like its example, or the caller's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from carousel_export.errors import ExampleError
from carousel_export.reference import Stream
from carousel_export.runs import grow
from carousel_export.signature import BATCH, TIME, Signature

# Sizes of contexts: few, so that rows of one size meet in a batch.
_SOURCES = (7, 1, 4)


@dataclass
class Draw:
    """Draws streams: floats normal with the example's spread, integers from the range the example has, all repeatable.

    `samples` are the example's rows, each a stream; `given`, the streams that the caller wants tried as well.
    """

    signature: Signature
    samples: Sequence[Stream]
    given: Sequence[Stream] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(20))
    turns: Iterator[int] = field(default_factory=count)

    def stream(self, frames: int, *, initial: bool = False) -> Stream:
        """One stream of `frames`, with random cuts; `initial`: from a random state with values within (−1, 1)."""
        inputs = tuple(
            self._like([sample.inputs[i] for sample in self.samples], frames) for i in range(len(self.signature.inputs))
        )
        return Stream(inputs, self.states() if initial else None, self.cuts(frames), self.contexts())

    def arguments(self, stream: Stream) -> list[Tensor]:
        """What the model takes for a stream, alone or in a batch of one."""
        signature = self.signature
        given = {port.name: port.give(x) for port, x in zip(signature.inputs, stream.inputs, strict=True)}
        given |= {port.name: port.give(x) for port, x in zip(signature.contexts, stream.contexts, strict=True)}
        return signature.arrange(given)

    def contexts(self) -> tuple[Tensor, ...]:
        """Contexts of a size that many others have too. Whole numbers are those of one row, which belong together."""
        if not self.signature.contexts:
            return ()
        # In turn, so that every few streams have each size.
        turn = next(self.turns)
        sizes = {
            dim: _SOURCES[(turn + i * (turn // len(_SOURCES))) % len(_SOURCES)]
            for i, dim in enumerate(self.signature.sources)
        }
        row = self.samples[self.integer(0, len(self.samples))]
        drawn = []
        for i, (port, known) in enumerate(zip(self.signature.contexts, row.contexts, strict=True)):
            for axis, dim in enumerate(port.dims[1:]):
                known = grow(known, axis, sizes.get(dim, known.shape[axis]))  # noqa: PLW2901 - axis after axis
            if known.is_floating_point():
                known = self._like([sample.contexts[i] for sample in self.samples], *known.shape)  # noqa: PLW2901
            drawn.append(known)
        return tuple(drawn)

    def states(self) -> tuple[Tensor, ...]:
        """A random state: floats within (−1, 1), whole numbers 0 or 1, which any counter and flag may be."""
        return tuple(
            torch.rand(state.shape, generator=self.generator, dtype=state.dtype) * 2 - 1
            if state.dtype.is_floating_point
            else torch.randint(0, 2, state.shape, generator=self.generator).to(state.dtype)
            for state in self.signature.states
        )

    def cuts(self, frames: int) -> tuple[int, ...]:
        """Random chunk sizes that make up `frames`."""
        cuts: list[int] = []
        while (left := frames - sum(cuts)) > 0:
            cuts.append(min(left, self.integer(1, 1 + max(4, frames // 5))))
        return tuple(cuts)

    def integer(self, low: int, high: int) -> int:
        """From low to high, high excluded."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def _like(self, samples: Sequence[Tensor], *lead: int) -> Tensor:
        """Of the samples' kind, with these sizes first."""
        flat = torch.cat([sample.flatten() for sample in samples])
        shape = (*lead, *samples[0].shape[len(lead) :])
        if flat.is_floating_point():
            spread = flat.std(correction=0) if flat.std(correction=0) > 0 else torch.ones(())
            return torch.randn(shape, generator=self.generator) * spread
        drawn = torch.randint(int(flat.min()), int(flat.max()) + 1, shape, generator=self.generator)
        return drawn.to(flat.dtype)


def given_streams(signature: Signature, data: Sequence[Tensor | Sequence[Tensor]]) -> tuple[Stream, ...]:
    """The caller's sequences, each a tensor for each argument of the model: `[time, …]`, or a context `[…]`.

    Raises `ExampleError` for another shape.
    """
    ports = {port.name: port for port in (*signature.inputs, *signature.contexts)}
    arguments = signature.arguments or tuple(ports)
    streams = []
    for i, item in enumerate(data):
        tensors = (item,) if isinstance(item, Tensor) else tuple(item)
        if len(tensors) != len(arguments):
            raise ExampleError(f"data[{i}] has {len(tensors)} tensors; give one for each of {', '.join(arguments)}")
        found = dict(zip(arguments, tensors, strict=True))
        for name, x in found.items():
            wanted = ports[name].dims[1:]
            shape = [dim if not dim.isdecimal() else str(size) for dim, size in zip(wanted, x.shape, strict=False)]
            if x.dtype != ports[name].dtype or x.dim() != len(wanted) or shape != list(wanted) or not x.numel():
                raise ExampleError(
                    f"data[{i}] gives {name!r} {x.dtype} {list(x.shape)}; give {ports[name].dtype} "
                    f"[{', '.join(wanted)}]"
                )
        inputs = tuple(found[port.name] for port in signature.inputs)
        if len({len(x) for x in inputs}) != 1:
            raise ExampleError(f"data[{i}] has inputs of different length; give each as many frames")
        streams.append(Stream(inputs, contexts=tuple(found[port.name] for port in signature.contexts)))
    return tuple(streams)


def example_samples(signature: Signature, example: Sequence[Tensor]) -> list[Stream]:
    """The example's rows as single sequences."""
    columns = {}
    for name, x in zip(signature.arguments, example, strict=True):
        port = next(port for port in (*signature.inputs, *signature.contexts) if port.name == name)
        if BATCH in port.eager_dims:
            columns[name] = list(port.fetch(x).unbind(0))
        else:
            columns[name] = [x.movedim(port.eager_dims.index(TIME), 0)]
    return [
        Stream(
            tuple(columns[port.name][row] for port in signature.inputs),
            contexts=tuple(columns[port.name][row] for port in signature.contexts),
        )
        for row in range(len(columns[signature.arguments[0]]))
    ]
