"""What a model takes, returns and remembers, with every axis named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from carousel_export.errors import ExportError
from carousel_export.extent import TIME_OUT, Extent
from carousel_export.padding import Plan
from carousel_export.policies import Full, Lookahead, Policy
from carousel_protos.v1 import manifest_pb2 as pb

BATCH, TIME, TIME_AHEAD = "batch", "time", "time_ahead"
# The first dimension of a context in which sessions may differ; the next is source_2.
SOURCE = "source"
LENGTHS = "lengths"
AHEAD = "_ahead"

Dims = tuple[str, ...]

_DTYPES = {
    torch.float32: pb.DATA_TYPE_FLOAT32,
    torch.int8: pb.DATA_TYPE_INT8,
    torch.int16: pb.DATA_TYPE_INT16,
    torch.int32: pb.DATA_TYPE_INT32,
    torch.int64: pb.DATA_TYPE_INT64,
    torch.uint8: pb.DATA_TYPE_UINT8,
    torch.bool: pb.DATA_TYPE_BOOL,
}
_FROM_MESSAGE = {message: dtype for dtype, message in _DTYPES.items()}
SUPPORTED_DTYPES = frozenset(_DTYPES)


def follows_time(dim: str) -> bool:
    """Whether a dimension is time, or one of an output that grows with it."""
    return dim == TIME or dim.startswith(TIME_OUT)


@dataclass(frozen=True)
class Port:
    """One input or output of the model.

    `eager_dims` are the axes as the caller's model has them. `fed_dims` are the axes in which a batch goes through it:
    the same, with "batch" put in where the model takes one sequence at a time.
    """

    name: str
    dtype: torch.dtype
    eager_dims: Dims
    fed_dims: Dims

    @property
    def dims(self) -> Dims:
        """The graph's axes: batch first, then time or what follows it, then the rest as they come."""
        lead = [self.fed_dims[axis] for axis in self._lead]
        return (*lead, *(dim for dim in self.fed_dims if dim not in lead))

    @property
    def timed(self) -> bool:
        """Whether there is a value for each frame (an output without has one for the sequence)."""
        return TIME in self.fed_dims

    def feed(self, tensor: Tensor) -> Tensor:
        """From the graph's axes to those in which the model is fed."""
        lead = len(self.fed_dims) - self._fixed
        rest = iter(range(lead, len(self.fed_dims)))
        return tensor.permute([self.dims.index(dim) if dim in (BATCH, TIME) else next(rest) for dim in self.fed_dims])

    def fetch(self, tensor: Tensor) -> Tensor:
        """From the axes that the fed model returns to the graph's."""
        lead = self._lead
        return tensor.permute([*lead, *(axis for axis in range(len(self.fed_dims)) if axis not in lead)])

    def give(self, sequence: Tensor) -> Tensor:
        """One sequence `[time, …]` as the caller's model takes it: alone, in a batch of one where it wants a batch."""
        if self.timed:
            sequence = sequence.movedim(0, [dim for dim in self.eager_dims if dim != BATCH].index(TIME))
        return sequence.unsqueeze(self.eager_dims.index(BATCH)) if BATCH in self.eager_dims else sequence

    def take(self, tensor: Tensor) -> Tensor:
        """`give` backwards: `[time, …]`, or `[…]` for an output with one value a sequence."""
        if BATCH in self.eager_dims:
            tensor = tensor.squeeze(self.eager_dims.index(BATCH))
        rest = [dim for dim in self.eager_dims if dim != BATCH]
        return next((tensor.movedim(axis, 0) for axis, dim in enumerate(rest) if follows_time(dim)), tensor)

    def message(self) -> pb.TensorSpec:
        """The port as the manifest has it."""
        return pb.TensorSpec(
            name=self.name, dtype=_DTYPES[self.dtype], dims=list(self.dims), eager_dims=list(self.eager_dims)
        )

    @classmethod
    def from_message(cls, message: pb.TensorSpec) -> "Port":
        """The port that a manifest has; it can be compared with eager PyTorch, and not be fed a batch."""
        eager = tuple(message.eager_dims)
        return cls(message.name, _FROM_MESSAGE[message.dtype], eager, eager if BATCH in eager else tuple(message.dims))

    @property
    def _lead(self) -> list[int]:
        """Where batch and time, or what follows it, are among the fed axes."""
        batch = [axis for axis, dim in enumerate(self.fed_dims) if dim == BATCH]
        return batch + [axis for axis, dim in enumerate(self.fed_dims) if follows_time(dim)]

    @property
    def _fixed(self) -> int:
        return sum(dim not in (BATCH, TIME) for dim in self.fed_dims)


