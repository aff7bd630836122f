"""The best path through a linear-chain CRF (Viterbi 1967), as eager code, as TorchScript and as ONNX Scans over time.

Backpointers from a row's length on point at themselves, so that its path is traced back from its own last frame.
"""

import functools
from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from onnxscript import FLOAT, INT64, graph, script
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from carousel_export.quiet import quiet

# The exporter inlines functions of its own opset, 18, before it raises the whole graph to the bundle's.
# onnxscript types values as inside a graph, and knows of no symbolic ones.
op: Any = onnxscript.opset18


def viterbi_decode(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best sequence of tags and its score, for a model's `forward`; exported with it, for any number of frames.

    `emissions` `[batch, time, tags]`, float; `transitions` `[tags, tags]`, from a row's tag to a column's; `start` and
    `end` `[tags]`, the scores of beginning and ending with a tag. `lengths` `[batch]`, integer, are the rows' frames,
    if not all of them. Returns the path, int64 `[batch, time]`, which repeats its last tag after a row's end, and the
    score, `[batch]`. In an exported model, rows end where the session's sequences do.
    """
    tensors = (emissions, transitions, start, end)
    if has_torch_function(tensors):
        answer: tuple[Tensor, Tensor] = handle_torch_function(viterbi_decode, tensors, *tensors, lengths=lengths)
        return answer
    if lengths is None:
        lengths = torch.full_like(emissions[:, 0, 0], emissions.shape[1], dtype=torch.int64)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return _scripted()(*tensors, lengths)
    path, score = _viterbi(*tensors, lengths)
    return path, score


def best_path(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """`viterbi_decode`, frame by frame. It can be scripted."""
    rows, time, tags = emissions.size(0), emissions.size(1), emissions.size(2)
    itself = torch.arange(tags, device=emissions.device).expand(rows, tags)
    score = start + emissions[:, 0]
    pointers = [itself]
    for t in range(1, time):
        # The order of these sums is that of the usual eager decoders.
        best, pointer = (score.unsqueeze(2) + transitions + emissions[:, t].unsqueeze(1)).max(1)
        here = (t < lengths).unsqueeze(1)
        score = torch.where(here, best, score)
        pointers.append(torch.where(here, pointer, itself))
    total, tag = (score + end).max(1)
    path = [tag]
    for i in range(time - 1):
        tag = pointers[time - 1 - i].gather(1, tag.unsqueeze(1)).squeeze(1)
        path.append(tag)
    return torch.stack(path, 1).flip(1), total


@functools.cache
def _scripted() -> Callable[..., tuple[Tensor, Tensor]]:
    with quiet():
        return torch.jit.script(best_path)


_viterbi = torch.library.custom_op("carousel::viterbi", best_path, mutates_args=())


@_viterbi.register_fake
def _(emissions: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rows, time, _tags = emissions.shape
    return emissions.new_empty(rows, time, dtype=torch.int64), emissions.new_empty(rows)


@script()
def _onnx_viterbi(  # type: ignore[no-untyped-def]  # onnxscript's types say nothing of values in a graph
    emissions, transitions, start, end, here, first, itself
) -> tuple[INT64, FLOAT]:
    """Emissions `[time, batch, tags]`, here `[time, batch, 1]`, first `[time, 1, 1]`, itself `[batch, tags]`."""

    @graph()
    def forward(score, emission, valid, begins):  # type: ignore[no-untyped-def]
        steps = op.Unsqueeze(score, [2]) + transitions + op.Unsqueeze(emission, [1])
        goes_on = op.And(valid, op.Not(begins))
        # At the first frame the score is what it begins with.
        best = op.Where(goes_on, op.ReduceMax(steps, [1], keepdims=0), score)
        return best, op.Where(goes_on, op.ArgMax(steps, axis=1, keepdims=0), itself)

    @graph()
    def backward(tag, pointer):  # type: ignore[no-untyped-def]
        return op.GatherElements(pointer, tag, axis=1), op.Identity(tag)

    score, pointers = op.Scan(start + emissions[0], emissions, here, first, body=forward, num_scan_inputs=3)
    last = score + end
    tag = op.ArgMax(last, axis=1, keepdims=1)
    _, path = op.Scan(
        tag, pointers, body=backward, num_scan_inputs=1, scan_input_directions=[1], scan_output_directions=[1]
    )
    return op.Transpose(op.Squeeze(path, [2]), perm=[1, 0]), op.ReduceMax(last, [1], keepdims=0)


def onnx_viterbi(emissions: Any, transitions: Any, start: Any, end: Any, lengths: Any) -> Any:
    """The operator as ONNX nodes."""
    steps = op.Range(0, op.Squeeze(op.Shape(emissions, start=1, end=2)), 1)
    here = op.Unsqueeze(op.Less(op.Unsqueeze(steps, [1]), op.Unsqueeze(op.Cast(lengths, to=7), [0])), [2])
    first = op.Unsqueeze(op.Equal(steps, 0), [1, 2])
    tags = op.Range(0, op.Squeeze(op.Shape(emissions, start=2, end=3)), 1)
    itself = op.Expand(tags, op.Concat(op.Shape(emissions, start=0, end=1), op.Shape(tags), axis=0))
    decode: Any = _onnx_viterbi
    return decode(op.Transpose(emissions, perm=[1, 0, 2]), transitions, start, end, here, first, itself)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.carousel.viterbi.default: onnx_viterbi}
