"""`carousel export`."""

import logging
from pathlib import Path

import click
from rich.console import Console

from carousel_cli.common import extra, make_policy, policy_options
from carousel_cli.proof import proof_table, read_proof, variants_table
from carousel_protos import BundleError


@click.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--name", required=True, help="The model's name.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder of all models."
)
@click.option("--version", help="The version; without it, the next number.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Load this state_dict into the model; only tensors are read from it.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:DTYPE:DIMS",
    help="An input, such as x:float32:batch,time,80, for which an example is drawn; once for each. One without time, "
    "such as memory:float32:batch,source,64, is a session's context.",
)
@click.option(
    "--link",
    "links",
    multiple=True,
    metavar="INPUT=MODEL:OUTPUT",
    help="This context or state input is what that model in --out answers as OUTPUT; once for each.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="int8|float16",
    help="Write the graphs in this arithmetic as well, and measure it; once for each.",
)
@click.option(
    "--variant-error",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="The largest error of a variant, as a part of an output's largest value.",
)
@click.option(
    "--triton", is_flag=True, help="Write config.pbtxt as well, for Triton to serve model.onnx as a stateful sequence."
)
@policy_options
def command(
    factory: str,
    name: str,
    out: Path,
    version: str | None,
    checkpoint: Path | None,
    inputs: tuple[str, ...],
    links: tuple[str, ...],
    variants: tuple[str, ...],
    variant_error: float,
    triton: bool,
    policy: str | None,
    block: int | None,
    ahead: int | None,
) -> None:
    """Export a PyTorch model, and prove that the exported files say what it says.

    FACTORY is called without arguments and returns an nn.Module, or an nn.Module and its example inputs; MODULE may lie
    in the current folder.
    """
    with extra("export"):
        import carousel_export as cx  # noqa: PLC0415 -- needs the extra
        from carousel_cli.eager import InputSpec, draw_inputs, make_model  # noqa: PLC0415 -- needs the extra

    default = make_policy(cx, policy, block, ahead)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("carousel_export").setLevel(logging.INFO)
    specs = [InputSpec.parse(text) for text in inputs]
    model, example = make_model(factory, checkpoint)
    if specs:
        example = draw_inputs(specs, model)
    elif example is None:
        raise click.UsageError(f"{factory} gives no example inputs; say what the model takes with --input")
    try:
        bundle = cx.export(
            model,
            example,
            name=name,
            out=out,
            policy=default,
            version=version,
            input_names=[spec.name for spec in specs] or None,
            variants=variants,
            variant_error=variant_error,
            triton=triton,
            dims={spec.name: spec.dims for spec in specs} or None,
            links=dict(map(_link, links)),
        )
    except (cx.ExportError, BundleError) as error:
        raise click.ClickException(str(error)) from error
    console, proof = Console(markup=False, highlight=False), read_proof(bundle)
    console.print(proof_table(proof, "Parity with eager PyTorch"))
    if (measured := variants_table(proof)) is not None:
        console.print(measured)
    click.echo(f"bundle  {bundle.path}")
    click.echo(f"report  {bundle.file('report.html')}")
    if triton:
        click.echo(f"triton  {bundle.path.parent / 'config.pbtxt'}")


def _link(text: str) -> tuple[str, tuple[str, str]]:
    given, _, source = text.partition("=")
    model, _, output = source.partition(":")
    if not given or not model or not output:
        raise click.UsageError(f"--link {text!r} is not INPUT=MODEL:OUTPUT, such as memory=encoder:memory")
    return given, (model, output)
