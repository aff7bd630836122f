"""`carousel tune`."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from carousel_cli.common import extra, open_bundle
from carousel_protos import Bundle, BundleError


def _numbers(least: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """Reads whole numbers with commas between them."""

    def read(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
        words = value.split(",")
        if not all(word.strip().isdecimal() and int(word) >= least for word in words):
            raise click.BadParameter(f"{value!r} is not whole numbers from {least} on, such as 1,4,16", ctx, param)
        return tuple(int(word) for word in words)

    return read


@click.command()
@click.argument("target", metavar="BUNDLE|MODULE:FACTORY")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Sequences: an .npy or .npz file, or a folder of them.",
)
@click.option(
    "--agreement",
    type=click.FloatRange(0, 1),
    help="Frames that have to have the offline answer's largest element, as a share; 0.995 unless --rms is given.",
)
@click.option(
    "--rms", type=click.FloatRange(0), help="The largest root mean square difference, as a share of the answer's."
)
@click.option("--output", help="The output that is compared; without it, the first of floats.")
@click.option("--blocks", callback=_numbers(1), default="1,2,4,8,16,32", show_default=True, help="Blocks to try.")
@click.option(
    "--aheads", callback=_numbers(0), default="0,1,2,4,8,16,32", show_default=True, help="Frames ahead to try."
)
@click.option(
    "--max-cost", type=click.FloatRange(1), default=9.0, show_default=True, help="Try nothing that costs more."
)
@click.option(
    "--limit", type=click.IntRange(1), default=5000, show_default=True, help="Frames of the data to take, for time."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves into this .html or .svg file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The state_dict for MODULE:FACTORY, which has to give example inputs.",
)
def command(
    target: str,
    data: Path,
    agreement: float | None,
    rms: float | None,
    output: str | None,
    blocks: tuple[int, ...],
    aheads: tuple[int, ...],
    max_cost: float,
    limit: int,
    plot: Path | None,
    as_json: bool,
    checkpoint: Path | None,
) -> None:
    """Find the cheapest block and frames ahead with which a bidirectional model says on DATA what it says offline.

    Cost is how often each frame is run, (block + ahead) / block. The model's own graphs are run, in onnxruntime.
    """
    with extra("export"):
        import carousel_export as cx  # noqa: PLC0415 -- needs the extra
        from carousel_cli.samples import read_samples  # noqa: PLC0415 -- needs the extra

    if plot is not None and plot.suffix not in (".html", ".svg"):
        raise click.UsageError(f"--plot {plot} is neither .html nor .svg")
    if agreement is None and rms is None:
        agreement = 0.995
    console = Console(stderr=True)
    silent = not sys.stderr.isatty()
    with _bundle(target, checkpoint) as bundle, Progress(console=console, transient=True, disable=silent) as progress:
        samples = read_samples(data, bundle.manifest, limit)
        task = progress.add_task("settings", total=None)
        try:
            tuning = cx.tune(
                bundle,
                samples,
                agreement=agreement,
                rms=rms,
                output=output,
                blocks=blocks,
                aheads=aheads,
                max_cost=max_cost,
                told=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except cx.ExportError as error:
            raise click.ClickException(str(error)) from error
    if plot is not None:
        plot.write_text(tuning.html() if plot.suffix == ".html" else tuning.svg(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(_json(tuning)))
    else:
        Console(markup=False, highlight=False).print(_table(tuning))
    if tuning.best is None:
        raise click.ClickException(
            f"no setting reaches {tuning.wanted}; allow a higher --max-cost, more --blocks and --aheads, or use "
            "--policy full"
        )
    if not as_json:
        click.echo(f"cheapest for {tuning.wanted}: {_flags(tuning.best)}")


@contextmanager
def _bundle(target: str, checkpoint: Path | None) -> Iterator[Bundle]:
    """The bundle at a path, or one made of MODULE:FACTORY for this run alone."""
    if Path(target).exists():
        if checkpoint is not None:
            raise click.UsageError("--checkpoint goes with MODULE:FACTORY; a bundle has its weights")
        yield open_bundle(Path(target))
        return
    if ":" not in target:
        raise click.UsageError(f"there is no bundle {target}, and it is not MODULE:FACTORY")
    import carousel_export as cx  # noqa: PLC0415 -- needs the extra, which was checked
    from carousel_cli.eager import make_model  # noqa: PLC0415 -- needs the extra, which was checked

    model, example = make_model(target, checkpoint)
    if example is None:
        raise click.UsageError(f"{target} gives no example inputs; return them with the model, or export it first")
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = cx.export(model, example, name=target.rpartition(":")[2], out=folder)
        except (cx.ExportError, BundleError) as error:
            raise click.ClickException(str(error)) from error
        yield bundle


def _table(tuning: Any) -> Table:
    title = f"{tuning.points[0].output} against offline: {tuning.sequences} sequences, {tuning.frames:,} frames"
    table = Table("policy", title=title, title_justify="left")
    for heading in ("agreement", "rms difference", "max |difference|", "cost", "latency, frames"):
        table.add_column(heading, justify="right")
    for point in tuning.points:
        policy = point.policy
        ahead = getattr(policy, "ahead", None)
        name = f"carry({policy.block})" if ahead is None else f"lookahead({policy.block}, {ahead})"
        table.add_row(
            name,
            # Never rounded up to a 100 % that was not measured.
            f"{int(point.argmax_agreement * 1e4) / 100:.2f} %",
            f"{100 * point.rms_relative_difference:.2g} %",
            f"{point.max_abs_difference:.2g}",
            f"{point.cost:.2f}",
            str(point.latency_frames),
            style="bold" if point == tuning.best else None,
        )
    return table


def _json(tuning: Any) -> dict[str, Any]:
    return {
        "sequences": tuning.sequences,
        "frames": tuning.frames,
        "wanted": tuning.wanted,
        "best": None if tuning.best is None else {**tuning.best.json(), "flags": _flags(tuning.best)},
        "points": [point.json() for point in tuning.points],
    }


def _flags(point: Any) -> str:
    """The setting as `carousel export` and `carousel stream` take it."""
    return f"--policy lookahead --block {point.policy.block} --ahead {point.policy.ahead}"
