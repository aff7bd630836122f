"""The server's settings: frozen, typed, checked once. The command line fills it in."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from carousel_server.access import Access
from carousel_server.errors import ConfigError

Device = Literal["cpu", "cuda"]
RuntimeKind = Literal["onnxruntime", "torchscript"]
Variant = Literal["float32", "float16", "int8"]
Durability = Literal["step", "drain"]
EventLoop = Literal["auto", "uvloop", "asyncio"]

# The library that each runtime needs, and the extra that has it.
_LIBRARIES: dict[RuntimeKind, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", "server"),
    "torchscript": ("torch", "export"),
}


# Chunks that every client may have under way, told or not: carousel.v1.Opened.window.
LEAST_WINDOW = 8


def require(kind: RuntimeKind) -> None:
    """Raise `ConfigError` where a runtime's library is not installed. Imports nothing."""
    library, extra = _LIBRARIES[kind]
    if find_spec(library) is None:
        raise ConfigError(f"--runtime {kind} needs {library}: in a checkout of Carousel, pip install '.[{extra}]'")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what clients may ask for. Raises `ConfigError` for one that is not positive."""

    max_sessions: int = 10_000
    # Bytes of one gRPC message, either way.
    max_message_bytes: int = 4 * 1024 * 1024
    # Frames of one chunk, or of one row of an Infer request.
    max_chunk_frames: int = 10_000
    # Frames that a session may hold that were not run yet: the whole sequence under `full`.
    max_buffered_frames: int = 100_000
    # Chunks of a session that wait for their answer, or whose answer its client has not acknowledged.
    max_pending_chunks: int = 64
    # Rows of Infer requests that wait for a step, over all requests to a model.
    max_pending_rows: int = 4_096
    # Bytes of frames that wait to be run, of their answers to be, and of answers to slow readers, over all clients;
    # one of them may have an eighth of what is left.
    max_pending_bytes: int = 1024**3
    # Bytes of context that the open sessions of one model may hold together.
    max_context_bytes: int = 1024**3
    # Rows of one step, and its frames with all padding, which bound how long it takes; a single row may have more.
    max_batch: int = 64
    max_step_frames: int = 1_024
    # Frames of a causal chunk that are run at once; a longer chunk takes several steps.
    max_block_frames: int = 128
    # Seconds after which a session that nobody uses is forgotten.
    idle_timeout_s: float = 600.0
    # Seconds after which it leaves memory, where there is a store to keep it until then.
    cold_after_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}: it must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Threading:
    """What may be asked of a machine; `carousel_server.machine` chooses what is left open. Raises `ConfigError`."""

    # Threads inside one model call; 0 leaves the choice to the server.
    threads: int = 0
    # Calls of a model that may overlap; 0 leaves the choice to the server.
    runners: int = 0
    # Whether those threads wait awake for the next call.
    spinning: bool = False
    loop: EventLoop = "auto"

    def __post_init__(self) -> None:
        for name in ("threads", "runners"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 0 or greater")
        if self.loop not in get_args(EventLoop):
            raise ConfigError(f"loop is {self.loop!r}: it must be one of {', '.join(get_args(EventLoop))}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Limits, Access, Threading):
    """`carousel serve`'s settings."""

    models: Path
    device: Device = "cpu"
    runtime: RuntimeKind = "onnxruntime"
    # What a session is run on that names none.
    variant: Variant = "float32"
    # Where sessions are kept beyond this process: see `store.open_store`.
    store: str = "memory"
    # Whether each answer is in the store before it is told, or only sessions that leave memory are.
    durability: Durability = "step"
    # Seconds that a commit is tried for before its sessions leave memory, and their clients have to resume them.
    store_patience_s: float = 20.0
    # Seconds that the sessions of a version are given to finish after it was unloaded.
    retire_timeout_s: float = 600.0
    # Whether a session of the store goes on with the newest version where its own is not served, or has that loaded.
    move_sessions: bool = False
    # Seconds that open sessions are given to finish after SIGTERM; with a store they need none.
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}: it must be 'cpu' or 'cuda'")
        for what, value, kinds in (
            ("runtime", self.runtime, RuntimeKind),
            ("variant", self.variant, Variant),
            ("durability", self.durability, Durability),
        ):
            if value not in get_args(kinds):
                raise ConfigError(f"{what} is {value!r}: it must be one of {', '.join(get_args(kinds))}")
        require(self.runtime)
        Threading.__post_init__(self)
        if min(self.drain_timeout_s, self.store_patience_s, self.retire_timeout_s) < 0:
            raise ConfigError("drain_timeout_s, store_patience_s and retire_timeout_s must be 0 or greater")
        for name in Limits.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        if self.max_pending_chunks < LEAST_WINDOW:
            raise ConfigError(
                f"max_pending_chunks is {self.max_pending_chunks}: it must be at least {LEAST_WINDOW}, which clients "
                "may send before they are told"
            )
        if not self.models.is_dir():
            raise ConfigError(
                f"there is no model folder {self.models}: give the folder that `carousel export --out` wrote to"
            )
        self.check_access()
