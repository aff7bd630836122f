"""The config file: one TOML table for each subcommand, one key for each flag, and nothing else."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click


def flag_of(option: click.Option) -> str:
    """The long name of an option, without its dashes."""
    return next(name for name in option.opts if name.startswith("--"))[2:]


def options_of(command: click.Command) -> list[click.Option]:
    """The options of a command, and of its subcommands where it has some."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    if isinstance(command, click.Group):
        options += [option for below in command.commands.values() for option in options_of(below)]
    return options


@dataclass(frozen=True)
class Settings:
    """What a config file says: subcommand → parameter → value, as click's `default_map` takes it."""

    defaults: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str, commands: Mapping[str, click.Command | None]) -> Self:
        """Raises `click.UsageError`, naming the key, for anything that no subcommand has."""
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise click.UsageError(f"{path} cannot be read as TOML: {error}") from error
        defaults = {}
        for name, table in tables.items():
            command = commands.get(name)
            if command is None:
                raise click.UsageError(f"{path} has an unknown table [{name}]{_near(name, commands)}")
            if not isinstance(table, dict):
                raise click.UsageError(f"{path}: {name} must be a table, written [{name}]")
            values = _parameters(path, name, table, command)
            # What stands in a group's table is for each of its subcommands that has such a flag.
            defaults[name] = dict.fromkeys(command.commands, values) if isinstance(command, click.Group) else values
        return cls(defaults)


def _parameters(path: str, name: str, table: dict[str, Any], command: click.Command) -> dict[str, Any]:
    options = {flag_of(option): option for option in options_of(command)}
    values = {}
    for key, value in table.items():
        if key not in options:
            raise click.UsageError(f"{path} has an unknown key {key} in [{name}]{_near(key, options)}")
        option = options[key]
        if (wanted := _misfit(value, option)) is not None:
            raise click.UsageError(
                f"{path}: {key} in [{name}] is {'secret' if option.hide_input else repr(value)}; it must be {wanted}"
            )
        assert option.name is not None, "every option has a name"
        values[option.name] = value
    return values


def _misfit(value: object, option: click.Option) -> str | None:
    """What `value` should be instead, where it is of no kind that the option takes; click checks the rest."""
    if option.multiple:
        return None if isinstance(value, list) and all(isinstance(part, str) for part in value) else "a list of strings"
    if option.is_flag:
        return None if isinstance(value, bool) else "true or false"
    fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    return None if fits else "a string or a number"


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name.replace("_", "-").lower(), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
