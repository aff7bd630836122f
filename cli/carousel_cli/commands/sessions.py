"""`carousel sessions`: what is open on a server, and states in and out of it."""

import json
import os
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from carousel_cli.common import policy_text
from carousel_cli.server_options import ServerOptions, calling, server_options
from carousel_protos.v1.carousel_pb2 import SessionInfo


@click.group()
def command() -> None:
    """List sessions of a running server, write one's state to a file, go on from a file, or end one.

    A file holds all that the session's next answers need: h and c, frames that wait, and the last answers.
    """


@command.command("list")
@server_options
@click.option("--model", default="", help="Of this model alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object for each session.")
def list_sessions(server: ServerOptions, model: str, *, as_json: bool) -> None:
    """Show the sessions that are one's own."""
    with calling(server) as client:
        sessions = client.sessions(model=model)
    if as_json:
        click.echo(json.dumps([_fields(session) for session in sessions], indent=2))
        return
    table = Table("session", "model", "policy", "variant")
    for heading in ("epoch", "next chunk", "idle s"):
        table.add_column(heading, justify="right")
    table.add_column("stream")
    for session in sessions:
        table.add_row(
            session.session_id,
            f"{session.model}/{session.version}",
            policy_text(session.policy),
            session.variant,
            f"{session.epoch}",
            f"{session.next_index}",
            f"{session.idle_s:.0f}",
            "attached" if session.attached else "none",
        )
    Console(markup=False, highlight=False, soft_wrap=True).print(table)


@command.command("export")
@click.argument("session_id", metavar="ID")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@server_options
def export_session(session_id: str, file: Path, server: ServerOptions) -> None:
    """Write a session's state to FILE, as of the chunk that was answered last; the session goes on."""
    with calling(server) as client:
        state = client.get_state(session_id)
    try:
        # A user's data: nobody else's to read.
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
            opened.write(state)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written ({error.strerror}); give another file") from error
    click.echo(f"wrote {len(state)} bytes to {file}")


@command.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--id", "session_id", default="", help="The new session's id; without it, the one in the file.")
@click.option("--version", default="", help="The model's version; without it, the one in the file.")
@click.option("--move", is_flag=True, help="Take it to a version with other weights and the same tensors.")
@server_options
def import_session(file: Path, session_id: str, version: str, server: ServerOptions, *, move: bool) -> None:
    """Open a session that goes on from FILE; a client takes it up with `resume`."""
    with calling(server) as client:
        session = client.put_state(file.read_bytes(), session_id=session_id, version=version, move=move)
    click.echo(
        f"session {session.session_id} of {session.model}/{session.version} under {policy_text(session.policy)} "
        f"expects chunk {session.next_index}"
    )


@command.command("drop")
@click.argument("session_id", metavar="ID")
@server_options
def drop_session(session_id: str, server: ServerOptions) -> None:
    """End a session, whoever holds it; what waits in it is forgotten."""
    with calling(server) as client:
        client.drop(session_id)
    click.echo(f"session {session_id} is closed")


def _fields(session: SessionInfo) -> dict[str, object]:
    return {
        "session_id": session.session_id,
        "model": session.model,
        "version": session.version,
        "variant": session.variant,
        "policy": policy_text(session.policy),
        "epoch": session.epoch,
        "next_index": session.next_index,
        "idle_s": round(session.idle_s, 3),
        "attached": session.attached,
    }
