"""`config.pbtxt` for Triton Inference Server, read by a strict parser and held against the ONNX file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from tests.support.models import Tagger, make
from torch import Tensor, nn

import carousel_export as cx

Message = dict[str, list[Any]]
# The fields of Triton's model_config.proto that are written, by message; any other is a mistake.
FIELDS = {
    "": {"name", "backend", "default_model_filename", "max_batch_size", "input", "output", "sequence_batching"},
    "input": {"name", "data_type", "dims", "reshape"},
    "output": {"name", "data_type", "dims", "reshape"},
    "reshape": {"shape"},
    "sequence_batching": {"max_sequence_idle_microseconds", "oldest", "state"},
    "oldest": {"max_candidate_sequences"},
    "state": {"input_name", "output_name", "data_type", "dims", "initial_state"},
    "initial_state": {"name", "data_type", "dims", "zero_data"},
}
TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT32: "TYPE_INT32", TensorProto.INT64: "TYPE_INT64"}


def parse(text: str) -> Message:
    """Protobuf text with the fields above, each message as a dict of lists."""
    tokens = iter(re.findall(r'"(?:[^"\\]|\\.)*"|[A-Za-z_]\w*|-?\d+|[{}\[\]:,]|\S', text))
    return message(tokens, "", None)


def message(tokens: Iterator[str], kind: str, end: str | None) -> Message:
    found: Message = {}
    for token in tokens:
        if token == end:
            return found
        assert token in FIELDS[kind], f"{kind} has no field {token}"
        following = next(tokens)
        if following == "{":
            found.setdefault(token, []).append(message(tokens, token, "}"))
            continue
        assert following == ":", f"{token} is followed by {following}"
        found.setdefault(token, []).extend(values(tokens))
    assert end is None, "a message does not end"
    return found


def values(tokens: Iterator[str]) -> list[Any]:
    first = next(tokens)
    if first != "[":
        return [value(first)]
    listed = []
    for token in tokens:
        if token == "]":
            return listed
        if token != ",":
            listed.append(value(token))
    raise AssertionError("a list does not end")


def value(token: str) -> Any:
    if token.startswith('"'):
        return token[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return int(token) if re.fullmatch(r"-?\d+", token) else {"true": True, "false": False}.get(token, token)


def of(graph_values: Any) -> dict[str, tuple[str, list[int]]]:
    """Each tensor's Triton type and dims of an ONNX graph, the batch left out."""
    found = {}
    for each in graph_values:
        dims = [dim.dim_value or -1 for dim in each.type.tensor_type.shape.dim]
        found[each.name] = (TYPES[each.type.tensor_type.elem_type], dims[1:])
    return found


class Prefixes(nn.Module):
    """Three GRUs of which one's name is a prefix of the others', called in an order that is not their names'."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn_b = nn.GRU(5, 3, batch_first=True)
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.rnn_a = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.rnn_a(self.rnn(self.rnn_b(x)[0])[0])
        return y, y.argmax(-1)


@pytest.mark.parametrize("kind", ["prefixes", "tagger"])
def test_config_says_what_the_graph_is(tmp_path: Path, kind: str) -> None:
    """Inputs, outputs and state pairs by name have the graph's types and dims, and sequence start resets each state."""
    torch.manual_seed(0)
    model = Prefixes().eval() if kind == "prefixes" else make(Tagger)
    bundle = cx.export(model.eval(), torch.randn(3, 6, 5), name=kind, out=tmp_path, triton=True)
    assert (tmp_path / kind / "1" / "model.onnx").exists()
    config = parse((tmp_path / kind / "config.pbtxt").read_text())
    graph = onnx.load(bundle.file("model.onnx")).graph
    inputs, outputs = of(graph.input), of(graph.output)
    assert config["name"] == [kind]
    assert config["backend"] == ["onnxruntime"]
    assert config["default_model_filename"] == ["model.onnx"]
    assert config["max_batch_size"][0] > 1
    (batching,) = config["sequence_batching"]
    pairs = {state["input_name"][0]: state["output_name"][0] for state in batching["state"]}
    assert pairs == {state.input: state.output for state in bundle.manifest.states}
    for state in batching["state"]:
        declared = (state["data_type"][0], state["dims"])
        assert declared == inputs.pop(state["input_name"][0]) == outputs.pop(state["output_name"][0])
        (initial,) = state["initial_state"]
        assert (initial["data_type"][0], initial["dims"], initial["zero_data"]) == (*declared, [True])
    for side, tensors in (("input", inputs), ("output", outputs)):
        assert [each["name"][0] for each in config[side]] == list(tensors)
        for each in config[side]:
            shape = each["reshape"][0].get("shape", []) if "reshape" in each else each["dims"]
            assert (each["data_type"][0], shape) == tensors[each["name"][0]]
            assert each["dims"], "Triton wants one dimension at least"
    assert not [path for path in (tmp_path / kind).iterdir() if path.name.startswith(".")]


class Nested(nn.Module):
    """A layer, and one in it under the name of the other's state: the names' order is not that of the outputs'."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 4, batch_first=True)
        self.rnn.h_0 = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn.h_0(self.rnn(x)[0])[0]


def test_pairs_stand_at_the_same_place_by_name(tmp_path: Path) -> None:
    """Triton pairs the nth state input by name with the nth output by name, so that another order is refused."""
    bundle = cx.export(Prefixes().eval(), torch.randn(3, 6, 5), name="prefixes", out=tmp_path, triton=True)
    pairs = [(state.input, state.output) for state in bundle.manifest.states]
    assert list(zip(*map(sorted, zip(*pairs, strict=True)), strict=True)) == sorted(pairs)
    with pytest.raises(cx.ExportError, match=r"order of their names, .* \(rnn.h_0, rnn.h_0.h_0\) .*; rename the layer"):
        cx.export(Nested().eval(), torch.randn(3, 6, 5), name="nested", out=tmp_path, triton=True)
    assert not (tmp_path / "nested").exists()


class Last(nn.Module):
    """One answer for the sequence, with a backward direction: right under full alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


class Learned(nn.Module):
    """Starts from a state that it learned."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 4, batch_first=True)
        self.start = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x, self.start.expand(1, x.shape[0], 4).contiguous())[0]


def test_what_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    """A model that may not carry its state or learned its start, and a version that is no number: a line, no bundle."""
    with pytest.raises(cx.ExportError, match=r"'gru\.h_0' starts from values of the model's own"):
        cx.export(Learned().eval(), torch.randn(2, 6, 5), name="learned", out=tmp_path, triton=True)
    with pytest.raises(cx.PolicyError, match="right under full alone; leave out --triton"):
        cx.export(Last().eval(), torch.randn(2, 6, 5), name="last", out=tmp_path, triton=True)
    with pytest.raises(cx.ExportError, match="version 'a' is no number, which Triton wants"):
        cx.export(make(Tagger), torch.randn(2, 6, 5), name="tagger", out=tmp_path, version="a", triton=True)
    assert not list(tmp_path.iterdir())
