"""`carousel inspect`."""

from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.common import open_bundle, policy_text
from carousel_protos.v1.manifest_pb2 import DataType, Manifest, Policy, PolicyKind


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
def command(bundle: Path) -> None:
    """Show what a bundle holds: tensors, states, policies, layers and files, whose checksums are verified."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{manifest.name} version {manifest.version}, {manifest.parameters:,} parameters, "
        f"{manifest.trainable_parameters:,} trainable",
        style="bold",
    )
    console.print(f"in {opened.path}")
    policies = [policy_text(policy) + _default_mark(policy, manifest) for policy in manifest.policies]
    rows = "may differ in length" if manifest.ragged else "must have equal lengths"
    console.print(f"policies {', '.join(policies)}; the rows of a batch {rows}")
    if manifest.least_frames > 1:
        console.print(f"a sequence has at least {manifest.least_frames} frames")
    for extent in manifest.extents:
        sign = "-" if extent.offset < 0 else "+"
        console.print(f"{extent.name} is (time {sign} {abs(extent.offset)}) / {extent.stride}, rounded down")
    state_bytes = sum(layer.state_bytes for layer in manifest.layers)
    console.print(f"state of a session {state_bytes:,} bytes; FLOPs for a frame {_flops(manifest)}")
    for table in (_tensors(manifest), _layers(manifest), _files(manifest)):
        console.print(table)
    for link in manifest.links:
        console.print(f"{link.input} is what {link.model} answers as {link.output}")
    for note in manifest.notes:
        console.print(f"note     {note}")
    if manifest.metadata:
        console.print("metadata " + ", ".join(f"{key}={value}" for key, value in sorted(manifest.metadata.items())))
    console.print("made with " + ", ".join(f"{key} {value}" for key, value in sorted(manifest.made_with.items())))


def _default_mark(policy: Policy, manifest: Manifest) -> str:
    return " (default)" if policy == manifest.default_policy else ""


def _flops(manifest: Manifest) -> str:
    """Of one frame answered, under each policy that runs frames more than once."""
    known = [f"{manifest.flops_per_frame:,}"]
    for policy in manifest.policies:
        if policy.kind == PolicyKind.POLICY_KIND_LOOKAHEAD:
            cost = (policy.block + policy.ahead) / policy.block
            known.append(f"{manifest.flops_per_frame * cost:,.0f} under {policy_text(policy)}")
    return ", ".join(known)


def _tensors(manifest: Manifest) -> Table:
    table = Table("", "name", "dtype", "dimensions", "eager dimensions / labels", title="Tensors", title_justify="left")
    for kind, specs in (("input", manifest.inputs), ("context", manifest.contexts), ("output", manifest.outputs)):
        for spec in specs:
            remark = _dims(spec.eager_dims)
            if spec.name in manifest.labels:
                remark += f", {len(manifest.labels[spec.name].values)} labels"
            table.add_row(kind, spec.name, _dtype(spec.dtype), _dims(spec.dims), remark)
    for state in manifest.states:
        table.add_row("state", f"{state.input} → {state.output}", _dtype(state.dtype), _dims(state.dims), "")
    return table


def _layers(manifest: Manifest) -> Table:
    table = Table("layer", "kind", title="Recurrent layers", title_justify="left")
    headings = ("input size", "hidden size", "layers", "directions", "parameters", "of each layer", "trainable")
    for heading in (*headings, "state bytes", "FLOPs/frame"):
        table.add_column(heading, justify="right")
    for layer in manifest.layers:
        sizes = (layer.input_size, layer.hidden_size, layer.num_layers, layer.num_directions, layer.parameters)
        each = " + ".join(f"{parameters:,}" for parameters in layer.layer_parameters)
        costs = (layer.trainable_parameters, layer.state_bytes, layer.flops_per_frame)
        table.add_row(layer.name, layer.kind, *(f"{n:,}" for n in sizes), each, *(f"{n:,}" for n in costs))
    return table


def _files(manifest: Manifest) -> Table:
    table = Table("file", title="Files, as they were exported", title_justify="left")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    for file in manifest.files:
        table.add_row(file.path, f"{file.bytes:,}", file.sha256[:16])
    table.add_section()
    table.add_row("all", f"{sum(file.bytes for file in manifest.files):,}", "")
    return table


def _dtype(dtype: DataType.ValueType) -> str:
    return DataType.Name(dtype).removeprefix("DATA_TYPE_").lower()


def _dims(dims: Iterable[str]) -> str:
    return f"[{', '.join(dims)}]"
