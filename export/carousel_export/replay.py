"""Streams through an exported graph as a server would run them: ragged batches, rows at different positions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from carousel_export.policies import Lookahead, Piece, Policy
from carousel_export.reference import Answer, Stream
from carousel_export.runtimes import Runtime
from carousel_export.signature import Signature


class _Row:
    """A stream in flight."""

    def __init__(self, stream: Stream, policy: Policy, signature: Signature, start: int) -> None:
        self.stream = stream
        self.pieces = policy.pieces(stream.frames, stream.cuts)
        self.start = start
        self.states = stream.initial or signature.start
        self.parts: list[list[Tensor]] = []

    def piece(self, step: int) -> Piece | None:
        """What the row wants to run in a step; rows start at different steps."""
        return self.pieces[step - self.start] if 0 <= step - self.start < len(self.pieces) else None


def replay(
    runtime: Runtime, signature: Signature, streams: Sequence[Stream], policy: Policy, *, ragged: bool = True
) -> list[Answer]:
    """Each stream's answer. Row i starts i mod 3 steps late; without `ragged`, rows of equal length share a batch.

    Rows whose contexts have one shape share a batch.
    """
    rows = [_Row(stream, policy, signature, i % 3) for i, stream in enumerate(streams)]
    for step in range(max(row.start + len(row.pieces) for row in rows)):
        ready = [(row, piece) for row in rows if (piece := row.piece(step))]
        groups: dict[object, list[tuple[_Row, Piece]]] = {}
        for row, piece in ready:
            shapes = [tuple(context.shape) for context in row.stream.contexts]
            groups.setdefault((*shapes, *(() if ragged else (piece.block, piece.ahead))), []).append((row, piece))
        for group in groups.values():
            _step(runtime, signature, group, ahead=isinstance(policy, Lookahead))
    return [
        Answer(
            tuple(
                torch.cat(column) if port.timed else column[-1]
                for port, column in zip(signature.outputs, zip(*row.parts, strict=True), strict=True)
            ),
            row.states,
        )
        for row in rows
    ]


def _step(runtime: Runtime, signature: Signature, group: Sequence[tuple[_Row, Piece]], *, ahead: bool) -> None:
    tensors: list[Tensor] = []
    for i in range(len(signature.inputs)):
        tensors.append(_pad([row.stream.inputs[i][p.start : p.start + p.block] for row, p in group]))
        if ahead:
            ends = [(row, p.start + p.block, p.ahead) for row, p in group]
            tensors.append(_pad([row.stream.inputs[i][end : end + frames] for row, end, frames in ends]))
    tensors.append(torch.tensor([piece.block for _, piece in group], dtype=torch.int32))
    if ahead:
        tensors.append(torch.tensor([piece.ahead for _, piece in group], dtype=torch.int32))
    tensors += [torch.stack(column) for column in zip(*(row.stream.contexts for row, _ in group), strict=True)]
    tensors += [torch.stack(column) for column in zip(*(row.states for row, _ in group), strict=True)]
    results = runtime.run(tensors, ahead=ahead)
    outputs, states = results[: len(signature.outputs)], results[len(signature.outputs) :]
    for i, (row, piece) in enumerate(group):
        row.parts.append(
            [y[i, : piece.block] if port.timed else y[i] for port, y in zip(signature.outputs, outputs, strict=True)]
        )
        row.states = tuple(state[i] for state in states)


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """A batch whose padding is a value that would show in any answer that it leaked into."""
    values = [row for row in rows if row.numel()]
    filler = max(float(row.max()) for row in values) if values else 0.0
    return pad_sequence(list(rows), batch_first=True, padding_value=filler + (rows[0].is_floating_point() * 3.0))
