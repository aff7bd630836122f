"""The models on disk and those that are served."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from carousel_protos import Bundle, BundleError, find_versions
from carousel_protos.v1.carousel_pb2 import ModelState
from carousel_server.config import ServerConfig
from carousel_server.engine.budget import Budget
from carousel_server.engine.golden import replay
from carousel_server.engine.model import Model
from carousel_server.engine.runtime import load_runtimes
from carousel_server.engine.session import Session
from carousel_server.errors import (
    CarouselError,
    LoadError,
    ModelDiffersError,
    ModelLoadingError,
    ModelNotFoundError,
    RetiredError,
    shorten,
)
from carousel_server.machine import Machine, choose

log = logging.getLogger("carousel")

# Models or versions that a message lists at most.
_NAMED = 10
# The states of versions that are served or are about to be, in the order in which they are taken where none is named.
_CHOSEN = (ModelState.MODEL_STATE_SERVING, ModelState.MODEL_STATE_LOADING, ModelState.MODEL_STATE_RETIRING)


@dataclass
class Entry:
    """A version of a model. `model` is there while it is served, also where it is retiring."""

    name: str
    version: str
    state: ModelState.ValueType = ModelState.MODEL_STATE_AVAILABLE
    reason: str = ""
    model: Model | None = None
    # Turning its steps.
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    # Where it is retiring: when its last sessions are ended, in Unix seconds, and who sees to it.
    deadline: float = 0.0
    retirement: asyncio.Task[None] | None = field(default=None, repr=False)
    # The operator wants it served no more: no session has it loaded again.
    unloaded: bool = False

    @property
    def takes_sessions(self) -> bool:
        """New ones."""
        return self.state == ModelState.MODEL_STATE_SERVING


class Catalogue:
    """What lies under the models folder, by name and version; versions in their order."""

    def __init__(self, config: ServerConfig, budget: Budget, *, on_closed: Callable[[Session], None]) -> None:
        self._config = config
        self._budget = budget
        self._on_closed = on_closed
        self._entries: dict[str, dict[str, Entry]] = {}
        # The folder was read once.
        self._looked = False
        # Where the operator sends the sessions of a version, by name and version.
        self._successors: dict[tuple[str, str], str] = {}
        # Told of every model's name whose states changed.
        self.on_change: Callable[[str], None] = lambda _: None

    @property
    def infer_rows(self) -> int:
        """Rows of Infer requests that wait for their answer, over all models."""
        return sum(entry.model.infer_rows for entry in self.entries() if entry.model is not None)

    def entries(self, name: str | None = None) -> list[Entry]:
        """All versions, or those of one model, as of the last `refresh`.

        Raises `ModelNotFoundError` for a name that is not there, `ModelLoadingError` before the first look.
        """
        if name is not None and name not in self._entries:
            if not self._looked:
                raise ModelLoadingError("this server looks for its models; try again", retry_after_s=1.0)
            known = list(self._entries)[:_NAMED]
            more = f" and {len(self._entries) - _NAMED} more" if len(self._entries) > _NAMED else ""
            raise ModelNotFoundError(
                f"there is no model {shorten(name)!r}; there is {', '.join(known) or 'none'}{more}", model=shorten(name)
            )
        names = self._entries if name is None else [name]
        return [entry for known in names for entry in self._entries.get(known, {}).values()]

    def entry(self, name: str, version: str = "") -> Entry:
        """One version; without a version the newest that takes sessions, or else will or did, or else the newest."""
        entries = self.entries(name)
        if not version:
            for state in _CHOSEN:
                if chosen := [entry for entry in entries if entry.state == state]:
                    return chosen[-1]
            return entries[-1]
        for entry in entries:
            if entry.version == version:
                return entry
        known = ", ".join(entry.version for entry in entries[-_NAMED:])
        raise ModelNotFoundError(f"model {name!r} has no version {shorten(version)!r}; it has {known}", model=name)

    def get(self, name: str, version: str = "") -> Model:
        """A model for something new. Raises `ModelNotFoundError`, `ModelLoadingError`, `RetiredError`."""
        entry = self.entry(name, version)
        if entry.model is not None and entry.takes_sessions:
            return entry.model
        if entry.model is not None:
            raise RetiredError(
                f"version {entry.version} of model {name!r} is retiring and takes nothing new; leave the version out",
                model=name,
                version=entry.version,
            )
        if entry.state == ModelState.MODEL_STATE_LOADING:
            raise ModelLoadingError(f"model {name!r} is loading; try again", model=name, retry_after_s=1.0)
        why = f" ({entry.reason})" if entry.reason else ""
        raise ModelNotFoundError(f"version {entry.version} of model {name!r} is not loaded{why}", model=name)

    def home(self, name: str, version: str) -> Model:
        """Where a session goes on that was on a version: there, or where the operator sends it.

        Raises `ModelLoadingError`, and `ModelDiffersError` where the model has changed under the session.
        """
        entry = self._lasting(name, version)
        if entry is not None and entry.model is not None:
            return entry.model
        if entry is not None and entry.state == ModelState.MODEL_STATE_LOADING:
            raise ModelLoadingError(
                f"version {entry.version} of model {name!r} is loading; try again", model=name, retry_after_s=1.0
            )
        if self._config.move_sessions:
            return self.get(name)
        served = [other.version for other in self._entries.get(name, {}).values() if other.takes_sessions]
        why = f" ({entry.reason})" if entry is not None and entry.reason else ""
        raise ModelDiffersError(
            f"the model has changed under the state: it is of version {version} of {name!r}, which is not served here"
            f"{why}, and {', '.join(served) or 'no other'} is; load that version, or unload it with the wish to move",
            model=name,
            expected_version=version,
        )

    async def prepare(self, name: str, version: str) -> None:
        """Have a version loaded for a session that comes back, where `home` has none for it and it is on disk.

        Raises what `home` and `load` raise.
        """
        entry = self._lasting(name, version)
        loadable = entry is not None and entry.state == ModelState.MODEL_STATE_AVAILABLE and not entry.unloaded
        if entry is not None and loadable and not self._config.move_sessions:
            await self.load(name, entry.version)
        self.home(name, version)

    def _lasting(self, name: str, version: str) -> Entry | None:
        """The version that a version's sessions go on with, as far as the operator has said; None: it is not there."""
        if name not in self._entries and not self._looked:
            self.entries(name)  # which raises
        versions, seen = self._entries.get(name, {}), set[str]()
        while version not in seen:
            seen.add(version)
            entry = versions.get(version)
            if entry is not None and entry.model is not None:
                return entry
            version = self._successors.get((name, version), version)
        return versions.get(version)

    def former(self, name: str, version: str) -> set[str]:
        """The versions whose sessions the operator has sent to this one, by way of others too."""
        found = {version}
        while more := {
            old for (model, old), new in self._successors.items() if model == name and new in found and old not in found
        }:
            found |= more
        return found - {version}

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
            kept |= {version: entry for version, entry in known.items() if entry.state in _CHOSEN}
            self._entries[name] = kept
        self._entries = {name: versions for name, versions in self._entries.items() if versions}

    async def load_newest(self) -> None:
        """Load the newest version of every model; one that fails is marked so and stops no other."""
        await self.refresh()
        self._looked = True
        newest = [self.entries(name)[-1] for name in self._entries]
        for entry in newest:  # what asks for it before its turn has to wait
            self._mark(entry, ModelState.MODEL_STATE_LOADING)
        for entry in newest:
            try:
                await self._load(entry)
            except LoadError as error:
                log.error("%s", error)

    async def load(self, name: str, version: str = "") -> Entry:
        """Load a version, the newest where none is named, and prove it; one that is retiring stays.

        Raises `ModelNotFoundError`, `ModelLoadingError`, `LoadError`.
        """
        await self.refresh()
        entry = self.entry(name, version) if version else self.entries(name)[-1]
        self._successors.pop((name, entry.version), None)
        entry.unloaded = False
        if entry.model is not None:
            self._stay(entry)
            return entry
        if entry.state == ModelState.MODEL_STATE_LOADING:
            raise ModelLoadingError(f"version {entry.version} of model {name!r} is loading already", retry_after_s=1.0)
        self._mark(entry, ModelState.MODEL_STATE_LOADING)
        await self._load(entry)
        return entry

    async def _load(self, entry: Entry) -> None:
        name = entry.name
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
        model = Model(
            bundle.manifest,
            runtimes,
            self._config,
            variant=self._config.variant,
            budget=self._budget,
            runners=plan.runners,
        )
        model.warm_up()
        model.on_closed = self._on_closed
        return model

    def retire(self, entry: Entry, deadline: float, *, successor: str | None = None) -> None:
        """A version takes no new sessions; `deadline`, in Unix seconds, is told. Its sessions go to `successor`."""
        self._stay(entry)
        entry.unloaded = True
        if successor is not None:
            self._successors[entry.name, entry.version] = successor
        if entry.model is not None:
            entry.deadline = deadline
            self._mark(entry, ModelState.MODEL_STATE_RETIRING)

    def _stay(self, entry: Entry) -> None:
        """A version that is retiring is not."""
        if entry.retirement is not None:
            entry.retirement.cancel()
            entry.retirement, entry.deadline = None, 0.0
            self._mark(entry, ModelState.MODEL_STATE_SERVING)

    async def withdraw(self, entry: Entry) -> None:
        """Serve a version no more. It is retiring, and has no sessions."""
        for model, task in self._withdraw([entry]):
            model.steps.end()  # once the requests that wait are answered
            await asyncio.wait([task])
            await asyncio.to_thread(model.steps.shut)

    async def shut(self) -> None:
        """End every model after its running step."""
        for entry in self.entries():
            if entry.retirement is not None:
                entry.retirement.cancel()
        for model, task in self._withdraw(self.entries()):
            task.cancel()
            await asyncio.wait([task])
            await asyncio.to_thread(model.steps.shut)

    def _withdraw(self, entries: list[Entry]) -> list[tuple[Model, asyncio.Task[None]]]:
        withdrawn = []
        for entry in entries:
            if entry.model is not None and entry.task is not None:
                withdrawn.append((entry.model, entry.task))
                entry.model = entry.task = entry.retirement = None
                entry.deadline = 0.0
                self._mark(entry, ModelState.MODEL_STATE_AVAILABLE)
        return withdrawn

    def _stopped(self, entry: Entry, task: asyncio.Task[None]) -> None:
        """Steps ended; if nobody asked them to, the model is served no more, and health says so."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s ended", task.get_name(), exc_info=error)
        if entry.retirement is not None:
            entry.retirement.cancel()
        entry.model = entry.retirement = None
        self._mark(entry, ModelState.MODEL_STATE_FAILED, f"its steps ended ({type(error).__name__}); load it again")

    def _mark(self, entry: Entry, state: ModelState.ValueType, reason: str = "") -> None:
        entry.state, entry.reason = state, reason
        self.on_change(entry.name)


def _look(models: Path) -> dict[str, list[str]]:
    """The versions of each model on disk."""
    folders = [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {folder.name: find_versions(folder) for folder in folders}
