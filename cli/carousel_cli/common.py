"""What several subcommands share."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from carousel_protos import Bundle, BundleError, newest_version
from carousel_protos.v1.manifest_pb2 import Policy, PolicyKind

Command = TypeVar("Command", bound=Callable[..., Any])


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what the extra `name` provides in here: without it the command fails with the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("carousel"):
            raise  # our own mistake, which no extra mends
        raise click.ClickException(
            f"this command needs the extra {name}: in a checkout of Carousel, pip install '.[{name}]' "
            f"(there is no module {error.name})"
        ) from error


def open_bundle(path: Path) -> Bundle:
    """The bundle at `path`, or the newest version where `path` is a model's folder. Its files are checked."""
    try:
        if not (path / "manifest.json").exists() and any(path.glob("*/manifest.json")):
            path = newest_version(path)
        return Bundle.open(path)
    except BundleError as error:
        raise click.ClickException(str(error)) from error


def import_object(reference: str) -> Any:
    """The object that MODULE:NAME stands for; MODULE may lie in the current folder."""
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise click.UsageError(f"{reference!r} is not MODULE:FACTORY, such as mypackage.models:make_tagger")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise click.ClickException(f"cannot import {module_name}: {one_line(error)}") from error
    if not callable(found := getattr(module, name, None)):
        raise click.ClickException(f"{module_name} has no function {name}; give one that returns an nn.Module")
    return found


def policy_options(command: Command) -> Command:
    """The flags --policy, --block and --ahead."""
    kinds = click.Choice(["causal", "carry", "lookahead", "full"])
    for option in (
        click.option(
            "--ahead", type=click.IntRange(0), help="Frames after a block that the backward direction may see."
        ),
        click.option("--block", type=click.IntRange(1), help="Frames that the model is run on at once."),
        click.option("--policy", type=kinds, help="How blocks, frames ahead and state relate."),
    ):
        command = option(command)
    return command


def make_policy(room: Any, kind: str | None, block: int | None, ahead: int | None) -> Any:
    """The policy that the flags ask for, of `room`, which is `carousel_client` or `carousel_export`; None for none.

    Raises `click.UsageError` for a block or an ahead that the policy has no use for.
    """
    if block is not None and kind not in ("carry", "lookahead"):
        raise click.UsageError("--block goes with --policy carry or lookahead")
    if ahead is not None and kind != "lookahead":
        raise click.UsageError("--ahead goes with --policy lookahead")
    match kind:
        case "causal":
            return room.Causal()
        case "carry":
            return room.Carry(block)
        case "lookahead" if block is None or ahead is None:
            raise click.UsageError("--policy lookahead needs --block and --ahead")
        case "lookahead":
            return room.Lookahead(block, ahead)
        case "full":
            return room.Full()
    return None


def policy_text(policy: Policy) -> str:
    name = PolicyKind.Name(policy.kind).removeprefix("POLICY_KIND_").lower()
    if policy.kind == PolicyKind.POLICY_KIND_LOOKAHEAD:
        return f"{name}({policy.block}, {policy.ahead})"
    return f"{name}({policy.block})" if policy.block else name


def one_line(error: BaseException) -> str:
    """What a foreign exception says, as one line that is not too long."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
