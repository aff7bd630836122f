"""What `carousel stream` sends: frames from a file, or from standard input as they arrive."""

import math
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import DataType, Manifest

Array = NDArray[Any]
# Bytes asked of a pipe at once; it gives what it has.
_READ = 1 << 20
_STANDARD_INPUT = "standard input"


class SourceError(click.ClickException):
    """The input cannot be read; the message is one line."""


class Source(Protocol):
    """An iterable of chunks, as `Session.stream` takes them.

    `total` is the number of frames where it is known beforehand, `sent` those that were taken so far.
    """

    total: int | None
    sent: int

    def __iter__(self) -> Iterator[Any]: ...


@contextmanager
def open_source(name: str, manifest: Manifest, chunk: int) -> Iterator[Source]:
    """The input called `name`, in chunks of at most `chunk` frames. Raises `SourceError`."""
    if name == "-":
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
            yield _open_pipe(Pipe(raw), manifest, chunk)
        return
    loaded = load_arrays(Path(name))
    if isinstance(loaded, np.ndarray):
        if len(manifest.inputs) > 1:
            names = ", ".join(spec.name for spec in manifest.inputs)
            raise SourceError(f"{manifest.name} has several inputs; give an .npz file with the arrays {names}")
        loaded = {manifest.inputs[0].name: loaded}
    yield Arrays(name, loaded, chunk)


