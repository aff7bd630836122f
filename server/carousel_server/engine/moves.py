"""Rows of an array that lies on a device, read and written there: two ONNX graphs of one node, as bytes.

The server has no onnx to build them with; their messages are written as protobuf has it on the wire (ModelProto of
onnx.proto, IR version 10, opset 18).
"""

from collections.abc import Sequence

# TensorProto.DataType by NumPy's names.
_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11,
}  # fmt: skip
_INT64 = _TYPES["int64"]


def gather(dtype: str, row: Sequence[int]) -> bytes:
    """arena `[rows, *row]`, slots int64 `[batch]` → taken `[batch, *row]`, a copy."""
    arena, slots = _value("arena", dtype, ("rows", *row)), _value("slots", "int64", ("batch",))
    return _model("Gather", [arena, slots], ["arena", "slots"], _value("taken", dtype, ("batch", *row)))


def scatter(dtype: str, row: Sequence[int]) -> bytes:
    """arena `[rows, *row]`, slots int64 `[batch, 1]`, given `[batch, *row]` → the arena with these rows in it."""
    arena, given = _value("arena", dtype, ("rows", *row)), _value("given", dtype, ("batch", *row))
    slots = _value("slots", "int64", ("batch", 1))
    named = ["arena", "slots", "given"]
    return _model("ScatterND", [arena, slots, given], named, _value("changed", dtype, ("rows", *row)))


def _model(kind: str, inputs: Sequence[bytes], names: Sequence[str], output: bytes) -> bytes:
    result = "taken" if kind == "Gather" else "changed"
    node = b"".join([*(_text(1, name) for name in names), _text(2, result), _text(4, kind)])
    graph = b"".join([_part(1, node), _text(2, kind), *(_part(11, each) for each in inputs), _part(12, output)])
    return _number(1, 10) + _part(7, graph) + _part(8, _number(2, 18))


def _value(name: str, dtype: str, dims: Sequence[int | str]) -> bytes:
    shape = b"".join(_part(1, _text(2, dim) if isinstance(dim, str) else _number(1, dim)) for dim in dims)
    tensor = _number(1, _TYPES[dtype]) + _part(2, shape)
    return _text(1, name) + _part(2, _part(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _part(field, text.encode())


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
