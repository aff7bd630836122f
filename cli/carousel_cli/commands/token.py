"""`carousel token`."""

import click

from carousel_server.errors import ConfigError
from carousel_server.front.tokens import SCOPES, line, make_token


@click.command()
@click.argument("principal")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(sorted(SCOPES)),
    multiple=True,
    default=("infer",),
    show_default=True,
    help="What it may do; once for each: infer, or admin to load and unload models.",
)
def command(principal: str, scopes: tuple[str, ...]) -> None:
    """Make a token for PRINCIPAL, and print it, which nobody can do again.

    The token goes to standard output; to standard error goes the line that lets the server know it, which has no
    secret in it: carousel token anna >anna.token 2>>tokens.toml
    """
    token = make_token()
    try:
        entry = line(principal, scopes, token)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    click.echo(token)
    click.echo(f"# for carousel serve --tokens\n{entry}", err=True)
