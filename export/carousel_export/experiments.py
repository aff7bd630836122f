"""Which policies are right for a model, and whether its rows may have different lengths: found by running it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from carousel_export.crf import decoding_in_graph
from carousel_export.draw import Draw
from carousel_export.eager import run_layer
from carousel_export.errors import ExampleError, PolicyError
from carousel_export.policies import Carry, Causal, Full, Lookahead, Piece, Policy
from carousel_export.ragged import RaggedTime
from carousel_export.recurrent import Layer, States
from carousel_export.reference import Reference

# Above the noise of sums in another order, below any real difference that the gate would let pass.
_SAME = 1e-4
# Frames of an experiment; prime, so that an axis with as many entries is time.
_FRAMES = 23
_CUTS = (1, 2, 5, 3, 1, 7, 4)


@dataclass(frozen=True)
class Findings:
    """What the model allows, and in words what keeps it from allowing more (empty: nothing)."""

    policies: tuple[type[Policy], ...]
    ragged: bool
    reason: str = ""


def find_policies(reference: Reference, draw: Draw) -> Findings:
    """Run the model whole and in pieces, alone and beside longer rows, and say what agrees.

    Pieces are cut so that the recurrent layers answer as they do over the whole: their state is carried, and a backward
    direction sees all that follows. What then differs is other code that mixes time.
    """
    signature = reference.signature
    ragged = _is_ragged(reference, draw)
    if signature.bidirectional and signature.whole_sequence:
        name = signature.whole_sequence[0].name
        return Findings(
            (Full,), ragged, f"output {name!r} has one value for the sequence, and a direction runs backwards"
        )
    if culprit := _mixes_time(reference, draw):
        return Findings((Full,), ragged, f"{culprit} mixes frames outside the recurrent layers")
    return Findings((Carry, Lookahead, Full) if signature.bidirectional else (Causal, Carry, Full), ragged)


def choose(policy: Policy | None, findings: Findings) -> tuple[Policy, tuple[Policy, ...]]:
    """The bundle's default and all that it allows. Raises `PolicyError` for a policy that would answer wrongly."""
    usual: tuple[Policy, ...] = (Causal(), Carry(), Lookahead(8, 8), Full())
    allowed = tuple(each for each in usual if type(each) in findings.policies)
    # Carry is offered, and is nobody's default: a backward direction that sees nothing ahead errs most.
    chosen = policy or next(each for each in allowed if not isinstance(each, Carry))
    if type(chosen) not in findings.policies:
        reason = findings.reason or (
            "a direction of the model runs backwards"
            if isinstance(chosen, Causal)
            else "no direction of the model runs backwards and could look ahead"
        )
        names = ", ".join(type(each).__name__.lower() for each in allowed)
        raise PolicyError(f"{type(chosen).__name__.lower()} is not for this model: {reason}; choose of: {names}")
    return chosen, tuple(chosen if type(each) is type(chosen) else each for each in allowed)


def _mixes_time(reference: Reference, draw: Draw) -> str:
    """The code that mixes frames, in words; empty where only the recurrent layers do."""
    stream = draw.stream(_FRAMES)
    backward = reference.signature.bidirectional
    pieces = [
        Piece(piece.start, piece.block, _FRAMES - piece.start - piece.block if backward else 0)
        for piece in Causal().pieces(_FRAMES, _CUTS)
    ]
    with _Recorder(reference.eager.module) as whole:
        wanted = reference.run(stream, Full())
    with _Recorder(reference.eager.module) as cut:
        try:
            got = reference.run_pieces(stream, pieces, lookahead=backward)
        except ExampleError:
            # Fewer frames than the model can take.
            got = None
    if got and all(_same(a, b) for a, b in zip(wanted.outputs, got.outputs, strict=True)):
        return ""
    return _name_culprit(reference.eager.name, whole.records, cut.records, pieces)


@dataclass(frozen=True)
class _Record:
    """One call of a leaf module: what it was given and what it returned."""

    path: str
    kind: str
    given: Tensor
    returned: Tensor


