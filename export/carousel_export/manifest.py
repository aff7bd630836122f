"""The manifest of a new bundle, as far as it follows from the signature and the policies."""

import importlib.metadata
import platform
from collections.abc import Sequence

from carousel_export.graph import LOOKAHEAD, MODEL
from carousel_export.policies import Policy, to_message
from carousel_export.signature import LENGTHS, Signature
from carousel_export.tolerance import TOLERANCE
from carousel_export.torchscript import TORCHSCRIPT
from carousel_export.variants import FLOAT32
from carousel_protos.v1 import manifest_pb2 as pb


def describe(
    signature: Signature,
    policies: Sequence[Policy],
    default: Policy,
    *,
    ragged: bool,
    arguments: Sequence[str] | None = None,
    model: str = MODEL,
    torchscript: str = TORCHSCRIPT,
) -> pb.Manifest:
    """Tensors, states, policies, graphs and versions. `model`: the file of all policies but lookahead.

    `arguments` are the eager model's, where they are more than its inputs and contexts.
    """
    messages = [to_message(policy) for policy in policies]
    graphs = [(model, [m.kind for m in messages if m.kind != pb.POLICY_KIND_LOOKAHEAD])]
    graphs += [(LOOKAHEAD, [m.kind]) for m in messages if m.kind == pb.POLICY_KIND_LOOKAHEAD]
    manifest = pb.Manifest(
        inputs=[port.message() for port in signature.inputs],
        contexts=[port.message() for port in signature.contexts],
        arguments=signature.arguments if arguments is None else arguments,
        outputs=[port.message() for port in signature.outputs],
        states=[state.message() for state in signature.states],
        lengths=LENGTHS,
        policies=messages,
        default_policy=to_message(default),
        ragged=ragged,
        least_frames=signature.least_frames if signature.least_frames > 1 else 0,
        extents=[extent.message() for extent in signature.extents],
        graphs=[pb.Graph(file=file, policies=kinds, variant=FLOAT32) for file, kinds in graphs],
        torchscript=torchscript,
        tolerance=pb.Tolerance(absolute=TOLERANCE, relative=TOLERANCE),
    )
    for package in ("carousel", "onnx", "onnxruntime", "onnxscript", "torch"):
        manifest.made_with[package] = importlib.metadata.version(package)
    manifest.made_with["python"] = platform.python_version()
    return manifest
