"""`carousel serve`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from carousel_cli.common import extra
from carousel_server.config import Durability, EventLoop, RuntimeKind, ServerConfig, Variant
from carousel_server.errors import CarouselError, ConfigError

_FIELDS = ServerConfig.__dataclass_fields__


def _option(flag: str, field: str, help: str, kind: Any = None) -> Callable[[Any], Any]:  # noqa: A002 -- click's word
    default = _FIELDS[field].default
    return click.option(flag, field, type=kind or type(default), default=default, show_default=default != "", help=help)


def _file(flag: str, field: str, help: str) -> Callable[[Any], Any]:  # noqa: A002 -- click's word
    return click.option(flag, field, type=click.Path(dir_okay=False, path_type=Path), help=help)


@click.command()
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="The folder with bundles, <models>/<name>/<version>; the newest version of each model is served.",
)
@_option("--listen", "listen", "HOST:PORT; port 0 takes any that is free.")
@_option("--admin", "admin", "HOST:PORT for loading and unloading models, which --listen then refuses.")
@_file("--tls-cert", "tls_cert", "PEM: the server's certificate; read again when it changes.")
@_file("--tls-key", "tls_key", "PEM: its key.")
@_file("--tls-client-ca", "tls_client_ca", "PEM: clients have to show a certificate of these authorities.")
@_file("--tokens", "tokens", "TOML: who may call what, a line of `carousel token` each; read again when it changes.")
@click.option("--insecure", is_flag=True, help="Listen for other machines without TLS, or for whoever calls.")
@_option("--device", "device", "Where the models run.", click.Choice(["cpu", "cuda"]))
@_option("--runtime", "runtime", "What runs them; torchscript needs torch.", click.Choice(get_args(RuntimeKind)))
@_option("--variant", "variant", "What a session is run on that names none.", click.Choice(get_args(Variant)))
@_option("--threads", "threads", "Threads inside one model call; 0: see carousel doctor.")
@_option("--runners", "runners", "Calls of a model that may overlap; 0: see carousel doctor.")
@click.option("--spinning/--no-spinning", default=False, show_default=True, help="Whether those threads wait awake.")
@_option("--loop", "loop", "The event loop.", click.Choice(get_args(EventLoop)))
@_option("--max-batch", "max_batch", "Sessions in one model call.")
@_option("--max-step-frames", "max_step_frames", "Frames of all rows of one model call, which bound how long it takes.")
@_option("--max-sessions", "max_sessions", "Open sessions.")
@_option("--max-message-bytes", "max_message_bytes", "Bytes of one message.")
@_option("--max-chunk-frames", "max_chunk_frames", "Frames of one chunk, or of a row of an infer call.")
@_option("--max-buffered-frames", "max_buffered_frames", "Frames of a session that were not run yet.")
@_option("--max-block-frames", "max_block_frames", "Frames of a causal chunk that are run at once.")
@_option("--max-context-bytes", "max_context_bytes", "Bytes of context that a model's sessions hold together.")
@_option("--max-pending-chunks", "max_pending_chunks", "Chunks of a session that are not acknowledged; at least 8.")
@_option("--max-pending-rows", "max_pending_rows", "Rows of infer calls that wait for a model.")
@_option("--max-pending-bytes", "max_pending_bytes", "Bytes of all frames and answers that wait.")
@_option("--store", "store", "Where sessions outlive the server: sqlite:FILE, redis://HOST:PORT; memory: nowhere.")
@_option(
    "--durability",
    "durability",
    "When: each step, or as a session leaves memory.",
    click.Choice(get_args(Durability)),
)
@_option("--store-patience", "store_patience_s", "Seconds that a store which fails is waited for.")
@_option("--cold-after", "cold_after_s", "Seconds after which an unused session is in the store alone.")
@_option("--idle-timeout", "idle_timeout_s", "Seconds after which an unused session is forgotten.")
@_option("--retire-timeout", "retire_timeout_s", "Seconds that the sessions of a version have after it was unloaded.")
@click.option(
    "--move-sessions/--no-move-sessions",
    default=False,
    show_default=True,
    help="Sessions in the store whose version is not loaded go to the newest; or else theirs is loaded for them.",
)
@_option("--drain-timeout", "drain_timeout_s", "Seconds that open sessions are given to finish after SIGTERM.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
def command(log_level: str, **settings: Any) -> None:
    """Serve every bundle in a folder over gRPC, until SIGTERM or Ctrl-C."""
    with extra("server"):
        from carousel_server.serve import run  # noqa: PLC0415 -- needs the extra

    try:
        config = ServerConfig(**settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    try:
        run(config)
    except CarouselError as error:
        raise click.ClickException(str(error)) from error