@dataclass(frozen=True)
class State:
    """One recurrent tensor `[batch, *shape]`, as a graph input and the output that follows it."""

    input: str
    output: str
    # The call that it is of; an imported model's states are of none.
    call: str
    # A session's row: [layers × directions, size] where a layer has it.
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    # What a session starts from, where that is not zero.
    initial: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, call: str, letter: str, *shape: int, initial: Tensor | None = None) -> "State":
        """A layer's state by its letter: `lstm.h_0`, which becomes `lstm.h_n`."""
        return cls(f"{call}.{letter}_0", f"{call}.{letter}_n", call, shape, initial=initial)

    @property
    def dims(self) -> Dims:
        """The graph's dimensions."""
        return (BATCH, *map(str, self.shape))

    def zeros(self, *lead: int) -> Tensor:
        """Zeros `[*lead, *shape]`."""
        return torch.zeros((*lead, *self.shape), dtype=self.dtype)

    def message(self) -> pb.StateSpec:
        """The state as the manifest has it."""
        return pb.StateSpec(
            input=self.input,
            output=self.output,
            dtype=_DTYPES[self.dtype],
            dims=self.dims,
            layer=self.call,
            # PyTorch's numbers are little-endian wherever it runs.
            initial=b"" if self.initial is None else self.initial.numpy().tobytes(),
        )

    @classmethod
    def from_message(cls, message: pb.StateSpec) -> "State":
        """The state that a manifest has."""
        shape, dtype = tuple(int(dim) for dim in message.dims[1:]), _FROM_MESSAGE[message.dtype]
        values = bytearray(message.initial)
        initial = torch.frombuffer(values, dtype=dtype).reshape(shape) if values else None
        return cls(message.input, message.output, message.layer, shape, dtype, initial)


@dataclass(frozen=True)
class Signature:
    """The model from outside; states are in the order in which the model makes its recurrent calls.

    `inputs` have a value for each frame. `contexts` have one for the whole session, which every step sees. `arguments`
    are the names of both in the order of the model's `forward`; empty: inputs, then contexts.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[State, ...]
    # Whether any layer has a backward direction.
    bidirectional: bool
    contexts: tuple[Port, ...] = ()
    arguments: tuple[str, ...] = ()
    # Whether rows of different length may share a batch.
    ragged: bool = True
    # Whether forward takes one frame a call, and the graph repeats it.
    stepwise: bool = False
    # How the model's own code pads time with zeros.
    paddings: Plan = ()
    # The frames after a block that convolutions need for it.
    right_context: int = 0
    # The frames of the shortest sequence that the model can be run on.
    least_frames: int = 1
    # The dimensions of outputs that follow time with another size.
    extents: tuple[Extent, ...] = ()
    # The most frames that one of a recurrent layer or of an output stands for; 0: all have those of the inputs.
    stride: int = 0

    def __post_init__(self) -> None:
        names = [*(port.name for port in self.inputs), *(port.name + AHEAD for port in self.inputs)]
        names += [LENGTHS, LENGTHS + AHEAD, *(port.name for port in (*self.contexts, *self.outputs))]
        names += [name for state in self.states for name in (state.input, state.output)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            own = "the graph's own input for the rows' numbers of frames, and another tensor"
            what = own if twice[0].startswith(LENGTHS) else "two tensors of the graph"
            raise ExportError(f"{twice[0]!r} names {what}; give others with input_names or output_names")

    @classmethod
    def from_manifest(cls, manifest: pb.Manifest) -> "Signature":
        """The signature that a bundle has."""
        ports = {port.name for port in (*manifest.inputs, *manifest.contexts)}
        return cls(
            inputs=tuple(Port.from_message(port) for port in manifest.inputs),
            outputs=tuple(Port.from_message(port) for port in manifest.outputs),
            states=tuple(State.from_message(state) for state in manifest.states),
            bidirectional=any(layer.backward for layer in manifest.layers),
            contexts=tuple(Port.from_message(port) for port in manifest.contexts),
            arguments=tuple(name for name in manifest.arguments if name in ports),
            ragged=manifest.ragged,
            right_context=manifest.right_context,
            stepwise=manifest.stepwise,
            least_frames=max(1, manifest.least_frames),
            extents=tuple(Extent.from_message(extent) for extent in manifest.extents),
        )

    def fits(self, policy: Policy) -> bool:
        """Whether a policy has the frames ahead that the model's convolutions need."""
        ahead = policy.ahead if isinstance(policy, Lookahead) else 0
        return isinstance(policy, Full) or ahead >= self.right_context

    @property
    def whole_sequence(self) -> tuple[Port, ...]:
        """The outputs that have one value a sequence."""
        return tuple(port for port in self.outputs if not port.timed)

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Lengths counted from 1, counted from the shortest that the model can be run on."""
        return tuple(length + self.least_frames - 1 for length in lengths)

    @property
    def sources(self) -> tuple[str, ...]:
        """The named dimensions of the contexts, in which sessions may differ."""
        named = [dim for port in self.contexts for dim in port.dims if dim != BATCH and not dim.isdecimal()]
        return tuple(dict.fromkeys(named))

    @property
    def start(self) -> tuple[Tensor, ...]:
        """What a session starts from: each state's row."""
        return tuple(state.zeros() if state.initial is None else state.initial for state in self.states)

    def arrange(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Tensors by name in the order of the model's arguments."""
        return [tensors[name] for name in self.arguments or [p.name for p in (*self.inputs, *self.contexts)]]

    def input_names(self, *, ahead: bool) -> list[str]:
        """The graph's inputs in order; `ahead`: those of the lookahead graph."""
        suffixes = ("", AHEAD) if ahead else ("",)
        ports = [port.name + suffix for port in self.inputs for suffix in suffixes]
        lengths = [LENGTHS + suffix for suffix in suffixes]
        return [*ports, *lengths, *(port.name for port in self.contexts), *(state.input for state in self.states)]

    def output_names(self) -> list[str]:
        """The graph's outputs in order."""
        return [*(port.name for port in self.outputs), *(state.output for state in self.states)]
