"""Which input is the state that which output hands on."""

import pytest
import torch

import carousel_export as cx
from carousel_export.imported.foreign import Value
from carousel_export.imported.pairs import find_pairs

ROW = ("1", "batch", "7")


def values(*names: str, dims: tuple[str, ...] = ROW) -> list[Value]:
    return [Value(name, torch.float32, dims) for name in names]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["h0", "c0"], ["cn", "hn"]),
        (["h_0", "c_0"], ["c_n", "h_n"]),
        (["state"], ["stateN"]),
        (["state_in"], ["state_out"]),
        (["cache.0", "cache.1"], ["new_cache.1", "new_cache.0"]),
        (["cache_a", "cache", "cache_ab"], ["cache_ab_out", "cache_out", "cache_a_out"]),
        (["past_h", "h", "h_2"], ["next_h_2", "next_past_h", "next_h"]),
    ],
)
def test_pairs_by_name(inputs: list[str], outputs: list[str]) -> None:
    """Names that differ in words for in and out alone are pairs, in any order, also where one begins another."""
    frames = [Value("x", torch.float32, ("batch", "time", "5")), Value("y", torch.float32, ("batch", "time", "7"))]
    found = find_pairs([frames[0], *values(*inputs)], [frames[1], *values(*outputs)], {}, timed=["x"])

    def stem(name: str) -> str:
        for word in ("new_", "next_", "_out", "_in", "_0", "_n", "N"):
            name = name.replace(word, "")
        return name.replace("h0", "h").replace("c0", "c").replace("hn", "h").replace("cn", "c")

    assert {name: stem(output) for name, output in found.items()} == {name: stem(name) for name in inputs}


def test_by_shape_where_only_one_fits() -> None:
    """Names that say nothing are paired by their axes, unless more than one output would do."""
    frames = Value("x", torch.float32, ("batch", "time", "5"))
    large = {"dims": ("2", "batch", "3")}
    inputs, outputs = [frames, *values("a"), *values("b", **large)], [*values("q"), *values("r", **large)]
    assert find_pairs(inputs, outputs, {}, timed=["x"]) == {"a": "q", "b": "r"}
    assert find_pairs([frames, *values("a", "b")], values("q", "r"), {}, timed=["x"]) == {}
    assert find_pairs([frames, *values("a")], values("q", "r"), {}, timed=["x"]) == {}
    assert find_pairs([frames, *values("a", "b")], values("q", "r"), {"a": "r"}, timed=["x"]) == {"a": "r", "b": "q"}


def test_given_pairs_are_checked() -> None:
    """A pair that names no tensor, or two of different axes, is refused."""
    with pytest.raises(cx.ExampleError, match="--state a=nothing names no input and output"):
        find_pairs(values("a"), values("q"), {"a": "nothing"}, timed=[])
    with pytest.raises(cx.ExampleError, match=r"--state a=q: 'a' \[1, batch, 7\] and 'q' \[batch, 7\] differ"):
        find_pairs(values("a"), values("q", dims=("batch", "7")), {"a": "q"}, timed=[])
