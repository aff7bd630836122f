"""`carousel inspect`."""

from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.common import open_bundle, policy_text
from carousel_protos.v1.manifest_pb2 import DataType, Manifest, Policy


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
def command(bundle: Path) -> None:
    """Show what a bundle holds: tensors, states, policies, layers and files, whose checksums are verified."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{manifest.name} version {manifest.version}, {manifest.parameters:,} parameters", style="bold")
    console.print(f"in {opened.path}")
    policies = [policy_text(policy) + _default_mark(policy, manifest) for policy in manifest.policies]
    rows = "may differ in length" if manifest.ragged else "must have equal lengths"
    console.print(f"policies {', '.join(policies)}; the rows of a batch {rows}")
    for table in (_tensors(manifest), _layers(manifest), _files(manifest)):
        console.print(table)
    if manifest.metadata:
        console.print("metadata " + ", ".join(f"{key}={value}" for key, value in sorted(manifest.metadata.items())))
    console.print("made with " + ", ".join(f"{key} {value}" for key, value in sorted(manifest.made_with.items())))


def _default_mark(policy: Policy, manifest: Manifest) -> str:
    return " (default)" if policy == manifest.default_policy else ""


def _tensors(manifest: Manifest) -> Table:
    table = Table("", "name", "dtype", "dimensions", "eager dimensions / labels", title="Tensors", title_justify="left")
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
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
    for heading in ("input size", "hidden size", "layers", "directions", "parameters"):
        table.add_column(heading, justify="right")
    for layer in manifest.layers:
        sizes = (layer.input_size, layer.hidden_size, layer.num_layers, layer.num_directions, layer.parameters)
        table.add_row(layer.name, layer.kind, *(f"{size:,}" for size in sizes))
    return table


def _files(manifest: Manifest) -> Table:
    table = Table("file", title="Files, as they were exported", title_justify="left")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    for file in manifest.files:
        table.add_row(file.path, f"{file.bytes:,}", file.sha256[:16])
    return table


def _dtype(dtype: DataType.ValueType) -> str:
    return DataType.Name(dtype).removeprefix("DATA_TYPE_").lower()


def _dims(dims: Iterable[str]) -> str:
    return f"[{', '.join(dims)}]"
