"""What `carousel stream` gets back: kept for a file, or printed as labels."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Manifest

Array = NDArray[Any]


class Answers:
    """Collects what `Session.stream` yields. Arrays are kept only where they are to be written.

    Raises `click.UsageError` where the model cannot do what was asked: no labels, several outputs for one .npy file;
    and `click.ClickException` for a file that cannot be written, before anything is streamed.
    """

    def __init__(self, manifest: Manifest, output: Path | None, *, labels: bool) -> None:
        self._outputs = manifest.outputs
        self._output = output
        self._labels = {name: manifest.labels[name].values for name in manifest.labels} if labels else {}
        if labels and not self._labels:
            raise click.UsageError(f"{manifest.name} has no labels; leave out --labels")
        if output is not None and output.suffix == ".npy" and len(manifest.outputs) > 1:
            raise click.UsageError(f"{manifest.name} has several outputs; give --output an .npz file")
        if output is not None:
            _try(output)
        self._kept: dict[str, list[Array]] = {spec.name: [] for spec in manifest.outputs}
        # Of an output with one value for the sequence, the value so far.
        self._last: dict[str, Array | None] = {}
        self._frames: dict[str, int] = {spec.name: 0 for spec in manifest.outputs if "time" in spec.dims}

    def add(self, answer: Any) -> None:
        arrays: dict[str, Array | None] = answer if isinstance(answer, dict) else {self._outputs[0].name: answer}
        for name, array in arrays.items():
            self._last[name] = array
            if name in self._frames and array is not None:
                self._frames[name] += len(array)
                if self._output is not None:
                    self._kept[name].append(array)
        per_frame = [self._named(name, arrays[name]) for name in self._labels if name in self._frames]
        for line in zip(*per_frame, strict=True):
            click.echo("\t".join(line))

    def write(self) -> None:
        """Print the labels of values for the whole sequence, and write the file."""
        for name in self._labels:
            if name not in self._frames and (value := self._last.get(name)) is not None:
                # One with a time of its own has a line for each entry.
                for line in self._named(name, value.reshape(-1, value.shape[-1])):
                    click.echo(line)
        if self._output is None:
            return
        arrays: dict[str, Any] = {name: self._whole(name) for name in self._kept}
        try:
            if self._output.suffix == ".npz":
                np.savez(self._output, **arrays)
            else:
                np.save(self._output, next(iter(arrays.values())))
        except OSError as error:
            raise _unwritable(self._output, error) from error

    @property
    def shapes(self) -> str:
        """Names, dtypes and shapes of what came."""
        return ", ".join(self._shape(name, array) for name, array in self._last.items() if array is not None)

    def _shape(self, name: str, array: Array) -> str:
        shape = [self._frames[name], *array.shape[1:]] if name in self._frames else [*array.shape]
        return f"{name} {array.dtype.name} {shape}"

    def _whole(self, name: str) -> Array:
        if name in self._frames:
            return np.concatenate(self._kept[name])
        value = self._last[name]
        assert value is not None, "a sequence that has ended has a value"
        return value

    def _named(self, name: str, array: Array | None) -> list[str]:
        """The most likely label of each row of `[frames, classes]`."""
        assert array is not None, "an output with a time axis is never absent"
        values = self._labels[name]
        return [values[best] for best in np.argmax(array, axis=-1).tolist()]


def _try(path: Path) -> None:
    """Raise `click.ClickException` for a file that cannot be written; what is there stays."""
    try:
        there = path.exists()
        path.open("ab").close()
    except OSError as error:
        raise _unwritable(path, error) from error
    if not there:
        path.unlink()


def _unwritable(path: Path, error: OSError) -> click.ClickException:
    return click.ClickException(
        f"{path} cannot be written ({error.strerror or error}); give --output a file in a folder that is there, and "
        "where you may write"
    )
