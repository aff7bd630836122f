"""`carousel import`."""

import logging
from pathlib import Path

import click
from rich.console import Console

from carousel_cli.common import extra, make_policy, policy_options
from carousel_cli.proof import proof_table, read_proof
from carousel_protos import BundleError


@click.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="The model's name.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder of all models."
)
@click.option("--version", help="The version; without it, the next number.")
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="IN=OUT",
    help="A state's input and the output that follows it; once for each that is not found by name, order or shape.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:DTYPE:DIMS",
    help="An input's axes where the file does not say them: x:float32:time,batch,80, or h:float32:2,batch,128.",
)
@click.option(
    "--constant", "constants", multiple=True, metavar="NAME=VALUE", help="An input that is always the same: sr=16000."
)
@click.option("--lengths", help="The input that has the valid frames of each row.")
@policy_options
def command(
    file: Path,
    name: str,
    out: Path,
    version: str | None,
    states: tuple[str, ...],
    inputs: tuple[str, ...],
    constants: tuple[str, ...],
    lengths: str | None,
    policy: str | None,
    block: int | None,
    ahead: int | None,
) -> None:
    """Make a bundle of an ONNX or TorchScript file that has its state as inputs and outputs, and prove it.

    The reference is the file itself, run whole and in blocks, as it came.
    """
    with extra("export"):
        import carousel_export as cx  # noqa: PLC0415 -- needs the extra
        from carousel_cli.eager import InputSpec  # noqa: PLC0415 -- needs the extra

    default = make_policy(cx, policy, block, ahead)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("carousel_export").setLevel(logging.INFO)
    specs = [InputSpec.parse(text) for text in inputs]
    try:
        bundle = cx.import_model(
            file,
            name=name,
            out=out,
            version=version,
            states=_pairs("--state", states),
            inputs={spec.name: (spec.dtype, spec.dims) for spec in specs},
            constants={key: _number(key, value) for key, value in _pairs("--constant", constants).items()},
            lengths=lengths,
            policy=default,
        )
    except (cx.ExportError, BundleError) as error:
        raise click.ClickException(str(error)) from error
    proof = read_proof(bundle)
    Console(markup=False, highlight=False).print(proof_table(proof, f"Parity with {proof['reference']}"))
    click.echo(f"bundle  {bundle.path}")
    click.echo(f"report  {bundle.file('report.html')}")


def _pairs(flag: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Raises `click.UsageError`."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise click.UsageError(f"{flag} {text!r} is not NAME={'OUT' if flag == '--state' else 'VALUE'}")
        pairs[key] = value
    return pairs


def _number(key: str, text: str) -> int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError as error:
        raise click.UsageError(f"--constant {key}={text} is no number, true or false") from error
