"""`config.pbtxt`: what Triton Inference Server wants beside a bundle to serve its model.onnx as a stateful sequence."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from carousel_export.errors import ExportError, PolicyError
from carousel_export.graph import MODEL
from carousel_export.policies import Carry, Causal, Policy
from carousel_export.signature import Signature, State
from carousel_protos.bundle import Bundle
from carousel_protos.v1 import manifest_pb2 as pb

CONFIG = "config.pbtxt"
# model_config.proto names types in its own way.
_TYPES = {
    pb.DATA_TYPE_FLOAT32: "TYPE_FP32",
    pb.DATA_TYPE_FLOAT16: "TYPE_FP16",
    pb.DATA_TYPE_FLOAT64: "TYPE_FP64",
    pb.DATA_TYPE_INT8: "TYPE_INT8",
    pb.DATA_TYPE_INT16: "TYPE_INT16",
    pb.DATA_TYPE_INT32: "TYPE_INT32",
    pb.DATA_TYPE_INT64: "TYPE_INT64",
    pb.DATA_TYPE_UINT8: "TYPE_UINT8",
    pb.DATA_TYPE_BOOL: "TYPE_BOOL",
}
_MAX_BATCH = 64
_IDLE_S = 600


def check_triton(version: str, policies: Sequence[Policy], signature: Signature) -> None:
    """Raise `ExportError` for a bundle that Triton cannot serve as a sequence, before anything is written."""
    if not version.isdecimal() or int(version) < 1:
        raise ExportError(f"version {version!r} is no number, which Triton wants; give --version 1, or leave it out")
    if not any(isinstance(policy, Causal | Carry) for policy in policies):
        raise PolicyError(
            "Triton carries the state from request to request, and this model is right under full alone; leave out "
            "--triton"
        )
    if signature.contexts:
        raise ExportError(
            f"Triton has no input that holds for a whole sequence, as {signature.contexts[0].name!r} does; leave out "
            "--triton"
        )
    if learned := [state.input for state in signature.states if state.initial is not None]:
        raise ExportError(
            f"state {learned[0]!r} starts from values of the model's own, and the config starts each from zero; take "
            "the state as an argument of forward, or leave out --triton"
        )
    if _by_name(signature, "input") != _by_name(signature, "output"):
        raise ExportError(
            "Triton pairs states by the order of their names, which the inputs' "
            f"({', '.join(sorted(state.input for state in signature.states))}) and the outputs' "
            f"({', '.join(sorted(state.output for state in signature.states))}) do not have in common; rename the "
            "layer whose name goes on from another's state, or leave out --triton"
        )
    if flat := [state.input for state in signature.states if not state.shape]:
        raise ExportError(f"state {flat[0]!r} is a single value a row, which Triton cannot hold; leave out --triton")


def _by_name(signature: Signature, side: str) -> list[State]:
    return sorted(signature.states, key=lambda state: str(getattr(state, side)))


def write_config(bundle: Bundle) -> Path:
    """Write `<models>/<name>/config.pbtxt` for a bundle; the layout of the model folder is Triton's own already.

    The states are implicit: Triton keeps them between the requests of a sequence, and starts each sequence from their
    `initial_state`, zero. It does so for a request that is flagged as the sequence's start, so that the graph needs no
    input for a START control, and the config may name none. A request answers as a chunk does under carry without a
    block, or causal.
    """
    text = _config(bundle.manifest)
    path = bundle.path.parent / CONFIG
    # Renamed into place, as the bundle was: Triton may be polling the folder.
    handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(scratch).chmod(0o644)
    return Path(scratch).replace(path)


def _config(manifest: pb.Manifest) -> str:
    inputs = [_tensor(port) for port in manifest.inputs]
    lengths = pb.TensorSpec(name=manifest.lengths, dtype=pb.DATA_TYPE_INT32, dims=["batch"])
    inputs.append(_tensor(lengths))
    outputs = [_tensor(port) for port in manifest.outputs]
    lines = [
        f"name: {_quote(manifest.name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quote(MODEL)}",
        f"max_batch_size: {_MAX_BATCH}",
        *_repeated("input", inputs),
        *_repeated("output", outputs),
    ]
    lines.append("sequence_batching {")
    lines.append(f"  max_sequence_idle_microseconds: {_IDLE_S * 1_000_000}")
    lines.append(f"  oldest {{ max_candidate_sequences: {_MAX_BATCH * 16} }}")
    for state in manifest.states:
        kind = _TYPES[state.dtype]
        dims = _dims([int(dim) for dim in state.dims[1:]])
        lines += [
            "  state {",
            f"    input_name: {_quote(state.input)}",
            f"    output_name: {_quote(state.output)}",
            f"    data_type: {kind}",
            f"    dims: {dims}",
            f"    initial_state {{ name: {_quote(state.input)} data_type: {kind} dims: {dims} zero_data: true }}",
            "  }",
        ]
    lines.append("}")
    return "\n".join(lines) + "\n"


def _tensor(port: pb.TensorSpec) -> list[str]:
    """One input's or output's fields. The batch is implied; a tensor of the batch alone has one element a row."""
    dims = [-1 if dim == "time" else int(dim) for dim in port.dims[1:]]
    fields = [f"name: {_quote(port.name)}", f"data_type: {_TYPES[port.dtype]}", f"dims: {_dims(dims or [1])}"]
    return fields if dims else [*fields, "reshape { shape: [ ] }"]


def _repeated(kind: str, tensors: list[list[str]]) -> list[str]:
    return [line for fields in tensors for line in (f"{kind} {{", *(f"  {field}" for field in fields), "}")]


def _dims(dims: list[int]) -> str:
    return f"[ {', '.join(map(str, dims))} ]"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