class _Recorder:
    """Within, notes the calls of the modules that have no modules in them, recurrent ones too."""

    def __init__(self, module: nn.Module) -> None:
        self.records: list[_Record] = []
        self._leaves = [(path, leaf) for path, leaf in module.named_modules() if not list(leaf.children())]

    def __enter__(self) -> "_Recorder":
        self._handles = [leaf.register_forward_hook(self._note(path)) for path, leaf in self._leaves]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str):  # type: ignore[no-untyped-def]  # torch's hook type is any callable
        def note(module: nn.Module, args: tuple[object, ...], result: object) -> None:
            returned = result[0] if isinstance(result, tuple) else result
            if args and isinstance(args[0], Tensor) and isinstance(returned, Tensor):
                self.records.append(_Record(path, type(module).__name__, args[0], returned))

        return note


def _name_culprit(model: str, whole: Sequence[_Record], cut: Sequence[_Record], pieces: Sequence[Piece]) -> str:
    """The first module that answers otherwise in pieces; the code before it where it was given otherwise already."""
    last = ""
    for i, record in enumerate(whole):
        # Each piece made the same calls in the same order, unless the last one failed.
        parts = cut[i :: len(whole)]
        name = f"{record.path or 'the model'} ({record.kind})"
        if not _joins(record.given, [part.given for part in parts], pieces):
            return f"the code of {model}.forward before {name}"
        if not _joins(record.returned, [part.returned for part in parts], pieces):
            return name
        last = name
    return f"the code of {model}.forward after {last}"


def _joins(whole: Tensor, parts: Sequence[Tensor], pieces: Sequence[Piece]) -> bool:
    axes = [axis for axis, size in enumerate(whole.shape) if size == _FRAMES]
    if len(axes) != 1:
        return False
    fitting = [
        part.narrow(axes[0], 0, piece.block)
        for part, piece in zip(parts, pieces, strict=False)
        if part.dim() == whole.dim() and part.shape[axes[0]] == piece.block + piece.ahead
    ]
    return len(fitting) == len(pieces) and _same(whole, torch.cat(fitting, axes[0]))


def _is_ragged(reference: Reference, draw: Draw) -> bool:
    """Whether a row beside longer ones is answered as it is alone, once all that takes time knows its length."""
    signature, eager = reference.signature, reference.eager
    rows, frames = eager.free_sizes(2, _FRAMES)
    lengths = [max(1, frames - 3 * row) for row in range(rows)]
    # One context: rows whose contexts have different sizes never meet.
    contexts = draw.contexts()
    streams = [replace(draw.stream(length), contexts=contexts) for length in lengths]
    alone = [reference.run(stream, Full()).outputs for stream in streams]
    padding = draw.stream(frames)
    padded = [
        (*(torch.cat([x, pad[len(x) :]]) for x, pad in zip(stream.inputs, padding.inputs, strict=True)), *contexts)
        for stream in streams
    ]
    ports = (*signature.inputs, *signature.contexts)
    columns = zip(ports, zip(*padded, strict=True), strict=True)
    batches = signature.arrange({port.name: port.feed(torch.stack(column)) for port, column in columns})
    ragged = RaggedTime(torch.tensor(lengths), rows, frames)

    def by_row(_call: str, module: Layer, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        batch, time = (0, 1) if module.batch_first else (1, 0)
        answers = []
        with ragged.suspended():
            for row, length in enumerate(lengths):
                start = hx and tuple(state.narrow(1, row, 1).contiguous() for state in hx)
                y, states = run_layer(module, x.narrow(batch, row, 1).narrow(time, 0, length), start)
                gap = list(y.shape)
                gap[time] = x.shape[time] - length
                answers.append((torch.cat([y, y.new_zeros(gap)], time), states))
            return torch.cat([y for y, _ in answers], batch), tuple(
                torch.cat(column, 1) for column in zip(*(states for _, states in answers), strict=True)
            )

    with decoding_in_graph(eager.module), ragged:
        together = eager.run(batches, by_row, torch.tensor(lengths))
    for port, y, *wanted in zip(signature.outputs, together, *alone, strict=True):
        for row, (value, length) in enumerate(zip(wanted, lengths, strict=True)):
            got = port.fetch(y)[row]
            if not _same(got[:length] if port.timed else got, value):
                return False
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=_SAME, equal_nan=True)
