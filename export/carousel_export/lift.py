"""Lifting: the user's model with its recurrent state as inputs and outputs, and nothing else of it changed."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.anysize import AnySize
from carousel_export.calling import Calling
from carousel_export.crf import decode_in_graph
from carousel_export.eager import Eager, call_name
from carousel_export.intercept import Intercept
from carousel_export.packing import Packed, Packing, listing, repack, unpack
from carousel_export.padding import Padding, PadTime
from carousel_export.ragged import RaggedTime
from carousel_export.recurrent import (
    LAYERS,
    States,
    as_hx,
    as_states,
    directions_of,
    kind_of,
    places_of,
    sides_of,
    weights_of,
)
from carousel_export.signature import Signature

# (layer, direction, x [time, batch, size], lengths, states [directions, batch, size], None: zero) → y and the states
RunLayer = Callable[[int, str, Tensor, Tensor, States | None], tuple[Tensor, States]]


@dataclass
class Frame:
    """One run of the lifted model: what its recurrent calls take from outside and leave for outside."""

    lengths: Tensor
    # By call name, each state [layers × directions, batch, size].
    states: dict[str, States]
    # By call name, what backward directions start from where that is not zero, [layers × directions, 1, size].
    starts: dict[str, States]
    # Set when there are frames ahead: the block's frames, and the lengths of what follows them.
    split: int | None = None
    lengths_ahead: Tensor | None = None
    # Whether all rows have one length: then each layer runs over all that it is given, however many frames that are.
    even: bool = False
    # What the model's other code goes through; the lifted layers know of time themselves.
    modes: list[Intercept] = field(default_factory=list)
    # Whether the frames ahead follow each row's own last frame in `x`, and not the longest's.
    compact: bool = False
    ended: dict[str, States] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def joined_lengths(self) -> Tensor:
        """Where each row's last frame ends when both parts stand one after the other."""
        if self.split is None or self.lengths_ahead is None:
            return self.lengths
        if self.compact:
            return self.lengths + self.lengths_ahead
        return torch.where(self.lengths_ahead > 0, self.split + self.lengths_ahead, self.lengths)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Within, the model's other code goes through the modes."""
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within, functions are as they are."""
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode.suspended())
            yield

    def join(self, block: Tensor, ahead: Tensor) -> Tensor:
        """A block and the frames ahead as one tensor `[time, batch, …]`."""
        x = torch.cat([block, ahead])
        if not self.compact:
            return x
        steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        lengths = self.lengths.to(torch.int64).unsqueeze(0)
        after = (steps - lengths + block.shape[0]).clamp(max=x.shape[0] - 1)
        return _take(x, torch.where(steps < lengths, steps, after))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`join` backwards; frames after a row's own are whatever."""
        assert self.split is not None, "asked only where there are frames ahead"
        if not self.compact:
            return x[: self.split], x[self.split :]
        steps = torch.arange(x.shape[0] - self.split, device=x.device).unsqueeze(1)
        return x[: self.split], _take(x, steps + self.lengths.to(torch.int64).unsqueeze(0))

    def pad(self, padding: Padding, x: Tensor) -> Tensor:
        """Time padded on the left with the frames before, which are a state, and on the right with zeros."""
        frames = x.movedim((padding.time, padding.batch), (0, 1))
        lengths = self.lengths.to(torch.int64)
        total = lengths if self.lengths_ahead is None else lengths + self.lengths_ahead
        valid = torch.arange(frames.shape[0], device=x.device).unsqueeze(1) < total
        frames = torch.where(_beside(valid, frames), frames, torch.zeros((), dtype=x.dtype, device=x.device))
        shape = list(frames.shape[1:])
        if padding.call in self.states:
            (before,) = self.states[padding.call]
            frames = torch.cat([before.reshape(padding.left, *shape), frames])
            ends = lengths + torch.arange(padding.left, device=x.device).unsqueeze(1)
            self.ended[padding.call] = (_take(frames, ends).flatten(2),)
        elif padding.left:
            frames = torch.cat([x.new_zeros(padding.left, *shape), frames])
        if padding.right:
            frames = torch.cat([frames, x.new_zeros(padding.right, *shape)])
        return frames.movedim((0, 1), (padding.time, padding.batch))


def _take(x: Tensor, at: Tensor) -> Tensor:
    """The frames `at` `[count, batch]` of `x` `[time, batch, …]`, each row's own."""
    return x.gather(0, _beside(at, x).expand(-1, -1, *x.shape[2:]))


