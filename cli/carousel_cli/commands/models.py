"""`carousel models`: what a running server has, loaded and unloaded under its sessions."""

import json
import time

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.server_options import ServerOptions, calling, server_options
from carousel_protos.v1.carousel_pb2 import ModelState, ModelStatus


@click.group()
def command() -> None:
    """List, load and unload models of a running server, without disturbing what it serves.

    Loading and unloading need the scope admin where the server asks who calls.
    """


@command.command("list")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object for each version.")
def list_models(server: ServerOptions, *, as_json: bool) -> None:
    """Show every model and version that the server has, loaded or not."""
    with calling(server) as client:
        models = client.models()
    if as_json:
        click.echo(json.dumps([_fields(model) for model in models], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "version", "state"):
        table.add_column(heading)
    table.add_column("sessions", justify="right")
    table.add_column("note")
    for model in models:
        table.add_row(model.name, model.version, _state(model), f"{model.open_sessions}", _note(model))
    Console(markup=False, highlight=False, soft_wrap=True).print(table)


@command.command("load")
@click.argument("model")
@click.option("--version", default="", help="Without it, the newest on the server's disk.")
@server_options
def load_model(model: str, version: str, server: ServerOptions) -> None:
    """Load a version from the server's disk and prove it; then it serves new sessions, where it is the newest.

    A version that is retiring stays.
    """
    with calling(server) as client:
        status = client.load(model, version=version)
    click.echo(f"{status.name}/{status.version} is {_state(status)}")


@command.command("unload")
@click.argument("model")
@click.option("--version", default="", help="Without it, every version.")
@click.option(
    "--deadline",
    type=click.FloatRange(0, max_open=True),
    help="Seconds that its sessions are given; without it, the server's --retire-timeout.",
)
@click.option("--move", is_flag=True, help="Take its sessions to another version with the same tensors.")
@click.option("--to", "move_to", default="", help="With --move: that version; without it, the newest that is served.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@server_options
def unload_model(
    model: str,
    version: str,
    deadline: float | None,
    move_to: str,
    server: ServerOptions,
    *,
    move: bool,
    as_json: bool,
) -> None:
    """Retire a version: no new sessions, and an end once those on it have finished, moved, or had their time."""
    if move_to and not move:
        raise click.UsageError("--to goes with --move")
    with calling(server) as client:
        answer = client.unload(model, version=version, deadline=deadline, move=move, move_to=move_to)
    if as_json:
        staying = [{"session_id": each.session_id, "reason": each.reason} for each in answer.staying]
        models = [_fields(each) for each in answer.models]
        text = {
            "models": models,
            "moved": answer.moved,
            "staying_sessions": answer.staying_sessions,
            "staying": staying,
        }
        click.echo(json.dumps(text, indent=2))
        return
    for status in answer.models:
        note = _note(status)
        click.echo(f"{status.name}/{status.version} is {_state(status)}{': ' if note else ''}{note}")
    if move:
        click.echo(f"sessions moved: {answer.moved}, staying: {answer.staying_sessions}")
    for each in answer.staying:
        click.echo(f"{each.session_id} stays: {each.reason}")


def _state(model: ModelStatus) -> str:
    return ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()


def _note(model: ModelStatus) -> str:
    if model.state != ModelState.MODEL_STATE_RETIRING:
        return model.reason
    left_s = max(0.0, model.deadline_unix_ms / 1000 - time.time())
    return f"{model.open_sessions} sessions have {left_s:.0f} s to finish"


def _fields(model: ModelStatus) -> dict[str, object]:
    return {
        "model": model.name,
        "version": model.version,
        "state": _state(model),
        "sessions": model.open_sessions,
        "reason": model.reason,
        "deadline_unix_ms": model.deadline_unix_ms or None,
    }
