"""`carousel doctor`."""

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.common import extra, open_bundle
from carousel_protos import BundleError
from carousel_server.config import EventLoop, Threading
from carousel_server.errors import CarouselError, ConfigError
from carousel_server.machine import Machine, choose

if TYPE_CHECKING:
    from carousel_server.trial import Trial


@click.command()
@click.option("--threads", type=int, default=0, show_default=True, help="As carousel serve has it.")
@click.option("--runners", type=int, default=0, show_default=True, help="As carousel serve has it.")
@click.option("--spinning/--no-spinning", default=False, show_default=True, help="As carousel serve has it.")
@click.option("--loop", type=click.Choice(get_args(EventLoop)), default="auto", show_default=True, help="As serve's.")
@click.option(
    "--measure",
    metavar="BUNDLE",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure the choices of threads on this bundle, which takes a few seconds.",
)
def command(threads: int, runners: int, spinning: bool, loop: EventLoop, measure: Path | None) -> None:
    """Say what this machine is, and what `carousel serve` makes of it and why."""
    with extra("server"):
        from carousel_server.engine.onnx_runtime import about  # noqa: PLC0415 -- needs the extra
        from carousel_server.trial import measure as try_out  # noqa: PLC0415 -- needs the extra
    try:
        asked = Threading(threads=threads, runners=runners, spinning=spinning, loop=loop)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    console = Console(markup=False, highlight=False)
    machine = Machine.look()
    facts = _facts(machine) | about()
    for name, value in facts.items():
        console.print(f"{name:<12} {value}", soft_wrap=True)
    plan = choose(machine, asked)
    table = Table(title="carousel serve here", title_justify="left")
    for column in ("what", "choice", "why", "overridden by"):
        table.add_column(column)
    for choice in plan.choices:
        table.add_row(choice.name, choice.value, choice.why, choice.flag)
    console.print(table)
    if measure is not None:
        opened = open_bundle(measure)
        try:
            trial = try_out(opened, most=machine.usable)
        except (BundleError, CarouselError) as error:
            raise click.ClickException(str(error)) from error
        _show(console, opened.manifest.name, trial)


def _facts(machine: Machine) -> dict[str, str]:
    quota = "no quota" if machine.quota is None else f"a quota of {machine.quota:g}"
    limit = "no limit" if machine.memory_limit is None else f"a limit of {_gib(machine.memory_limit)}"
    return {
        "processor": machine.processor,
        "cores": f"{machine.cores}, {quota} from the control group",
        "memory": f"{_gib(machine.memory)}, {limit} from the control group",
        "GPU": _gpus(),
    }


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _gpus() -> str:
    """What the driver's own tool says; nothing of Carousel's needs it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "none (there is no nvidia-smi)"
    said = subprocess.run(  # noqa: S603 -- the driver's tool, as the path finds it
        [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return "; ".join(said.stdout.split("\n")).strip("; ") or f"none (nvidia-smi: {said.stderr.strip()[:200]})"


def _show(console: Console, name: str, trial: "Trial") -> None:
    table = Table(title=f"{name}, measured", title_justify="left")
    for column in ("threads", "calls at once", "spinning", "rows", "load", "rows/s", "CPU µs/row", "p50 ms"):
        table.add_column(column, justify="left" if column in ("spinning", "load") else "right")
    for one in trial.tried:
        load = "a call each 20 ms" if one.idle else "full"
        numbers = (f"{one.rows_per_s:,.0f}", f"{one.cpu_us_per_row:.0f}", f"{one.p50_ms:.2f}")
        spinning = "on" if one.spinning else "off"
        table.add_row(f"{one.threads}", f"{one.runners}", spinning, f"{one.rows}", load, *numbers)
    console.print(table)
    spinning = "--spinning" if trial.spinning else "--no-spinning"
    console.print(f"recommended: --threads {trial.threads} {spinning} ({trial.why})", soft_wrap=True)
