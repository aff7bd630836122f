"""`carousel stream`."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import carousel_client as cc
from carousel_cli.answers import Answers
from carousel_cli.common import make_policy, policy_options
from carousel_cli.server_options import ServerOptions, server_options
from carousel_cli.sources import Source, open_source, read_context


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT.npy|.npz|-")
@server_options
@click.option("--version", default="", help="The model's version; without it, the newest that is served.")
@click.option("--variant", default="", help="float32, float16 or int8; without it, the server's choice.")
@click.option("--chunk", type=click.IntRange(1), default=64, show_default=True, help="Frames sent at once, at most.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the answers to this .npy or .npz file."
)
@click.option(
    "--labels", is_flag=True, help="Print the most likely label of each frame, a line for each, as they come."
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="What the model is given once for the session, such as memory=memory.npy; once for each of its contexts.",
)
@click.option(
    "--resume-timeout",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds that a server may be gone before the stream is given up; until then it goes on where it was.",
)
@policy_options
def command(
    model: str,
    source: str,
    server: ServerOptions,
    version: str,
    variant: str,
    chunk: int,
    output: Path | None,
    labels: bool,
    contexts: tuple[str, ...],
    resume_timeout: float,
    policy: str | None,
    block: int | None,
    ahead: int | None,
) -> None:
    """Stream one sequence through a model that is served.

    The input is [frames, …]: an .npy file, an .npz file with one array for each of the model's inputs, or "-" for
    standard input, which carries an .npy file or one line of numbers for each frame, and is sent on as it arrives.
    """
    asked = make_policy(cc, policy, block, ahead)
    if output is not None and output.suffix not in (".npy", ".npz"):
        raise click.UsageError(f"--output {output} is neither .npy nor .npz")
    try:
        given = read_context(contexts)
        with (
            server.connect(resume_timeout=resume_timeout) as client,
            client.session(model, version=version, variant=variant, policy=asked, context=given) as session,
        ):
            manifest = client.model(model, version=session.version).manifest
            answers = Answers(manifest, output, labels=labels)
            with open_source(source, manifest, chunk) as frames:
                seconds, chunks = _run(session, frames, answers)
            served = f"{model}/{session.version} {_policy_text(session.policy)}"
    except cc.CarouselError as error:
        raise click.ClickException(str(error)) from error
    answers.write()
    rate = frames.sent / seconds if seconds else 0.0
    click.echo(
        f"{served}: {frames.sent} frames in {chunks} chunks, {seconds:.2f} s ({rate:.0f} frames/s); {answers.shapes}",
        err=True,
    )


def _run(session: cc.Session, frames: Source, answers: Answers) -> tuple[float, int]:
    """Stream it all; the seconds that it took, and the chunks."""
    started, count = time.perf_counter(), 0
    with _progress() as progress:
        task = progress.add_task("streaming", total=frames.total)
        for count, answer in enumerate(session.stream(_counted(frames, progress, task))):  # noqa: B007 -- counted
            answers.add(answer)
    return time.perf_counter() - started, count


def _counted(frames: Source, progress: Progress, task: Any) -> Iterator[Any]:
    for chunk in frames:
        yield chunk
        progress.update(task, completed=frames.sent)


def _progress() -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _policy_text(policy: cc.Policy) -> str:
    match policy:
        case cc.Lookahead(block, ahead):
            return f"lookahead({block}, {ahead})"
        case cc.Carry(block) if block:
            return f"carry({block})"
    return type(policy).__name__.lower()
