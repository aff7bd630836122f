"""Whether a model packs by the lengths that a session has: the gate's reference takes those, whatever forward gives."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from carousel_export.draw import Draw
from carousel_export.eager import Eager
from carousel_export.errors import ModelError
from carousel_export.policies import Full
from carousel_export.reference import Reference, Stream
from carousel_export.signature import BATCH, Port
from carousel_export.tolerance import allowed
from carousel_export.vocabulary import find_vocabularies

_LENGTHS = (1, 5, 17, 70)
# Unsorted; as long as the gate's longest.
_RAGGED = (9, 640, 1, 67, 300)
_ROWS, _FRAMES = 16, 64
# Beyond so many, ids are drawn.
_IDS = 1 << 16


def check_packed(eager: Eager, draw: Draw, example: Sequence[Tensor]) -> None:
    """Hold a model that packs to the session's lengths.

    Raises `ModelError`, naming the call, where it packs by others, or where it does not answer with PyTorch's own
    packing what the reference answers.
    """
    given = eager.packed(example)
    if not given:
        return
    eager.lists_lengths = any(each.listed for each in given)
    draw = replace(draw, generator=torch.Generator().manual_seed(21), turns=count())
    for stream in (draw.stream(frames) for frames in draw.signature.lengths(_LENGTHS)):
        _check_lengths(eager, _together(draw, [stream]), None)
    if _batched(draw):
        ragged = draw.signature.lengths(_RAGGED)
        rows = [draw.stream(frames) for frames in ragged]
        lengths = torch.tensor(ragged) if eager.calling.takes_lengths else None
        whole = rows if lengths is not None else [draw.stream(_FRAMES) for _ in rows]
        _check_lengths(eager, _together(draw, whole), lengths)
    for rows in _unlike(draw, find_vocabularies(eager, draw.signature, example)):
        _check_lengths(eager, _together(draw, rows), None)
    _check_answers(eager, draw)


def _check_lengths(eager: Eager, inputs: Sequence[Tensor], lengths: Tensor | None) -> None:
    for i, given in enumerate(eager.packed(inputs, lengths), 1):
        wanted = torch.full((given.batch,), given.frames) if lengths is None else lengths
        if torch.equal(given.lengths.to(torch.int64), wanted):
            continue
        call = f"call {i} of pack_padded_sequence"
        if eager.calling.takes_lengths:
            raise ModelError(
                f"{call} has other lengths than {eager.name} is given; pack by the argument as it is, rows in their "
                "order: the session gives it"
            )
        raise ModelError(
            f"{eager.name} packs by lengths it computes from its input ({call}); take the lengths as an argument: the "
            "session gives them"
        )


def _check_answers(eager: Eager, draw: Draw) -> None:
    """Compare with PyTorch's own packing: sequences one at a time, and a ragged batch where lengths are an argument."""
    reference = Reference(eager, draw.signature, rolled=True)
    outputs, counts = draw.signature.outputs, draw.signature.lengths(_LENGTHS)
    batches: list[tuple[list[Stream], Tensor | None]] = [([draw.stream(frames)], None) for frames in counts]
    if eager.calling.takes_lengths and _batched(draw):
        # Some models have them sorted.
        rows = [draw.stream(frames) for frames in sorted(counts, reverse=True)]
        rows = [replace(row, contexts=rows[0].contexts) for row in rows]
        batches.append((rows, torch.tensor([row.frames for row in rows])))
    for rows, lengths in batches:
        found = eager.run_untouched(_together(draw, rows), lengths)
        for i, row in enumerate(rows):
            for port, y, wanted in zip(outputs, found, reference.run(row, Full()).outputs, strict=True):
                got = _row(port, y, i if lengths is not None else None, row.frames)
                if got.shape != wanted.shape or not _near(got, wanted):
                    raise ModelError(
                        f"pack_padded_sequence in {eager.name} does not go by the session's lengths: output "
                        f"{port.name!r} for {row.frames} frames is not what it is for that sequence alone, whole; pack "
                        "by lengths taken as an argument, and let no frame beyond them count"
                    )


def _row(port: Port, y: Tensor, row: int | None, frames: int) -> Tensor:
    if row is None:
        return port.take(y)
    mine = port.fetch(y)[row]
    return mine[:frames] if port.timed else mine


def _near(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got.double(), wanted.double(), rtol=0, atol=allowed(wanted), equal_nan=True)


def _batched(draw: Draw) -> bool:
    return all(BATCH in port.eager_dims for port in draw.signature.inputs)


def _together(draw: Draw, rows: Sequence[Stream]) -> list[Tensor]:
    """The model's arguments for one row alone, or for several, padded with zeros; contexts are the first row's."""
    signature = draw.signature
    given: dict[str, Tensor] = {}
    for i, port in enumerate(signature.inputs):
        if len(rows) == 1:
            given[port.name] = port.give(rows[0].inputs[i])
        else:
            padded = torch.nn.utils.rnn.pad_sequence([row.inputs[i] for row in rows], batch_first=True)
            given[port.name] = port.feed(padded)
    for i, port in enumerate(signature.contexts):
        context = rows[0].contexts[i]
        given[port.name] = port.give(context) if len(rows) == 1 else port.feed(torch.stack([context] * len(rows)))
    return signature.arrange(given)


def _unlike(draw: Draw, vocabularies: Sequence[int]) -> Iterator[list[Stream]]:
    """Rows with values that may stand for padding: frames of zeros and small ones, every id of a vocabulary."""
    ids = max((size for size in vocabularies if size <= _IDS), default=0)
    rows = max(_ROWS, -(-ids // _FRAMES))
    for start in range(0, rows, _ROWS if _batched(draw) else 1):
        group = []
        for row in range(start, min(rows, start + (_ROWS if _batched(draw) else 1))):
            drawn = draw.stream(_FRAMES)
            group.append(
                replace(
                    drawn,
                    inputs=tuple(
                        _like_padding(draw, row, x, size) for x, size in zip(drawn.inputs, vocabularies, strict=True)
                    ),
                )
            )
        yield group


def _like_padding(draw: Draw, row: int, x: Tensor, size: int) -> Tensor:
    if x.is_floating_point():
        scale = torch.tensor([0.0, 0.01, 0.3, 1.0, 30.0])
        drawn = scale[torch.randint(0, len(scale), (_FRAMES,), generator=draw.generator)]
        # Its end is zeros, as padding is.
        drawn[_FRAMES - row % 8 :] = 0
        return x * drawn.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    if not size:
        return x
    if size > _IDS:
        ids = torch.randint(0, size, x.shape, generator=draw.generator)
        ids[-1] = 0
        return ids.to(x.dtype)
    # Backwards, so that 0 is a row's last.
    turned = (torch.arange(_FRAMES).flip(0) + row * _FRAMES) % size
    return turned.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape).to(x.dtype)
