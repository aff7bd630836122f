"""Lifting: the user's model with its recurrent state as inputs and outputs, and nothing else of it changed."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.eager import Eager, States, call_name
from carousel_export.lstm import lstm, pack_biases, pack_gates
from carousel_export.recurrent import directions_of
from carousel_export.signature import Signature

# (layer, direction, x [time, batch, size], lengths, h_0, c_0 [directions, batch, hidden]) → (y, h_n, c_n)
RunLayer = Callable[[int, str, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Frame:
    """One run of the lifted model: what its recurrent calls take from outside and leave for outside."""

    lengths: Tensor
    # By call name, each state [layers × directions, batch, size].
    states: dict[str, States]
    # Set when there are frames ahead: the block's frames, and the lengths of what follows them.
    split: int | None = None
    lengths_ahead: Tensor | None = None
    ended: dict[str, States] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


class Slot:
    """Where the lifted layers of one model find the frame of the run in progress."""

    def __init__(self) -> None:
        self.frame: Frame | None = None


class LiftedLSTM(nn.LSTM):
    """An `nn.LSTM` that takes its states and lengths from a frame; a copied module becomes one by changing its class.

    So it keeps its weights, its attributes and its hooks, and is still an `nn.LSTM` to the code around it.
    """

    path: str
    slot: Slot
    run_layer: RunLayer

    def flatten_parameters(self) -> None:
        """Nothing: the weights are constants of the graph."""

    def forward(self, input: Tensor, hx: object = None) -> tuple[Tensor, States]:  # type: ignore[override]  # noqa: A002, ARG002 - nn.LSTM's
        """As `nn.LSTM`; `hx` was seen to be zero, and the session's states take its place."""
        frame = self.slot.frame
        assert frame is not None, "a lifted layer runs inside a lifted model"
        call = call_name(self.path, self, frame.counts[self.path])
        frame.counts[self.path] += 1
        x = input.transpose(0, 1) if self.batch_first else input
        y, ended = self._whole(frame, call, x) if frame.split is None else self._ahead(frame, call, x)
        frame.ended[call] = ended
        return (y.transpose(0, 1) if self.batch_first else y), ended

    def _whole(self, frame: Frame, call: str, x: Tensor) -> tuple[Tensor, States]:
        direction = "bidirectional" if self.bidirectional else "forward"
        directions = directions_of(self)
        ended = []
        for layer in range(self.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            x, *states = self.run_layer(layer, direction, x, frame.lengths, *(s[rows] for s in frame.states[call]))
            ended.append(states)
        return x, tuple(torch.cat(states) for states in zip(*ended, strict=True))

    def _ahead(self, frame: Frame, call: str, x: Tensor) -> tuple[Tensor, States]:
        """Each direction in two segments, the state handed from one to the other (Zhang et al. 2016).

        Forward: the block, whose end state is carried on, then the frames ahead. Backward: from zero at the end of the
        frames ahead, which is what a row without any hands over, then the block.
        """
        assert frame.lengths_ahead is not None, "a frame with a split has lengths ahead"
        block, ahead = x[: frame.split], x[frame.split :]
        directions = directions_of(self)
        ended = []
        for layer in range(self.num_layers):
            row = slice(layer * directions, layer * directions + 1)
            h_0, c_0 = (s[row] for s in frame.states[call])
            y, h, c = self.run_layer(layer, "forward", block, frame.lengths, h_0, c_0)
            y_ahead, _, _ = self.run_layer(layer, "forward", ahead, frame.lengths_ahead, h, c)
            states = [h, c]
            if self.bidirectional:
                back_ahead, h_back, c_back = self.run_layer(layer, "reverse", ahead, frame.lengths_ahead, None, None)
                back, _, _ = self.run_layer(layer, "reverse", block, frame.lengths, h_back, c_back)
                y, y_ahead = torch.cat([y, back], dim=2), torch.cat([y_ahead, back_ahead], dim=2)
                # The backward row is zero: each block starts it anew.
                states = [nn.functional.pad(s, (0, 0, 0, 0, 0, 1)) for s in states]
            block, ahead = y, y_ahead
            ended.append(states)
        return torch.cat([block, ahead]), tuple(torch.cat(states) for states in zip(*ended, strict=True))


class LiftedModel(nn.Module):
    """The user's model by the graph contract: tensors in and out in the order of the signature's names, batch first.

    `forward` takes what `model.onnx` takes, `lookahead` what `lookahead.onnx` takes.
    """

    def __init__(self, model: nn.Module, slot: Slot, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.slot = slot
        self.signature = signature

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        inputs = [next(given) for _ in self.signature.inputs]
        lengths = next(given)
        contexts = [next(given) for _ in self.signature.contexts]
        return self._run(inputs, contexts, Frame(lengths=lengths, states=self._states(list(given))))

    def lookahead(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        pairs = [(next(given), next(given)) for _ in self.signature.inputs]
        lengths, lengths_ahead = next(given), next(given)
        contexts = [next(given) for _ in self.signature.contexts]
        frame = Frame(
            lengths=lengths,
            states=self._states(list(given)),
            split=pairs[0][0].shape[1],
            lengths_ahead=lengths_ahead,
        )
        return self._run([torch.cat(pair, dim=1) for pair in pairs], contexts, frame)

    def _run(self, inputs: Sequence[Tensor], contexts: Sequence[Tensor], frame: Frame) -> tuple[Tensor, ...]:
        signature = self.signature
        self.slot.frame = frame
        try:
            ports = zip((*signature.inputs, *signature.contexts), (*inputs, *contexts), strict=True)
            fed = signature.arrange({port.name: port.feed(x) for port, x in ports})
            outputs = pytree.tree_leaves(self.model(*fed))
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


def lift(eager: Eager, signature: Signature, bind: Callable[[dict[str, LiftedLSTM]], None]) -> LiftedModel:
    """A lifted copy of the model; `bind` gives each of its layers, by path, the `run_layer` of one kind of graph."""
    holder = nn.ModuleDict({"model": copy.deepcopy(eager.module)})
    slot = Slot()
    layers = {}
    for path in eager.recurrent:
        layer = holder.get_submodule(f"model.{path}" if path else "model")
        layer.__class__ = LiftedLSTM
        assert isinstance(layer, LiftedLSTM)
        layer.path, layer.slot = path, slot
        layers[path] = layer
    bind(layers)
    return LiftedModel(holder["model"], slot, signature).eval()


def layer_weights(module: nn.LSTM, layer: int, direction: str) -> list[list[Tensor]]:
    """A layer's weights for each direction: weight_ih, weight_hh and, with bias, bias_ih, bias_hh."""
    suffixes = {"forward": ("",), "reverse": ("_reverse",), "bidirectional": ("", "_reverse")}[direction]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    return [[getattr(module, f"{kind}_l{layer}{suffix}") for kind in kinds] for suffix in suffixes]


def bind_onnx(layers: dict[str, LiftedLSTM]) -> None:
    """Layers that call the fused operator, with its weights packed now, so that they are initialisers of the graph."""
    packed: dict[tuple[int, ...], Tensor] = {}

    def share(pack: Callable[[Sequence[Tensor]], Tensor], sources: Sequence[Tensor]) -> Tensor:
        # Weights that two layers share stay one initialiser.
        key = tuple(id(source) for source in sources)
        if key not in packed:
            packed[key] = pack(sources)
        return packed[key]

    for module in layers.values():
        for layer in range(module.num_layers):
            for direction in ("forward", "reverse", "bidirectional") if module.bidirectional else ("forward",):
                sides = layer_weights(module, layer, direction)
                name = f"{direction}_{layer}"
                module.register_buffer(f"w_{name}", share(pack_gates, [side[0] for side in sides]))
                module.register_buffer(f"r_{name}", share(pack_gates, [side[1] for side in sides]))
                if module.bias:
                    biases = [bias for side in sides for bias in side[2:]]
                    module.register_buffer(f"b_{name}", share(pack_biases, biases))
        module.run_layer = _onnx_layer(module)


def _onnx_layer(module: LiftedLSTM) -> RunLayer:
    def run(
        layer: int, direction: str, x: Tensor, lengths: Tensor, h_0: Tensor | None, c_0: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, r = (getattr(module, f"{letter}_{direction}_{layer}") for letter in "wr")
        b = getattr(module, f"b_{direction}_{layer}") if module.bias else None
        results: tuple[Tensor, Tensor, Tensor] = lstm(x, w, r, b, lengths, h_0, c_0, direction)
        return results

    return run
