"""Which policies are right for a model, and whether its rows may have different lengths: found by running it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from carousel_export.crf import decoding_in_graph
from carousel_export.culprits import Recorder, name_culprit, name_reducers, same
from carousel_export.draw import Draw
from carousel_export.eager import Eager
from carousel_export.errors import ExampleError, PolicyError
from carousel_export.lift import Frame
from carousel_export.padding import FRAMES, PadTime, find_paddings
from carousel_export.policies import Carry, Causal, Full, Lookahead, Piece, Policy, named
from carousel_export.ragged import RaggedTime
from carousel_export.reference import Answer, Reference, Stream
from carousel_export.rows import rows_alone
from carousel_export.signature import Signature, State

# Frames of an experiment, at least; an axis with as many entries is time.
_FRAMES = 23
# Those of the one that looks for code which mixes time only from some frame on.
_LONG = 300
_CUTS = (1, 2, 5, 3, 1, 7, 4, 60, 8, 130)


@dataclass(frozen=True)
class Findings:
    """What the model allows, and in words what keeps it from allowing more (empty: nothing).

    `signature` is the model's with what was found: the frames that convolutions keep, and how many they see ahead.
    """

    policies: tuple[type[Policy], ...]
    signature: Signature
    reason: str = ""

    @property
    def ragged(self) -> bool:
        """Whether rows of different length may share a batch."""
        return self.signature.ragged

    @property
    def notes(self) -> list[str]:
        """What there is to say of the model, a sentence each."""
        kept = [padding for padding in self.signature.paddings if padding and padding.left]
        states = {state.call for state in self.signature.states}
        notes = [f"{p.where} keeps the {p.left} frames before a block" for p in kept if p.call in states]
        notes += [self.reason] if self.reason else []
        if self.signature.stepwise:
            notes.append("forward takes one frame a call, which the graph repeats over time")
        if self.signature.stride:
            notes.append("rows share a batch only if they have the same length")
        elif not self.signature.ragged:
            notes.append("rows share a batch only if they have the same length: some code takes the padding for frames")
        return notes


def find_policies(reference: Reference, draw: Draw, needs: str = "") -> Findings:
    """Run the model whole and in pieces, alone and beside longer rows, and say what agrees.

    A model that is not defined for every piece is run whole; `needs` says what keeps it from being so.

    Pieces are cut so that the recurrent layers answer as they do over the whole: their state is carried, and a backward
    direction sees all that follows. What then differs is other code that mixes time. Zero padding of time is taken for
    the frames that a stream has there; how many frames ahead that needs is found with recurrent layers that mix none.
    """
    if reference.signature.stepwise:
        # Frame by frame, whatever the cut.
        return Findings((Causal, Carry, Full), reference.signature)
    eager = reference.eager
    if reference.signature.stride:
        # Where its rows end among fewer frames, nothing says.
        whole = replace(reference.signature, ragged=False)
        return Findings((Full,), whole, _who_reduces(eager, draw))
    padded = with_paddings(eager, reference.signature, draw)
    padded = replace(padded, ragged=_is_ragged(Reference(eager, padded, rolled=True), draw))
    if reason := _needs_all(eager, padded, needs):
        return Findings((Full,), padded, reason)
    return _find_streaming(eager, padded, draw)


def _needs_all(eager: Eager, signature: Signature, needs: str) -> str:
    """What the model does that only a whole sequence can be given, in words; empty where there is nothing."""
    if computed := sorted(eager.calling.computed):
        verb = "starts" if len(computed) == 1 else "start"
        return (
            f"{' and '.join(computed)} {verb} from a state that forward makes of its input, and not from one that a "
            "session could be given"
        )
    return f"{needs} needs at least {signature.least_frames} frames" if needs else ""


def _find_streaming(eager: Eager, padded: Signature, draw: Draw) -> Findings:
    """What a model allows that is defined for every piece."""
    kept = [padding for padding in padded.paddings if padding and padding.left]
    states = tuple(State.of(padding.call, FRAMES, padding.left, padding.size) for padding in kept)
    lifted = replace(padded, states=(*padded.states, *states))
    streamed = Reference(eager, lifted, rolled=True)
    right, culprit = _right_context(streamed, draw)
    culprit = culprit or _mixes_time(streamed, draw, ahead=right > 0 or lifted.bidirectional)
    if culprit:
        return Findings((Full,), padded, f"{culprit} mixes frames outside the recurrent layers")
    if lifted.whole_sequence and (lifted.bidirectional or right):
        name = lifted.whole_sequence[0].name
        what = "a direction runs backwards" if lifted.bidirectional else f"{_who_pads(padded)} ahead"
        return Findings((Full,), padded, f"output {name!r} has one value for the sequence, and {what}")
    if culprit := _mixes_time(streamed, draw, ahead=right > 0 or lifted.bidirectional, least=_LONG):
        return Findings((Full,), padded, f"{culprit} mixes frames outside the recurrent layers in long sequences")
    if right:
        found = replace(lifted, right_context=right)
        frames = "frame" if right == 1 else "frames"
        return Findings((Lookahead, Full), found, f"{_who_pads(padded)} {right} {frames} ahead")
    return Findings((Carry, Lookahead, Full) if lifted.bidirectional else (Causal, Carry, Full), lifted)


def with_paddings(eager: Eager, signature: Signature, draw: Draw) -> Signature:
    """The signature with the calls that pad time with zeros, seen in a run on a batch."""
    rows, frames = eager.free_sizes(2, *signature.lengths([_FRAMES]))
    columns = zip(*(draw.stream(frames).inputs for _ in range(rows)), strict=True)
    ports = (*signature.inputs, *signature.contexts)
    tensors = [torch.stack(column) for column in columns]
    tensors += [torch.stack([context] * rows) for context in draw.contexts()]
    batch = signature.arrange({port.name: port.feed(x) for port, x in zip(ports, tensors, strict=True)})
    return replace(signature, paddings=find_paddings(eager.module, lambda: eager.run(batch), rows, frames))


def choose(policy: Policy | None, findings: Findings) -> tuple[Policy, tuple[Policy, ...]]:
    """The bundle's default and all that it allows. Raises `PolicyError` for a policy that would answer wrongly."""
    least = findings.signature.right_context
    usual: tuple[Policy, ...] = (Causal(), Carry(), Lookahead(8, max(8, least)), Full())
    allowed = tuple(each for each in usual if type(each) in findings.policies)
    # Carry is offered, and is nobody's default: a backward direction that sees nothing ahead errs most.
    chosen = policy or next(each for each in allowed if not isinstance(each, Carry))
    if type(chosen) not in findings.policies:
        reason = findings.reason or (
            "a direction of the model runs backwards"
            if isinstance(chosen, Causal)
            else "no direction of the model runs backwards and could look ahead"
        )
        raise PolicyError(f"{named([chosen])} is not for this model: {reason}; choose of: {named(allowed)}")
    if not findings.signature.fits(chosen):
        raise PolicyError(f"{chosen} has too few frames ahead: {findings.reason}; give ahead ≥ {least}")
    return chosen, tuple(chosen if type(each) is type(chosen) else each for each in allowed)


