"""Streams to try a model on: drawn like its example, or the caller's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from carousel_export.errors import ExampleError
from carousel_export.reference import Stream
from carousel_export.signature import BATCH, TIME, Signature


@dataclass
class Draw:
    """Draws streams: floats normal with the example's spread, integers from the range the example has, all repeatable.

    `samples` are the example's frames, one tensor `[time, …]` for each stream and input; `given`, the streams that the
    caller wants tried as well.
    """

    signature: Signature
    samples: Sequence[Sequence[Tensor]]
    given: Sequence[Stream] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(20))

    def stream(self, frames: int, *, initial: bool = False) -> Stream:
        """One stream of `frames`, with random cuts; `initial`: from a random state with values within (−1, 1)."""
        inputs = tuple(
            self._frames(frames, [sample[i] for sample in self.samples]) for i in range(len(self.signature.inputs))
        )
        return Stream(inputs, self.states() if initial else None, self.cuts(frames))

    def states(self) -> tuple[Tensor, ...]:
        """A random state."""
        shapes = [(state.rows, state.size) for state in self.signature.states]
        return tuple(torch.rand(shape, generator=self.generator) * 2 - 1 for shape in shapes)

    def cuts(self, frames: int) -> tuple[int, ...]:
        """Random chunk sizes that make up `frames`."""
        cuts: list[int] = []
        while (left := frames - sum(cuts)) > 0:
            cuts.append(min(left, self.integer(1, 1 + max(4, frames // 5))))
        return tuple(cuts)

    def integer(self, low: int, high: int) -> int:
        """From low to high, high excluded."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def _frames(self, frames: int, samples: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([sample.flatten() for sample in samples])
        shape = (frames, *samples[0].shape[1:])
        if flat.is_floating_point():
            spread = flat.std(correction=0) if flat.std(correction=0) > 0 else torch.ones(())
            return torch.randn(shape, generator=self.generator) * spread
        drawn = torch.randint(int(flat.min()), int(flat.max()) + 1, shape, generator=self.generator)
        return drawn.to(flat.dtype)


def given_streams(signature: Signature, data: Sequence[Tensor | Sequence[Tensor]]) -> tuple[Stream, ...]:
    """The caller's sequences, each one tensor `[time, …]` for each input. Raises `ExampleError` for another shape."""
    streams = []
    for i, item in enumerate(data):
        inputs = (item,) if isinstance(item, Tensor) else tuple(item)
        if len(inputs) != len(signature.inputs):
            raise ExampleError(
                f"data[{i}] has {len(inputs)} tensors; give one [time, …] for each of the model's inputs"
            )
        for port, x in zip(signature.inputs, inputs, strict=True):
            wanted = [int(dim) for dim in port.dims[2:]]
            if x.dtype != port.dtype or list(x.shape[1:]) != wanted or not x.numel():
                raise ExampleError(
                    f"data[{i}] gives {port.name!r} {x.dtype} {list(x.shape)}; give {port.dtype} [time, *{wanted}]"
                )
        if len({len(x) for x in inputs}) != 1:
            raise ExampleError(f"data[{i}] has inputs of different length; give each as many frames")
        streams.append(Stream(inputs))
    return tuple(streams)


def example_samples(signature: Signature, example: Sequence[Tensor]) -> list[list[Tensor]]:
    """The example's rows as single sequences, `[time, …]` for each input."""
    columns = []
    for port, x in zip(signature.inputs, example, strict=True):
        if BATCH in port.eager_dims:
            columns.append(list(port.fetch(x).unbind(0)))
        else:
            columns.append([x.movedim(port.eager_dims.index(TIME), 0)])
    return [list(row) for row in zip(*columns, strict=True)]
