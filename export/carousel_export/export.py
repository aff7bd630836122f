"""Exporting a model, from the eager module to the bundle on disk, read from top to bottom."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carousel_export.axes import find_signature
from carousel_export.calling import as_tensors, restore
from carousel_export.draw import Draw, example_samples, given_streams
from carousel_export.eager import Eager, call_name
from carousel_export.errors import ExampleError, ExportError
from carousel_export.experiments import choose, find_policies, with_paddings
from carousel_export.figures import Figures, measure
from carousel_export.gate import prove, runtimes_of
from carousel_export.golden import GOLDEN, read_samples, write_golden
from carousel_export.graph import LOOKAHEAD, MODEL, write_graph
from carousel_export.lengths import find_lengths
from carousel_export.links import find_links
from carousel_export.loops.written import without_loops
from carousel_export.manifest import describe
from carousel_export.measure import BOUND, measure_variants, start_variants
from carousel_export.names import check_example, check_rows, input_names_of
from carousel_export.packed import check_packed
from carousel_export.padding import FRAMES
from carousel_export.policies import Lookahead, Policy, from_message, named
from carousel_export.quiet import undisturbed
from carousel_export.reference import Reference, Stream
from carousel_export.report import render
from carousel_export.shortest import find_shortest
from carousel_export.signature import Signature
from carousel_export.steady import check_steady
from carousel_export.step import find_step, takes_one_frame
from carousel_export.torchscript import TORCHSCRIPT, write_torchscript
from carousel_export.triton import check_triton, write_config
from carousel_export.variants import check_variants
from carousel_export.vocabulary import find_vocabularies
from carousel_protos.bundle import Bundle, BundleWriter
from carousel_protos.v1 import manifest_pb2 as pb

log = logging.getLogger(__name__)


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    name: str,
    out: str | Path = "models",
    policy: Policy | None = None,
    version: str | None = None,
    labels: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    data: Sequence[Tensor | Sequence[Tensor]] = (),
    links: Mapping[str, tuple[str, str]] | None = None,
    variants: Sequence[str] = (),
    variant_error: float = BOUND,
    triton: bool = False,
) -> Bundle:
    """Export a model with recurrent layers to `<out>/<name>/<version>/`, and prove that it says what the model says.

    `model` is in evaluation mode and float32, and is left as it is: a copy of it on the CPU is exported.
    `example_inputs` is one tensor or one for each argument of `forward`, in the layout that the model takes, of two
    rows or more; batch and time are found by experiment, unless `dims` gives the axes, such as `{"x": ("batch",
    "time", "80")}`. An argument without time is a context, given once a session and seen by every step; give it
    another size than time's where it has an axis of its own, such as `{"memory": ("batch", "source", "64")}`. An
    argument that reaches a recurrent layer as its state, such as an `(h, c)`, is a state of the session, and
    lengths that the model packs with are those of the session's blocks: neither is an input of the bundle, nor the
    state that the model returns an output. `policy` is the bundle's default: if absent, lookahead(8, 8) for a model
    with a backward direction and causal for any other. `labels` names the classes of an output's last dimension.
    `data` are sequences of the caller's, each one tensor `[time, …]` for each argument, and `[…]` for a context;
    the gate tries them beside drawn ones, and the look-ahead curve is theirs. `links` says which other model under
    `out` answers what a session of this one starts from: a context or a state input, and the model's name and
    output, as in `{"memory": ("encoder", "memory"), "rnn.h_0": ("encoder", "hidden")}`. `variants` are "int8" and
    "float16": the ONNX files in that arithmetic, each with its measured error as its tolerance; one whose error is
    over `variant_error` times the largest value of an output is refused.
    With `triton`, `<out>/<name>/config.pbtxt` is written for Triton Inference Server to serve the same model.onnx as a
    stateful sequence.

    Raises `ExportError` (see `carousel_export.errors`), and `BundleError` for a name or version that cannot be written;
    then there is no bundle.
    """
    variants = check_variants(variants)
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    # Entered first: a place that cannot be written to is found out before the work.
    with BundleWriter(out, name, version) as writer, undisturbed():
        given = [as_tensors(argument) for argument in example]
        eager = Eager(model)
        names = input_names_of(eager, given, input_names)
        leaves = [(name, leaf) for name, each in zip(names, given, strict=True) for leaf in pytree.tree_leaves(each)]
        check_example(*zip(*leaves, strict=True))
        check_steady(eager, given, names)
        eager = without_loops(eager, given)
        signature, example = _read(eager, given, names, output_names, dims)
        named_labels = _labels(signature, labels)
        linked = find_links(signature, links or {}, Path(out))
        draw = Draw(signature, example_samples(signature, example), given_streams(signature, data))
        draw, needs = find_shortest(eager, draw)
        check_packed(eager, draw, example)
        findings = find_policies(Reference(eager, draw.signature, rolled=True), draw, needs)
        signature = findings.signature
        reference = Reference(eager, signature)
        draw = replace(draw, signature=signature)
        default, policies = choose(policy, findings)
        lookahead = Lookahead in findings.policies
        if triton:
            check_triton(writer.version, policies, signature)
        write_graph(writer.path / MODEL, eager, signature, example)
        if lookahead:
            write_graph(writer.path / LOOKAHEAD, eager, signature, example, ahead=True)
        write_torchscript(writer.path / TORCHSCRIPT, eager, signature, example, lookahead=lookahead)
        tried = start_variants(writer.path, variants)
        runtimes = runtimes_of(writer.path)
        proof = prove(runtimes, reference, draw, policies, ragged=signature.ragged, variants=tried)
        write_golden(writer.path / GOLDEN, reference, draw, policies)
        figures = measure(eager, signature, example)
        vocabularies = find_vocabularies(eager, signature, example)
        manifest = _manifest(eager, figures, signature, default, policies, vocabularies)
        manifest.name, manifest.version = name, writer.version
        proof["variants"] = measure_variants(writer.path, tried, draw, default, manifest, bound=variant_error)
        for output, values in named_labels.items():
            manifest.labels[output].values.extend(values)
        manifest.links.extend(linked)
        manifest.notes.extend(findings.notes)
        manifest.metadata.update(metadata or {})
        (writer.path / "parity.json").write_text(json.dumps(proof, allow_nan=False), encoding="utf-8")
        writer.list_files(manifest)
        (writer.path / "report.html").write_text(render(manifest, proof), encoding="utf-8")
        bundle = writer.commit(manifest)
        if findings.reason:
            log.warning("%s allows %s only: %s", name, named(policies), findings.reason)
        if triton:
            write_config(bundle)
        return bundle


def parity(bundle: Bundle, model: nn.Module) -> dict[str, Any]:
    """Prove a bundle again against the eager model that it was made of, on fresh draws like its golden inputs.

    Returns the content of a parity.json. Raises `ParityError` where they differ (other weights do), and `ExportError`
    for a model that is not this bundle's.
    """
    with undisturbed():
        manifest = bundle.manifest
        signature = Signature.from_manifest(manifest)
        samples = read_samples(bundle.file(GOLDEN), signature)
        best = min if signature.stepwise else max
        sample = _as_example(signature, best(samples, key=lambda sample: sample.frames))
        eager = without_loops(Eager(model), sample)
        known = {call_name(path, module, 0) for path, module in eager.recurrent.items()}
        recurrent = [state.call for state in signature.states if not state.input.endswith(f".{FRAMES}_0")]
        if missing := {call.partition(".call")[0] for call in recurrent} - known:
            raise ExportError(f"{eager.name} has no layer {min(missing)!r}; give the model that {bundle.path} is of")
        given = restore(manifest.arguments, (*signature.inputs, *signature.contexts), signature.states)
        eager.restore_calling(given, sample)
        draw = Draw(signature, samples)
        check_packed(eager, draw, sample)
        signature = signature if signature.stepwise else with_paddings(eager, signature, draw)
        policies = [from_message(policy) for policy in manifest.policies]
        return prove(runtimes_of(bundle.path), Reference(eager, signature), draw, policies, ragged=manifest.ragged)


def _read(
    eager: Eager,
    given: Sequence[Any],
    names: Sequence[str],
    output_names: Sequence[str] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> tuple[Signature, tuple[Tensor, ...]]:
    """The model's signature, and those of the example's arguments that are its inputs."""
    asked = set(names)
    example, names = eager.find_calling(given, names)
    example, names = find_lengths(eager, example, names, _of(dims, asked, names))
    dims = _of(dims, asked, names)
    find = find_step if takes_one_frame(eager, example) else find_signature
    signature = find(eager, example, names, output_names, dims)
    check_rows(signature, example)
    return signature, example


def _of(
    dims: Mapping[str, Sequence[str]] | None, asked: Collection[str], names: Sequence[str]
) -> Mapping[str, Sequence[str]] | None:
    """The axes that the caller names, without those of arguments that are no inputs: states and lengths."""
    return dims and {name: axes for name, axes in dims.items() if name in names or name not in asked}


def _as_example(signature: Signature, sample: Stream) -> list[Tensor]:
    ports = (*signature.inputs, *signature.contexts)
    pairs = zip(ports, (*sample.inputs, *sample.contexts), strict=True)
    return signature.arrange({port.name: port.give(x) for port, x in pairs})


def _labels(signature: Signature, labels: Mapping[str, Sequence[str]] | Sequence[str] | None) -> dict[str, list[str]]:
    if not labels:
        return {}
    named = labels if isinstance(labels, Mapping) else {signature.outputs[0].name: labels}
    ports = {port.name: port for port in signature.outputs}
    for name, values in named.items():
        if name not in ports:
            raise ExampleError(f"labels name an output {name!r}; the model's outputs are {', '.join(ports)}")
        if ports[name].dims[-1] != str(len(values)):
            raise ExampleError(
                f"{len(values)} labels for output {name!r}, whose last dimension is {ports[name].dims[-1]}"
            )
    return {name: list(values) for name, values in named.items()}


def _manifest(
    eager: Eager,
    figures: Figures,
    signature: Signature,
    default: Policy,
    policies: Sequence[Policy],
    vocabularies: Sequence[int],
) -> pb.Manifest:
    manifest = describe(
        signature, policies, default, ragged=signature.ragged, arguments=eager.calling.described or signature.arguments
    )
    for port, size in zip(manifest.inputs, vocabularies, strict=True):
        port.vocabulary = size
    manifest.right_context = signature.right_context
    manifest.stepwise = signature.stepwise
    manifest.layers.extend(figures.layers)
    manifest.parameters = figures.parameters
    manifest.trainable_parameters = figures.trainable
    manifest.flops_per_frame = figures.flops
    return manifest