def _right_context(streamed: Reference, draw: Draw) -> tuple[int, str]:
    """How many frames ahead the code outside the recurrent layers needs, and what mixes frames if none are enough."""
    paddings = [padding for padding in streamed.signature.paddings if padding]
    reach = sum(padding.left + padding.right for padding in paddings)
    (frames,) = streamed.eager.free_sizes(1, _FRAMES + reach)
    stream = draw.stream(frames)
    with Recorder(streamed.eager.module) as whole:
        wanted = streamed.run_pieces(stream, [Piece(0, frames)], framewise=True)
    for ahead in range(sum(padding.right for padding in paddings) + 1):
        pieces = _pieces(frames, ahead)
        with Recorder(streamed.eager.module) as cut_up:
            got = _try_pieces(streamed, stream, pieces, framewise=True)
        if _agree(wanted, got):
            return ahead, ""
    return 0, name_culprit(whole.records, cut_up.records, pieces)


def _mixes_time(streamed: Reference, draw: Draw, *, ahead: bool, least: int = _FRAMES) -> str:
    """The code that mixes frames around the recurrent layers as they are, in words; empty where there is none.

    A value for the sequence is one for the sequence so far, after each piece.
    """
    (frames,) = streamed.eager.free_sizes(1, least)
    stream = draw.stream(frames)
    pieces = _pieces(frames, frames if ahead else 0)
    runs_along = streamed.signature.whole_sequence and not ahead and least == _FRAMES
    for count in range(1 if runs_along else len(pieces), len(pieces) + 1):
        end = pieces[count - 1].start + pieces[count - 1].block
        so_far = replace(stream, inputs=tuple(x[:end] for x in stream.inputs))
        with Recorder(streamed.eager.module) as whole:
            wanted = streamed.run(so_far, Full())
        with Recorder(streamed.eager.module) as cut:
            got = _try_pieces(streamed, so_far, pieces[:count], lookahead=ahead)
        if not _agree(wanted, got):
            return name_culprit(whole.records, cut.records, pieces[:count])
    return ""


