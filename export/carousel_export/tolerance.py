"""What an answer may be off by."""

from torch import Tensor

# Of an output with values up to 1, absolute; of a larger one, relative to the largest value that the sequence has.
TOLERANCE = 1e-5


def allowed(wanted: Tensor) -> float:
    """What one sequence's output may be off by: `TOLERANCE`, times its largest finite value where that is over 1."""
    return TOLERANCE * max(1.0, largest(wanted))


def largest(x: Tensor) -> float:
    """The largest finite value, absolute; 0 where there is none."""
    finite = x[x.isfinite()].double().abs()
    return float(finite.max()) if finite.numel() else 0.0
