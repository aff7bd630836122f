"""Sample data for `carousel tune`: sequences from .npy and .npz files. Needs torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carousel_cli.sources import load_arrays
from carousel_protos.v1.manifest_pb2 import Manifest

Array = NDArray[Any]


def read_samples(path: Path, manifest: Manifest, limit: int) -> list[tuple[Tensor, ...]]:
    """The sequences in a file, or in a folder's files, until they have `limit` frames; each a tensor an argument.

    An array is a sequence `[time, …]`, or a batch of them. An .npz file whose arrays are named as the model's arguments
    holds what belongs together; any other, for a model of one argument, holds sequences. Raises `click.ClickException`.
    """
    files = sorted(each for each in path.iterdir() if each.suffix in (".npy", ".npz")) if path.is_dir() else [path]
    timed = {spec.name for spec in manifest.inputs}
    samples: list[tuple[Tensor, ...]] = []
    frames = 0
    for file in files:
        for sample in _sequences(file, manifest):
            named = dict(zip(_given(manifest), sample, strict=True))
            length = next(len(x) for name, x in named.items() if name in timed)
            if frames + length > limit:
                named = {name: x[: limit - frames] if name in timed else x for name, x in named.items()}
            samples.append(tuple(torch.from_numpy(x.copy()) for x in named.values()))
            frames += length
            if frames >= limit:
                return samples
    if not samples:
        raise click.ClickException(f"{path} has no sequences; give an .npy or .npz file, or a folder of them")
    return samples


def _given(manifest: Manifest) -> list[str]:
    """The arguments that data has: not the lengths and states, which are the session's."""
    ports = {spec.name for spec in (*manifest.inputs, *manifest.contexts)}
    return [name for name in manifest.arguments if name in ports]


def _sequences(file: Path, manifest: Manifest) -> Iterator[tuple[Array, ...]]:
    names = _given(manifest)
    loaded = load_arrays(file)
    arrays = {names[0]: loaded} if isinstance(loaded, np.ndarray) else loaded
    if set(arrays) == set(names):
        groups = [arrays]
    elif len(names) == 1:
        groups = [{names[0]: array} for array in arrays.values()]
    else:
        raise click.ClickException(f"{file} has the arrays {', '.join(arrays)}; give {', '.join(names)}")
    for group in groups:
        yield from _rows(file, group, manifest)


def _rows(file: Path, group: Mapping[str, Array], manifest: Manifest) -> Iterator[tuple[Array, ...]]:
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.contexts)}
    batched = {group[name].ndim == len(specs[name].dims) for name in specs}
    if batched == {True}:
        if len({len(array) for array in group.values()}) != 1:
            raise click.ClickException(f"{file} has batches of different size; give each argument as many sequences")
        for row in zip(*(group[name] for name in _given(manifest)), strict=True):
            yield tuple(map(np.asarray, row))
    else:
        yield tuple(group[name] for name in _given(manifest))