def _pieces(frames: int, ahead: int) -> list[Piece]:
    """A stream cut into pieces of many sizes, each with what there is of the frames ahead; the last is one frame."""
    cuts = [*Causal().pieces(frames - 1, _CUTS), Piece(frames - 1, 1)]
    return [Piece(cut.start, cut.block, min(ahead, frames - cut.start - cut.block)) for cut in cuts]


def _try_pieces(streamed: Reference, stream: Stream, pieces: Sequence[Piece], **how: bool) -> Answer | None:
    """The answer in pieces; None where the model fails on so few frames."""
    try:
        return streamed.run_pieces(stream, pieces, **how)
    except ExampleError:
        return None


def _agree(wanted: Answer, got: Answer | None) -> bool:
    return got is not None and all(same(a, b) for a, b in zip(wanted.outputs, got.outputs, strict=True))


def _who_reduces(eager: Eager, draw: Draw) -> str:
    """Which modules change the number of frames, in words."""
    runs = []
    for frames in draw.signature.lengths([_FRAMES, 2 * _FRAMES]):
        with Recorder(eager.module) as recorder:
            eager.run(draw.arguments(draw.stream(frames)))
        runs.append(recorder.records)
    names = name_reducers(*runs) or [f"the code of {eager.name}.forward"]
    return f"{' and '.join(names)} {'changes' if len(names) == 1 else 'change'} the number of frames"


def _who_pads(signature: Signature) -> str:
    names = dict.fromkeys(padding.where for padding in signature.paddings if padding and padding.right)
    return f"{' and '.join(names)} {'sees' if len(names) == 1 else 'see'}"


def _is_ragged(reference: Reference, draw: Draw) -> bool:
    """Whether a row beside longer ones is answered as it is alone, once all that takes time knows its length."""
    signature, eager = reference.signature, reference.eager
    rows, frames = eager.free_sizes(2, *signature.lengths([_FRAMES]))
    lengths = [max(signature.least_frames, frames - 3 * row) for row in range(rows)]
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
    frame = Frame(torch.tensor(lengths), {}, {})
    frame.modes.append(RaggedTime(frame.lengths, rows, frames))
    frame.modes.append(PadTime(signature.paddings, frame.pad, lambda padding: padding.time))

    with decoding_in_graph(eager.module), frame.within():
        together = eager.run(batches, rows_alone(lengths, frame.suspended), frame.lengths)
    for port, y, *wanted in zip(signature.outputs, together, *alone, strict=True):
        for row, (value, length) in enumerate(zip(wanted, lengths, strict=True)):
            got = port.fetch(y)[row]
            if not same(value, got[:length] if port.timed else got):
                return False
    return True
