"""Which other files an ONNX file reads: its external data."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from carousel_protos.v1.onnx_pb2 import OnnxModel, OnnxTensor


def external_files(path: Path) -> set[str]:
    """The locations that the tensors of an ONNX file name, as they stand there, wherever in it a tensor is.

    Nothing but the file itself is opened. Raises `ValueError` for one that is no ONNX.
    """
    try:
        model = OnnxModel.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError("it is no ONNX file") from error
    return {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}


def _tensors(message: Message) -> Iterator[OnnxTensor]:
    if isinstance(message, OnnxTensor):
        yield message
        return
    for field, value in message.ListFields():
        parts: Iterable[Message] = value if field.is_repeated else (value,)
        for part in parts:
            yield from _tensors(part)
