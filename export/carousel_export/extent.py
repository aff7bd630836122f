"""Dimensions that follow time with another size, as behind a convolution with a stride."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from carousel_protos.v1 import manifest_pb2 as pb

# The first of them; the next is time_out_2.
TIME_OUT = "time_out"


@dataclass(frozen=True)
class Extent:
    """A dimension with `(frames + offset) / stride` entries, rounded down."""

    name: str
    stride: int
    offset: int

    def size(self, frames: int) -> int:
        """Its entries for a sequence of so many frames."""
        return (frames + self.offset) // self.stride

    def message(self) -> pb.Extent:
        """The extent as the manifest has it."""
        return pb.Extent(name=self.name, stride=self.stride, offset=self.offset)

    @classmethod
    def from_message(cls, message: pb.Extent) -> Self:
        """The extent that a manifest has."""
        return cls(message.name, message.stride, message.offset)


def fit(sizes: Mapping[int, int]) -> Extent | None:
    """The extent with these sizes at each of a row of lengths, yet without a name; None where there is none.

    A stride is told for sure where the lengths are twice as many.

    Convolutions, pooling and slices one after the other are such an extent: dividing and rounding down twice, with
    offsets, is dividing and rounding down once.
    """
    for stride in range(1, (max(sizes) - min(sizes)) // 2 + 1):
        least = max(size * stride - frames for frames, size in sizes.items())
        found = Extent(TIME_OUT, stride, least)
        if all(found.size(frames) == size for frames, size in sizes.items()):
            return found
    return None
