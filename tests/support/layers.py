"""One recurrent layer and a linear one, served: what a client is answered, against the eager module's own calls."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tests.parity.oracle import Net, carried, looked_ahead_stream
from tests.support.served import LENGTHS, assert_near, infer_together, served

import carousel_client as cc


@contextmanager
def served_layers(folder: Path, nets: Mapping[str, Net]) -> Iterator[cc.Client]:
    """The nets, exported from an example `[3, 4, 5]` and served."""
    with served(folder, nets, torch.randn(3, 4, 5)) as client:
        yield client


def check_layer(client: cc.Client, name: str, net: Net) -> None:
    """Whole sequences in a ragged batch; carry from a random state; lookahead, or for a causal layer any cut at all."""
    torch.manual_seed(1)
    batch = net.rnn.batch_first
    rows = [torch.randn(length, 5) for length in LENGTHS]
    with torch.no_grad():
        for row, answer in zip(rows, infer_together(client, name, rows), strict=True):
            wanted = net(row[None] if batch else row[:, None])
            assert_near(answer["output"], wanted[0] if batch else wanted[:, 0])
    specs = client.model(name).manifest.states
    initial = {spec.input: torch.rand(*(int(dim) for dim in spec.dims[1:])) * 2 - 1 for spec in specs}
    x = rows[-1]
    wanted, _ = carried(net, x, tuple(initial.values()), [4] * 7 + [2])
    assert_near(_stream(client, name, x, cc.Carry(4), initial), wanted)
    zeros = tuple(torch.zeros_like(state) for state in initial.values())
    if net.rnn.bidirectional:
        assert_near(_stream(client, name, x, cc.Lookahead(3, 2)), looked_ahead_stream(net, x, zeros, 3, 2))
    else:
        assert_near(_stream(client, name, x), carried(net, x, zeros, [len(x)])[0])


def _stream(
    client: cc.Client,
    name: str,
    x: torch.Tensor,
    policy: cc.Policy | None = None,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> np.ndarray:
    state = {key: value.numpy() for key, value in (initial or {}).items()}
    with client.session(name, policy=policy, initial_state=state) as session:
        return np.concatenate(list(session.stream([chunk.numpy() for chunk in torch.split(x, 7)])))
