"""The LSTM with a projected h (`proj_size`, LSTMP) in ONNX, which has no operator for it: a Scan over time.

h = P (o ⊙ tanh c), as Sak, Senior and Beaufays (2014) have it and `nn.LSTM` does. The input's share of the gates is one
product over all frames, outside the loop; inside are the product with h, the gates, and the product with P. Frames
from a row's length on leave its states as they are, so that a scan from the end starts at each row's own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnxscript
from onnxscript import BOOL, FLOAT, graph, script

# The exporter inlines functions of its own opset, 18, before it raises the whole graph to OPSET.
# onnxscript types values as inside a graph, and knows of no symbolic ones.
op: Any = onnxscript.opset18
if TYPE_CHECKING:
    Float = Any
    Bool = Any
else:
    # Of any rank; without the dots it would be a scalar.
    Float, Bool = FLOAT[...], BOOL[...]


@script()
def _scan(
    gates: Float,
    valid: Bool,
    h_0: Float,
    c_0: Float,
    r: Float,
    p: Float,
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> tuple[Float, Float, Float]:
    """One direction, with gates `[time, batch, 4 × hidden]` and valid `[time, batch, 1]` → y and the states."""

    @graph()
    def step(h: Float, c: Float, x: Float, here: Bool) -> tuple[Float, Float, Float]:
        i, o, f, z = op.Split(x + op.MatMul(h, r), axis=1, num_outputs=4)
        next_c = op.Sigmoid(f) * c + op.Sigmoid(i) * op.Tanh(z)
        next_h = op.MatMul(op.Sigmoid(o) * op.Tanh(next_c), p)
        h_n = op.Where(here, next_h, h)
        return h_n, op.Where(here, next_c, c), op.Identity(h_n)

    h_n, c_n, y = op.Scan(
        h_0,
        c_0,
        gates,
        valid,
        body=step,
        num_scan_inputs=2,
        scan_input_directions=inputs,
        scan_output_directions=outputs,
    )
    return op.Where(valid, y, op.CastLike(0.0, y)), h_n, c_n


def projected_lstm(
    x: Any, w: Any, r: Any, b: Any, p: Any, lengths: Any, h_0: Any, c_0: Any, direction: str
) -> tuple[Any, ...]:
    """One layer as ONNX nodes: the weights are LSTM's W, R and B, and P `[directions, size, hidden]`."""
    scan: Any = _scan
    time = op.Shape(x, start=0, end=1)
    # onnxruntime refuses a Scan over no frames: then it runs over one that is beyond every row's length.
    missing = op.Max(op.Sub(op.Constant(value_ints=[1]), time), op.Constant(value_ints=[0]))
    steps = op.Range(0, op.Squeeze(op.Add(time, missing)), 1)
    valid = op.Unsqueeze(op.Less(op.Unsqueeze(steps, [1]), op.Unsqueeze(op.Cast(lengths, to=7), [0])), [2])
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0]), missing, op.Constant(value_ints=[0, 0]), axis=0)
    sides = []
    for i in range(r.shape[0]):
        w_t, r_t, p_t = (op.Transpose(op.Gather(each, i, axis=0), perm=[1, 0]) for each in (w, r, p))
        gates = op.MatMul(x, w_t)
        if b is not None:
            ih, hh = op.Split(op.Gather(b, i, axis=0), axis=0, num_outputs=2)
            gates = op.Add(gates, op.Add(ih, hh))
        starts = []
        for state, size in ((h_0, r.shape[2]), (c_0, p.shape[2])):
            shape = op.Concat(op.Shape(x, start=1, end=2), op.Constant(value_ints=[size]), axis=0)
            starts.append(op.Expand(0.0, shape) if state is None else op.Gather(state, i, axis=0))
        backwards = int(direction == "reverse" or i == 1)
        y, h_n, c_n = scan(op.Pad(gates, pads), valid, *starts, r_t, p_t, inputs=[backwards] * 2, outputs=[backwards])
        sides.append((op.Unsqueeze(op.Slice(y, [0], time, [0]), [1]), op.Unsqueeze(h_n, [0]), op.Unsqueeze(c_n, [0])))
    ys, hs, cs = zip(*sides, strict=True)
    return op.Concat(*ys, axis=1), op.Concat(*hs, axis=0), op.Concat(*cs, axis=0)
