"""`carousel verify`."""

from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.common import extra, open_bundle
from carousel_cli.proof import proof_table
from carousel_protos import Bundle, BundleError


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run it.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "torchscript"]),
    default="onnxruntime",
    show_default=True,
    help="What runs it; torchscript needs torch.",
)
@click.option("--eager", metavar="MODULE:FACTORY", help="Prove it against this eager model, too; needs torch.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The state_dict for the eager model.",
)
def command(
    bundle: Path,
    device: Literal["cpu", "cuda"],
    runtime: Literal["onnxruntime", "torchscript"],
    eager: str | None,
    checkpoint: Path | None,
) -> None:
    """Check on this host that a bundle answers what eager PyTorch answered when it was exported.

    The checksums are verified and the golden vectors replayed through the server's engine, in every variant; torch is
    not needed, but for --runtime torchscript and --eager.
    """
    if checkpoint is not None and eager is None:
        raise click.UsageError("--checkpoint goes with --eager")
    console = Console(markup=False, highlight=False)
    opened = open_bundle(bundle)
    _replay(opened, device, runtime, console)
    if eager is not None:
        _prove(opened, eager, checkpoint, console)


def _replay(
    opened: Bundle,
    device: Literal["cpu", "cuda"],
    runtime: Literal["onnxruntime", "torchscript"],
    console: Console,
) -> None:
    with extra("server"):
        from carousel_server.errors import CarouselError  # noqa: PLC0415 -- needs the extra
        from carousel_server.verify import replay  # noqa: PLC0415 -- needs the extra

    try:
        replayed = replay(opened.path, device, runtime)
    except (CarouselError, BundleError) as error:
        raise click.ClickException(str(error)) from error
    table = Table(
        "variant",
        "policy",
        "output",
        title=f"{opened.path}: golden vectors on {device}, {runtime}",
        title_justify="left",
    )
    for heading in ("frames", "max |error|", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for case in replayed:
        figures = (f"{case.frames:,}", f"{case.max_abs_error:.2e}", f"{case.tolerance:.0e}")
        table.add_row(case.variant, case.policy, case.output, *figures, "ok" if case.ok else "OVER")
    console.print(table)
    if over := [case for case in replayed if not case.ok]:
        worst = max(over, key=lambda case: case.max_abs_error)
        raise click.ClickException(
            f"output {worst.output} under {worst.policy} in {worst.variant} is off by {worst.max_abs_error:.2e} here, "
            f"and {worst.tolerance:.0e} is allowed; export the model again with the versions that are installed here"
        )


def _prove(opened: Bundle, eager: str, checkpoint: Path | None, console: Console) -> None:
    with extra("export"):
        import carousel_export as cx  # noqa: PLC0415 -- needs the extra
        from carousel_cli.eager import make_model  # noqa: PLC0415 -- needs the extra

    model, _ = make_model(eager, checkpoint)
    try:
        proof = cx.parity(opened, model)
    except cx.ExportError as error:
        raise click.ClickException(str(error)) from error
    console.print(proof_table(proof, f"{opened.path}: parity with {eager}"))
