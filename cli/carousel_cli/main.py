"""`carousel`: the group of subcommands, and where their settings come from: flag, then environment, then file."""

import importlib
import os

import click

from carousel_cli.settings import Settings, flag_of, options_of

COMMANDS = ("export", "import", "inspect", "verify", "serve", "models", "sessions", "stream", "token", "tune", "doctor")


class Carousel(click.Group):
    """Imports a subcommand's module when it is asked for, and gives each flag its variable `CAROUSEL_<FLAG>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- click's signature
        if cmd_name not in COMMANDS:
            return None
        module = "import_" if cmd_name == "import" else cmd_name  # Python has that word for itself
        command: click.Command = importlib.import_module(f"carousel_cli.commands.{module}").command
        for option in options_of(command):
            option.envvar = "CAROUSEL_" + flag_of(option).upper().replace("-", "_")
        return command


@click.group(cls=Carousel, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="carousel")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    envvar="CAROUSEL_CONFIG",
    show_envvar=True,
    help="A TOML file with a table for each subcommand and a key for each flag.",
)
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """PyTorch recurrent models, exported with proof and served over gRPC as stateful streams.

    Every flag of a subcommand can also be given as CAROUSEL_<FLAG> in the environment (--max-batch as
    CAROUSEL_MAX_BATCH), or in the config file. A flag goes before the environment, and that before the file.
    """
    # gRPC's core would write lines of its own to stderr beside ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if config is not None:
        assert isinstance(ctx.command, Carousel), "main is the group"
        commands = {name: ctx.command.get_command(ctx, name) for name in COMMANDS}
        ctx.default_map = Settings.read(config, commands).defaults