def _beside(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` `[time, batch]` with as many axes as `x`."""
    return rows.reshape(*rows.shape, *[1] * (x.dim() - 2))


class Slot:
    """Where the lifted layers of one model find the frame of the run in progress."""

    def __init__(self) -> None:
        self.frame: Frame | None = None


class LiftedLayer(nn.RNNBase):
    """A recurrent module that takes its states and lengths from a frame; a copy becomes one by changing its class.

    So it keeps its weights, its attributes and its hooks, and is still an `nn.LSTM`, say, to the code around it.
    """

    path: str
    slot: Slot
    run_layer: RunLayer

    def flatten_parameters(self) -> None:
        """Nothing: the weights are constants of the graph."""

    def forward(
        self,
        input: Tensor | Packed,  # noqa: A002 - torch's
        hx: Tensor | States | None = None,
    ) -> tuple[Tensor | Packed, Tensor | States]:
        """As the module; the session's states take the place of `hx`, but where that is computed from the input."""
        frame = self.slot.frame
        assert frame is not None, "a lifted layer runs inside a lifted model"
        call = call_name(self.path, self, frame.counts[self.path])
        frame.counts[self.path] += 1
        x = unpack(self, input)
        x = x.transpose(0, 1) if self.batch_first else x
        with frame.suspended():
            if frame.split is None:
                given = () if hx is None else hx
                y, ended = self._whole(frame, x, frame.states.get(call) or as_states(given))
            else:
                y, ended = self._ahead(frame, call, x)
        frame.ended[call] = ended
        return repack(self, call, input, y.transpose(0, 1) if self.batch_first else y), as_hx(ended)

    def _whole(self, frame: Frame, x: Tensor, starts: States) -> tuple[Tensor, States]:
        direction = "bidirectional" if self.bidirectional else sides_of(self)[0]
        directions = directions_of(self)
        lengths = torch.zeros_like(frame.lengths) + x.shape[0] if frame.even else frame.lengths
        ended = []
        for layer in range(self.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            x, states = self.run_layer(layer, direction, x, lengths, tuple(s[rows] for s in starts))
            ended.append(states)
        return x, tuple(torch.cat(states) for states in zip(*ended, strict=True))

    def _ahead(self, frame: Frame, call: str, x: Tensor) -> tuple[Tensor, States]:
        """Each direction in two segments, the state handed from one to the other (Zhang et al. 2016).

        Forward: the block, whose end state is carried on, then the frames ahead. Backward: from its start, mostly zero,
        at the end of the frames ahead, then the block.
        """
        assert frame.lengths_ahead is not None, "a frame with a split has lengths ahead"
        block, ahead = frame.parts(x)
        sides = sides_of(self)
        # Each block starts the backward rows anew. Of one size they are one value, whatever the layer.
        anew: dict[int, Tensor] = {}
        ended = []
        for layer in range(self.num_layers):
            ys, ys_ahead, rows = [], [], []
            for row, side in enumerate(sides, layer * len(sides)):
                if side == "forward":
                    before = tuple(s[row : row + 1] for s in frame.states[call])
                    y, states = self.run_layer(layer, side, block, frame.lengths, before)
                    y_ahead, _ = self.run_layer(layer, side, ahead, frame.lengths_ahead, states)
                    rows.append(states)
                else:
                    starts = tuple(s[row : row + 1].expand(1, x.shape[1], -1) for s in frame.starts.get(call, ()))
                    y_ahead, handed = self.run_layer(layer, side, ahead, frame.lengths_ahead, starts or None)
                    if starts:
                        # A row without frames ahead hands on zero, which is right where all start from zero.
                        some = (frame.lengths_ahead > 0).reshape(1, -1, 1)
                        handed = tuple(torch.where(some, h, s) for h, s in zip(handed, starts, strict=True))
                    y, states = self.run_layer(layer, side, block, frame.lengths, handed)
                    rows.append(starts or tuple(anew.setdefault(s.shape[2], torch.zeros_like(s)) for s in states))
                ys.append(y)
                ys_ahead.append(y_ahead)
            block, ahead = torch.cat(ys, dim=2), torch.cat(ys_ahead, dim=2)
            ended += rows
        return frame.join(block, ahead), tuple(torch.cat(states) for states in zip(*ended, strict=True))


# Each is still an `nn.LSTM`, say, and returns what it returns.
_LIFTED: dict[type[nn.Module], type[LiftedLayer]] = {
    kind: type(f"Lifted{kind.__name__}", (LiftedLayer, kind), {}) for kind in LAYERS
}


class LiftedModel(nn.Module):
    """The user's model by the graph contract: tensors in and out in the order of the signature's names, batch first.

    `forward` takes what `model.onnx` takes, `lookahead` what `lookahead.onnx` takes.
    """

    def __init__(
        self, model: nn.Module, slot: Slot, signature: Signature, calling: Calling, *, lists_lengths: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.slot = slot
        self.signature = signature
        self.calling = calling
        self.lists_lengths = lists_lengths
        self.starts = {call: tuple(s.unsqueeze(1) for s in states) for call, states in calling.starts.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        inputs = [next(given) for _ in self.signature.inputs]
        lengths = next(given)
        contexts = [next(given) for _ in self.signature.contexts]
        even = not self.signature.ragged
        return self._run(inputs, contexts, Frame(lengths, self._states(list(given)), self.starts, even=even))

    def lookahead(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        pairs = [(next(given), next(given)) for _ in self.signature.inputs]
        lengths, lengths_ahead = next(given), next(given)
        contexts = [next(given) for _ in self.signature.contexts]
        frame = Frame(
            lengths,
            self._states(list(given)),
            self.starts,
            split=pairs[0][0].shape[1],
            lengths_ahead=lengths_ahead,
            compact=any(self.signature.paddings),
        )
        joined = [frame.join(*(x.transpose(0, 1) for x in pair)).transpose(0, 1) for pair in pairs]
        return self._run(joined, contexts, frame)

    def _run(self, inputs: Sequence[Tensor], contexts: Sequence[Tensor], frame: Frame) -> tuple[Tensor, ...]:
        signature = self.signature
        frame.modes.append(AnySize())
        if signature.ragged and frame.split is None and not signature.stepwise:
            # Under lookahead, code that takes all frames together is not allowed; a step has but one.
            frame.modes.append(RaggedTime(frame.lengths, *inputs[0].shape[:2]))
        if any(signature.paddings):
            frame.modes.append(PadTime(signature.paddings, frame.pad, lambda padding: padding.time))
        self.slot.frame = frame
        try:
            ports = zip((*signature.inputs, *signature.contexts), (*inputs, *contexts), strict=True)
            fed = signature.arrange({port.name: port.feed(x) for port, x in ports})
            parts = (None, None) if frame.compact else (frame.split, frame.lengths_ahead)
            lengths = frame.joined_lengths if frame.compact else frame.lengths
            rows = listing(inputs[0].shape[0]) if self.lists_lengths else nullcontext()
            with Packing(lengths, *parts), rows, frame.within():
                states = frame.states if signature.stepwise else None
                arguments = self.calling.arguments(fed, frame.joined_lengths, states)
                outputs = pytree.tree_leaves(self.calling.results(self.model(*arguments)))
        finally:
            self.slot.frame = None
        results = [port.fetch(y) for port, y in zip(signature.outputs, outputs, strict=True)]
        if frame.split is not None:
            results = [
                y[:, : frame.split] if port.timed else y for port, y in zip(signature.outputs, results, strict=True)
            ]
        letters = {call: iter(states) for call, states in frame.ended.items()}
        return (*results, *(next(letters[state.call]).transpose(0, 1) for state in signature.states))

    def _states(self, tensors: Sequence[Tensor]) -> dict[str, States]:
        states: dict[str, States] = {}
        for state, tensor in zip(self.signature.states, tensors, strict=True):
            states[state.call] = (*states.get(state.call, ()), tensor.transpose(0, 1))
        return states


def lift(eager: Eager, signature: Signature, bind: Callable[[dict[str, LiftedLayer]], None]) -> LiftedModel:
    """A lifted copy of the model; `bind` gives each of its layers, by path, the `run_layer` of one kind of graph."""
    holder = nn.ModuleDict({"model": copy.deepcopy(eager.module)})
    decode_in_graph(holder)
    slot = Slot()
    layers = {}
    for path in eager.recurrent:
        layer = holder.get_submodule(f"model.{path}" if path else "model")
        layer.__class__ = _LIFTED[type(layer)]
        assert isinstance(layer, LiftedLayer)
        layer.path, layer.slot = path, slot
        layers[path] = layer
    bind(layers)
    lists = eager.lists_lengths
    return LiftedModel(holder["model"], slot, signature, eager.calling, lists_lengths=lists).eval()


def bind_onnx(layers: dict[str, LiftedLayer]) -> None:
    """Layers that call the fused operator, with its weights packed now, so that they are initialisers of the graph."""
    packed: dict[tuple[int, ...], Tensor] = {}

    def share(pack: Callable[[Sequence[Tensor]], Tensor], sources: Sequence[Tensor]) -> Tensor:
        # Weights that two layers share stay one initialiser.
        key = tuple(id(source) for source in sources)
        if key not in packed:
            packed[key] = pack(sources)
        return packed[key]

    for module in layers.values():
        kind = kind_of(module)
        for layer in range(module.num_layers):
            for direction in (*sides_of(module), *(["bidirectional"] if module.bidirectional else [])):
                sides = [weights_of(module, layer, place) for place in places_of(module, direction)]
                name = f"{direction}_{layer}"
                module.register_buffer(f"w_{name}", share(kind.pack_gates, [side[0] for side in sides]))
                module.register_buffer(f"r_{name}", share(kind.pack_gates, [side[1] for side in sides]))
                if module.bias:
                    biases = [bias for side in sides for bias in side[2:4]]
                    module.register_buffer(f"b_{name}", share(kind.pack_biases, biases))
                if module.proj_size:
                    module.register_buffer(f"p_{name}", share(_stack, [side[-1] for side in sides]))
        module.run_layer = _onnx_layer(module)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def _onnx_layer(module: LiftedLayer) -> RunLayer:
    kind = kind_of(module)

    def run(layer: int, direction: str, x: Tensor, lengths: Tensor, states: States | None) -> tuple[Tensor, States]:
        w, r, b, p = (getattr(module, f"{letter}_{direction}_{layer}", None) for letter in "wrbp")
        y, *ended = kind.operator(x, w, r, b, p, lengths, *(states or [None] * len(kind.letters)), direction)
        return y, tuple(ended)

    return run
