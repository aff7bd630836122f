"""Models exported for real and served by a real process, and sequences of different length sent to them."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.client.process import serving
from torch import Tensor, nn

import carousel_client as cc
import carousel_export as cx

LENGTHS = (1, 2, 17, 9, 30)


@contextmanager
def served(folder: Path, models: Mapping[str, nn.Module], example: Tensor, **options: Any) -> Iterator[cc.Client]:
    """A client of a server that has the models, each exported from the same example."""
    for name, model in models.items():
        cx.export(model.eval(), example, name=name, out=folder, **options)
    with serving(folder) as server, cc.connect(server.address) as client:
        yield client


def infer_together(client: cc.Client, model: str, rows: Sequence[Tensor]) -> list[dict[str, np.ndarray]]:
    """Each row's answer from one request with all rows, padded with the last frame's values; one output is "output".

    The batch travels in the model's own order of axes.
    """
    longest = max(len(row) for row in rows)
    batch = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row), *row.shape[1:])]) for row in rows])
    manifest = client.model(model).manifest
    turned = np.moveaxis(batch.numpy(), 0, list(manifest.inputs[0].eager_dims).index("batch"))
    answer = client.infer(model, turned, lengths=[len(row) for row in rows])
    named = answer if isinstance(answer, dict) else {"output": answer}
    ports = {(port.name if isinstance(answer, dict) else "output"): port for port in manifest.outputs}
    named = {name: np.moveaxis(y, list(ports[name].eager_dims).index("batch"), 0) for name, y in named.items()}
    timed = {name: "time" in port.dims for name, port in ports.items()}
    return [
        {name: values[i, : len(row)] if timed[name] else values[i] for name, values in named.items()}
        for i, row in enumerate(rows)
    ]


def stream_together(
    client: cc.Client, model: str, rows: Sequence[Tensor], cut: int, policy: cc.Policy | None = None
) -> list[list[Any]]:
    """Each row's answers, chunk by chunk and last the flush's, from sessions that run at once, in chunks of `cut`."""

    def stream(row: Tensor) -> list[Any]:
        with client.session(model, policy=policy) as session:
            return list(session.stream([chunk.numpy() for chunk in torch.split(row, cut)]))

    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(stream, rows))


def assert_near(got: np.ndarray, wanted: Tensor) -> None:
    """Within the promise's 1e-5."""
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-5)
