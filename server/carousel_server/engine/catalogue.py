"""The models on disk and those that are served."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from carousel_protos import Bundle, BundleError, find_versions
from carousel_protos.v1.carousel_pb2 import ModelState
from carousel_server.config import ServerConfig
from carousel_server.engine.golden import replay
from carousel_server.engine.model import Model
from carousel_server.engine.runtime import load_runtimes
from carousel_server.engine.session import Session
from carousel_server.errors import (
    CarouselError,
    LoadError,
    ModelLoadingError,
    ModelNotFoundError,
    SessionsOpenError,
    shorten,
)
from carousel_server.machine import Machine, choose

log = logging.getLogger("carousel")

# Models or versions that a message lists at most.
_NAMED = 10


@dataclass
class Entry:
    """A version of a model. `model` is there while it is served."""

    name: str
    version: str
    state: ModelState.ValueType = ModelState.MODEL_STATE_AVAILABLE
    reason: str = ""
    model: Model | None = None
    # Loading it, then turning its steps.
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Catalogue:
    """What lies under the models folder, by name and version; versions in their order."""

    def __init__(self, config: ServerConfig, *, on_closed: Callable[[Session], None]) -> None:
        self._config = config
        self._on_closed = on_closed
        self._entries: dict[str, dict[str, Entry]] = {}
        self._looked = self._done = False
        # Told of every model's name whose states changed.
        self.on_change: Callable[[str], None] = lambda _: None

    @property
    def infer_rows(self) -> int:
        """Rows of Infer requests that wait for their answer, over all models."""
        return sum(entry.model.infer_rows for entry in self.entries() if entry.model is not None)

    def entries(self, name: str = "") -> list[Entry]:
        """All versions, or those of one model, as of the last `refresh`.

        Raises `ModelNotFoundError` for a name that is not there.
        """
        if name and name not in self._entries:
            if not self._looked:
                raise ModelLoadingError("this server looks for its models; try again", retry_after_s=1.0)
            known = list(self._entries)[:_NAMED]
            more = f" and {len(self._entries) - _NAMED} more" if len(self._entries) > _NAMED else ""
            raise ModelNotFoundError(
                f"there is no model {shorten(name)!r}; there is {', '.join(known) or 'none'}{more}", model=shorten(name)
            )
        return [
            entry for known in ([name] if name else self._entries) for entry in self._entries.get(known, {}).values()
        ]

    def entry(self, name: str, version: str = "") -> Entry:
        """One version; without a version the newest that is served, or else the newest."""
        entries = self.entries(name)
        if not version:
            return ([entry for entry in entries if entry.model is not None] or entries)[-1]
        for entry in entries:
            if entry.version == version:
                return entry
        known = ", ".join(entry.version for entry in entries[-_NAMED:])
        raise ModelNotFoundError(f"model {name!r} has no version {shorten(version)!r}; it has {known}", model=name)

    def get(self, name: str, version: str = "") -> Model:
        """A model to be used. Raises `ModelNotFoundError`, `ModelLoadingError`."""
        entry = self.entry(name, version)
        if entry.model is not None:
            return entry.model
        if entry.state == ModelState.MODEL_STATE_LOADING or (not entry.reason and not self._done):
            raise ModelLoadingError(f"model {name!r} is loading; try again", model=name, retry_after_s=1.0)
        why = f" ({entry.reason})" if entry.reason else ""
        raise ModelNotFoundError(f"version {entry.version} of model {name!r} is not loaded{why}", model=name)

    async def refresh(self) -> None:
        """See what lies on disk now. A folder that cannot be read leaves all as it is known."""
        try:
            found = await asyncio.to_thread(_look, self._config.models)
        except OSError as error:
            log.warning("the model folder %s cannot be read: %s", self._config.models, error.strerror)
            return
        for name in sorted(found.keys() | self._entries.keys()):
            known = self._entries.get(name, {})
            kept = {version: known.get(version) or Entry(name, version) for version in found.get(name, ())}
            busy = (ModelState.MODEL_STATE_SERVING, ModelState.MODEL_STATE_LOADING)
            kept |= {version: entry for version, entry in known.items() if entry.state in busy}
            self._entries[name] = kept
        self._entries = {name: versions for name, versions in self._entries.items() if versions}

    async def load_newest(self) -> None:
        """Load the newest version of every model; one that fails is marked so and stops no other."""
        await self.refresh()
        self._looked = True
        for name in list(self._entries):
            entry = self.entries(name)[-1]
            try:
                await self.load(entry.name, entry.version)
            except LoadError as error:
                log.error("%s", error)
        self._done = True

    async def load(self, name: str, version: str = "") -> Entry:
        """Load a version, the newest where none is named, and prove it. Raises `ModelNotFoundError`, `LoadError`."""
        await self.refresh()
        entry = self.entry(name, version) if version else self.entries(name)[-1]
        if entry.model is not None:
            return entry
        if entry.state == ModelState.MODEL_STATE_LOADING:
            raise ModelLoadingError(f"version {entry.version} of model {name!r} is loading already", retry_after_s=1.0)
        self._mark(entry, ModelState.MODEL_STATE_LOADING)
        try:
            model = await asyncio.to_thread(self._build, self._config.models / name / entry.version)
        except Exception as error:  # a bundle can be wrong in any way, and stops no other
            known = isinstance(error, (BundleError, CarouselError))
            why = str(error) if known else f"loading failed ({type(error).__name__}: {error})"
            self._mark(entry, ModelState.MODEL_STATE_FAILED, why)
            raise LoadError(
                f"version {entry.version} of model {name!r} is not served: {why}", model=name, version=entry.version
            ) from error
        entry.model = model
        entry.task = asyncio.create_task(model.steps.turn_forever(), name=f"steps of {name}/{entry.version}")
        entry.task.add_done_callback(lambda task: self._stopped(entry, task))
        self._mark(entry, ModelState.MODEL_STATE_SERVING)
        log.info("serving %s version %s on %s", name, entry.version, self._config.device)
        return entry

    def _build(self, path: Path) -> Model:
        bundle = Bundle.open(path)
        # A bundle that was copied or renamed goes by its folder.
        bundle.manifest.name, bundle.manifest.version = path.parent.name, path.name
        plan = choose(Machine.look(), self._config)
        runtimes = load_runtimes(
            bundle,
            device=self._config.device,
            threads=plan.threads,
            spinning=plan.spinning,
            kind=self._config.runtime,
        )
        for checked in replay(bundle, runtimes):
            if not checked.ok:
                raise LoadError(
                    f"{checked.output!r} under {checked.policy} in {checked.variant} is {checked.max_abs_error:.3g} "
                    f"off the eager model's answers, {checked.tolerance:.3g} is allowed; run `carousel verify {path}`"
                )
        model = Model(bundle.manifest, runtimes, self._config, variant=self._config.variant)
        model.warm_up()
        model.on_closed = self._on_closed
        return model

    async def unload(self, name: str, version: str = "") -> list[Entry]:
        """Serve a version, or every version, no more. Raises `SessionsOpenError` where sessions are on it."""
        entries = [self.entry(name, version)] if version else self.entries(name)
        for entry in entries:
            if entry.model is not None and entry.model.open_sessions:
                raise SessionsOpenError(
                    f"{entry.model.open_sessions} sessions are on version {entry.version} of {name!r}; close them first"
                )
        # No await between this look and the last entry's withdrawal: nobody opens a session in between.
        for model, task in self._withdraw(entries):
            model.steps.end()  # once the requests that wait are answered
            await asyncio.wait([task])
            await asyncio.to_thread(model.steps.shut)
        return entries

    async def shut(self) -> None:
        """End every model after its running step."""
        for model, task in self._withdraw(self.entries()):
            task.cancel()
            await asyncio.wait([task])
            await asyncio.to_thread(model.steps.shut)

    def _withdraw(self, entries: list[Entry]) -> list[tuple[Model, asyncio.Task[None]]]:
        withdrawn = []
        for entry in entries:
            if entry.model is not None and entry.task is not None:
                withdrawn.append((entry.model, entry.task))
                entry.model = entry.task = None
                self._mark(entry, ModelState.MODEL_STATE_AVAILABLE)
        return withdrawn

    def _stopped(self, entry: Entry, task: asyncio.Task[None]) -> None:
        """Steps ended; if nobody asked them to, the model is served no more, and health says so."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s ended", task.get_name(), exc_info=error)
        entry.model = None
        self._mark(entry, ModelState.MODEL_STATE_FAILED, f"its steps ended ({type(error).__name__}); load it again")

    def _mark(self, entry: Entry, state: ModelState.ValueType, reason: str = "") -> None:
        entry.state, entry.reason = state, reason
        self.on_change(entry.name)


def _look(models: Path) -> dict[str, list[str]]:
    """The versions of each model on disk."""
    folders = [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {folder.name: find_versions(folder) for folder in folders}