def load_arrays(path: Path) -> Array | dict[str, Array]:
    """An .npy file's array, mapped from the disk, or an .npz file's by name. Raises `SourceError`."""
    way = "give numbers saved with numpy.save or numpy.savez"
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            arrays = {key: loaded[key] for key in loaded.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        # NumPy's own advice on pickles is to allow them.
        pickled = "pickle" in str(error) or "Python objects" in str(error)
        why = "it is neither, or holds pickled objects" if pickled else error
        raise SourceError(f"{path} cannot be read as .npy or .npz: {why}; {way}") from error
    if others := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise SourceError(f"{path} is a zip file, and no .npz: {others[0]!r} in it is no array; {way}")
    return arrays


def _no_frames(where: str) -> SourceError:
    return SourceError(f"{where} has no frames; give at least one")


def read_context(texts: Sequence[str]) -> dict[str, Array]:
    """Arrays by name, from NAME=FILE.npy. Raises `SourceError`."""
    context: dict[str, Array] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not file:
            raise SourceError(f"--context {text!r} is not NAME=FILE.npy")
        loaded = load_arrays(Path(file))
        if not isinstance(loaded, np.ndarray):
            raise SourceError(f"--context {text!r} is not one array; give each in an .npy file of its own")
        context[name] = loaded
    return context


class Arrays:
    """Whole arrays, `[frames, …]` by input name."""

    def __init__(self, where: str, arrays: dict[str, Array], chunk: int) -> None:
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if not any(lengths.values()):
            raise _no_frames(where)
        if len(set(lengths.values())) != 1:
            raise SourceError(f"the arrays of {where} have {lengths} frames; give the same number of each")
        self.total: int | None = next(iter(lengths.values()))
        self.sent = 0
        self._arrays = arrays
        self._chunk = chunk

    def __iter__(self) -> Iterator[dict[str, Array]]:
        assert self.total is not None, "an array has a length"
        for start in range(0, self.total, self._chunk):
            chunk = {name: array[start : start + self._chunk] for name, array in self._arrays.items()}
            self.sent = min(start + self._chunk, self.total)
            yield chunk


class Pipe:
    """Standard input, as bytes when they arrive.

    Unbuffered: a thread that waits in a buffered read holds a lock that the interpreter wants when it ends.
    """

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self._held = b""

    def first(self) -> bytes:
        """The first byte, which stays; nothing at the end."""
        self._held = self._held or self._raw.read(_READ)
        return self._held[:1]

    def read(self, size: int = 0, /) -> bytes:
        """`size` bytes, fewer only at the end; as `numpy.lib.format` wants it."""
        while len(self._held) < size and (came := self._raw.read(_READ)):
            self._held += came
        part, self._held = self._held[:size], self._held[size:]
        return part

    def read_some(self) -> bytes:
        """What has arrived, and at least a byte of it; nothing at the end."""
        part, self._held = self._held or self._raw.read(_READ), b""
        return part


def _open_pipe(pipe: Pipe, manifest: Manifest, chunk: int) -> Source:
    if len(manifest.inputs) > 1:
        raise SourceError(f"{manifest.name} has several inputs, and standard input carries one; give an .npz file")
    # The first byte of an .npy file begins no text.
    if pipe.first() == npy.MAGIC_PREFIX[:1]:
        return PipedArray(pipe, chunk)
    return PipedLines(pipe, manifest, chunk)


class PipedArray:
    """An .npy file on a pipe."""

    def __init__(self, pipe: Pipe, chunk: int) -> None:
        try:
            version = npy.read_magic(pipe)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(pipe)
        except (ValueError, KeyError) as error:
            raise SourceError(
                f"{_STANDARD_INPUT} begins like an .npy file and is none that can be read: {error}"
            ) from error
        if shape[:1] == (0,):
            raise _no_frames(_STANDARD_INPUT)
        if dtype.hasobject or not shape or 0 in shape or (fortran and len(shape) > 1):
            raise SourceError(
                f"{_STANDARD_INPUT} holds an .npy file without axes or values, of objects, or in Fortran order; "
                "save numpy.ascontiguousarray(x) of numbers, [frames, …]"
            )
        self.total: int | None = shape[0]
        self.sent = 0
        self._frame = shape[1:]
        self._dtype = dtype
        self._pipe = pipe
        self._chunk = chunk

    def __iter__(self) -> Iterator[Array]:
        assert self.total is not None, "the header says it"
        size = self._dtype.itemsize * int(np.prod(self._frame))
        held = b""
        while self.sent < self.total:
            if not (came := self._pipe.read_some()):
                raise SourceError(f"{_STANDARD_INPUT} ended after {self.sent} of {self.total} frames")
            held += came
            whole = min(len(held) // size, self.total - self.sent)
            frames = np.frombuffer(held, self._dtype, whole * size // self._dtype.itemsize).reshape(whole, *self._frame)
            held = held[whole * size :]
            for start in range(0, whole, self._chunk):
                part = frames[start : start + self._chunk]
                self.sent += len(part)
                yield part


class PipedLines:
    """Lines of numbers on a pipe, with blanks or commas between them; a line is a frame, empty ones are passed over."""

    def __init__(self, pipe: Pipe, manifest: Manifest, chunk: int) -> None:
        spec = manifest.inputs[0]
        self.total: int | None = None
        self.sent = 0
        self._dtype = np.dtype(DataType.Name(spec.dtype).removeprefix("DATA_TYPE_").lower())
        self._frame = tuple(int(dim) for dim in spec.dims if dim not in ("batch", "time"))
        self._pipe = pipe
        self._chunk = chunk
        self._line = 0

    def __iter__(self) -> Iterator[Array]:
        held = b""
        while came := self._pipe.read_some():
            *lines, held = (held + came).split(b"\n")
            yield from self._chunks(lines)
        yield from self._chunks([held])
        if not self.sent:
            raise _no_frames(_STANDARD_INPUT)

    def _chunks(self, lines: list[bytes]) -> Iterator[Array]:
        frames = [frame for line in lines if (frame := self._parse(line)) is not None]
        for start in range(0, len(frames), self._chunk):
            part = np.stack(frames[start : start + self._chunk])
            self.sent += len(part)
            yield part

    def _parse(self, line: bytes) -> Array | None:
        self._line += 1
        words = line.decode(errors="replace").replace(",", " ").split()
        if not words:
            return None
        number = int if self._dtype.kind in "biu" else float
        size = math.prod(self._frame)
        wanted = f"line {self._line} of {_STANDARD_INPUT} is not {size} numbers of {self._dtype.name}"
        if len(words) != size:
            raise SourceError(f"{wanted}, it has {len(words)}; write a frame on each line")
        try:
            return np.array([number(word) for word in words], self._dtype).reshape(self._frame)
        except (ValueError, OverflowError) as error:
            raise SourceError(f"{wanted}: {error}") from error
