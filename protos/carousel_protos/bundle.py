"""A bundle: an exported model on disk, `<models>/<name>/<version>/`."""

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf import json_format

from carousel_protos.external import external_files
from carousel_protos.v1.manifest_pb2 import File, Graph, Manifest, PolicyKind

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class BundleError(Exception):
    """A bundle that cannot be read or written; the message says which and how to mend it."""


class Bundle:
    """A bundle that was opened: its folder and its manifest.

    Raises `BundleError` for a folder without a manifest, an unknown format, a manifest that lacks inputs, outputs,
    policies or a graph for one of them, a path that leaves the bundle, a file that is missing, and, with `check`, one
    whose sha256 is not the manifest's, and an ONNX file that reads one that the manifest does not list.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> Self:
        path = Path(path)
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
        except OSError as error:
            raise BundleError(
                f"no bundle at {path}: {MANIFEST} cannot be read ({error.strerror}); "
                "give the folder <models>/<name>/<version>"
            ) from error
        try:
            manifest = json_format.Parse(text, Manifest())
        except json_format.ParseError as error:
            raise BundleError(f"{path / MANIFEST} is not a manifest: {error}; export the model again") from error
        if manifest.format != FORMAT:
            raise BundleError(
                f"{path} has bundle format {manifest.format}, this version reads {FORMAT}; export the model again"
            )
        bundle = cls(path, manifest)
        for what, entries in (
            ("inputs", manifest.inputs),
            ("outputs", manifest.outputs),
            ("policies", manifest.policies),
            ("graphs", manifest.graphs),
        ):
            if not entries:
                raise BundleError(f"{path / MANIFEST} names no {what}; export the model again")
        for policy in manifest.policies:
            bundle.graph(policy.kind)
        for entry in manifest.files:
            file = bundle.file(entry.path)
            if check and sha256(file) != entry.sha256:
                raise BundleError(
                    f"{file} is not the file that was exported (its sha256 differs); export the model again"
                )
        if check:
            for graph in {graph.file for graph in manifest.graphs} - {manifest.torchscript}:
                bundle._check_external(bundle.file(graph))
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the manifest's files, which lies inside the bundle and is a plain file."""
        if name not in {entry.path for entry in self.manifest.files}:
            raise BundleError(f"{self.path} lists no file {name!r} in its manifest")
        path = self.path / name
        if Path(name).name != name or path.is_symlink():
            raise BundleError(f"{path}: a bundle's files lie in its own folder, and are no links")
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the model again")
        return path

    def _check_external(self, onnx: Path) -> None:
        """Other files than the bundle's own are refused before anything opens them."""
        try:
            locations = external_files(onnx)
        except ValueError as error:
            raise BundleError(f"{onnx} cannot be read: {error}; export the model again") from error
        for location in sorted(locations):
            try:
                self.file(location)
            except BundleError as error:
                raise BundleError(
                    f"{onnx} takes weights from {location[:200]!r}: only files of the bundle's own, listed in its "
                    f"manifest, are read; save the model with its weights inside"
                ) from error

    def graph(self, kind: PolicyKind.ValueType, variant: str = "float32") -> Graph:
        """The graph that computes a policy in a variant."""
        for graph in self.manifest.graphs:
            if kind in graph.policies and graph.variant == variant:
                return graph
        raise BundleError(f"{self.path} has no {variant} graph for {PolicyKind.Name(kind)}; export the model again")


class BundleWriter:
    """Writes a bundle into a temporary folder; `commit` renames it into its place, so none is ever half-written.

    Used as a context manager: left without `commit`, nothing stays, nor any folder that was made for it. Entered before
    the work, it finds out whether there is a place to write to. Raises `BundleError`.
    """

    def __init__(self, models: str | Path, name: str, version: str | None = None) -> None:
        for what, value in (("name", name), ("version", version or "1")):
            if not _NAME.fullmatch(value):
                raise BundleError(
                    f"{what} {value!r} is not allowed: letters, digits, '.', '_' and '-', a letter or digit first"
                )
        self.parent = Path(models) / name
        self.name = name
        if version is None:
            numbers = [int(known) for known in find_versions(self.parent) if known.isdecimal()]
            version = str(max(numbers, default=0) + 1)
        self.version = version
        self.target = self.parent / version
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            if self.target.exists():
                raise BundleError(f"{self.target} is there already; give another version, or remove it first")
            self._made = [folder for folder in (self.parent, *self.parent.parents) if not folder.exists()]
            self.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.parent))
        except OSError as error:
            self._remove_made()
            raise BundleError(
                f"{self.parent} cannot be written to ({error.strerror}); give a folder for models where you may write"
            ) from error
        return self

    def commit(self, manifest: Manifest) -> Bundle:
        """List every file written to `path` in the manifest, write it, and put the bundle in its place."""
        manifest.format, manifest.name, manifest.version = FORMAT, self.name, self.version
        self.list_files(manifest)
        text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, ensure_ascii=False)
        (self.path / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self.path.chmod(0o755)
        try:
            self.path.rename(self.target)
        except OSError as error:
            raise BundleError(
                f"{self.target} appeared while it was written ({error.strerror}); export again"
            ) from error
        return Bundle(self.target, manifest)

    def list_files(self, manifest: Manifest) -> None:
        """List the files that are written so far, in the place of those that were listed before."""
        del manifest.files[:]
        for file in sorted(self.path.iterdir()):
            manifest.files.append(File(path=file.name, sha256=sha256(file), bytes=file.stat().st_size))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        """Remove the folders that `__enter__` made, as far as they are empty."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or never made; nor are those above it


def find_versions(model: Path) -> list[str]:
    """The versions in a model's folder, oldest first: numbers by value, then other names by their text."""
    found = [path.parent.name for path in model.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
    return sorted(
        found, key=lambda version: (not version.isdecimal(), int(version) if version.isdecimal() else 0, version)
    )


def newest_version(model: Path) -> Path:
    """The folder of the newest version of a model."""
    if not (versions := find_versions(model)):
        raise BundleError(f"no bundle under {model}; export one with `carousel export --out {model.parent}`")
    return model / versions[-1]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
