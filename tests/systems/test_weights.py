"""Weights that are frozen, tied or computed from others: exported as the model uses them, and counted."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.client.process import serving
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import carousel_client as cc
import carousel_export as cx

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [2, 3, 8, 4, 6, 2, 6, 4]])


class Net(nn.Module):
    """Token ids `[batch, time]` → `[batch, time, 10]`: embedding, a two-layer LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(10, 6)
        self.rnn = nn.LSTM(6, 6, 2, batch_first=True)
        self.out = nn.Linear(6, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(tokens))[0])


def frozen() -> nn.Module:
    """The embedding and the first layer are not trained."""
    net = Net()
    net.embedding.weight.requires_grad_(False)
    for name, parameter in net.rnn.named_parameters():
        parameter.requires_grad_("_l1" in name)
    return net


def tied() -> nn.Module:
    """The linear layer's weight is the embedding's."""
    net = Net()
    net.out.weight = net.embedding.weight
    return net


class Shared(Net):
    """One LSTM under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.rnn

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.again(self.rnn(self.embedding(tokens))[0])[0])


def parametrized() -> nn.Module:
    """weight_norm and spectral_norm of today, one of them with a scale that is not what it started from."""
    net = Net()
    parametrizations.weight_norm(net.rnn, "weight_hh_l0")
    parametrizations.spectral_norm(net.rnn, "weight_ih_l1")
    parametrizations.weight_norm(net.out)
    with torch.no_grad():
        net.rnn.parametrizations.weight_hh_l0.original0.mul_(1.7)
    return net


def hooked() -> nn.Module:
    """weight_norm, spectral_norm and pruning as hooks that compute the weight before each call."""
    net = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.*is deprecated", FutureWarning)
        nn.utils.weight_norm(net.rnn, "weight_hh_l0")
    with torch.no_grad():
        net.rnn.weight_hh_l0_g.mul_(1.7)
    nn.utils.spectral_norm(net.out)
    prune.random_unstructured(net.rnn, "weight_ih_l1", 0.5)
    return net


PLAIN = 60 + 2 * 4 * 6 * (6 + 6 + 2) + 60
# How many parameters, and how many of them training would change.
COUNTS: dict[Callable[[], nn.Module], tuple[int, int]] = {
    frozen: (PLAIN, 4 * 6 * (6 + 6 + 2) + 60),
    tied: (PLAIN - 60, PLAIN - 60),
    Shared: (PLAIN, PLAIN),
    parametrized: (PLAIN, PLAIN),
    hooked: (PLAIN, PLAIN),
}


@pytest.mark.system("15", "frozen, tied, shared, weight_norm'ed, spectral_norm'ed and pruned weights")
@pytest.mark.parametrize("made", COUNTS)
def test_weights_are_what_the_model_uses(tmp_path: Path, made: Callable[[], nn.Module]) -> None:
    """The server says what the eager model says, chunk by chunk, and the caller's model still says the same."""
    model = made().eval()
    with torch.no_grad():
        wanted = model(TOKENS)
    bundle = cx.export(model.eval(), TOKENS, name="net", out=tmp_path)
    with serving(tmp_path) as server, cc.connect(server.address) as client:
        for row, answer in zip(TOKENS, wanted, strict=True):
            with client.session("net") as session:
                got = np.concatenate(list(session.stream([row[:3].numpy(), row[3:].numpy()])))
            np.testing.assert_allclose(got, answer, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), wanted)
    assert (bundle.manifest.parameters, bundle.manifest.trainable_parameters) == COUNTS[made]


def initialisers(bundle_file: Path) -> list[tuple[int, ...]]:
    return [tuple(each.dims) for each in onnx.load(bundle_file).graph.initializer]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    """An embedding that is the output layer's weight too, and a layer under two names, are in each file once."""
    shapes = initialisers(cx.export(tied().eval(), TOKENS, name="tied", out=tmp_path).file("model.onnx"))
    assert shapes.count((10, 6)) + shapes.count((6, 10)) == 1
    shapes = initialisers(cx.export(Shared().eval(), TOKENS, name="shared", out=tmp_path).file("model.onnx"))
    assert shapes.count((1, 24, 6)) == 4


class Only(nn.Module):
    """A layer's output."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Wide(nn.Module):
    """A bidirectional and a plain LSTM and a linear layer, of sizes that tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True)
        self.one = nn.LSTM(14, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(self.both(x)[0])[0])


def test_figures_of_layers(tmp_path: Path) -> None:
    """Parameters, state and FLOPs of each layer are what its sizes say; a second direction doubles them."""
    manifest = cx.export(Wide().eval(), torch.randn(3, 6, 5), name="wide", out=tmp_path).manifest
    both, one = manifest.layers
    assert (both.num_layers, both.num_directions) == (2, 2)
    first, second = 2 * 4 * 7 * (5 + 7 + 2), 2 * 4 * 7 * (14 + 7 + 2)
    assert list(both.layer_parameters) == [first, second]
    assert both.parameters == both.trainable_parameters == first + second
    assert both.state_bytes == 4 * 2 * (2 * 2 * 7)
    assert both.flops_per_frame == 2 * (2 * 4 * 7 * (5 + 7) + 2 * 4 * 7 * (14 + 7))
    assert (list(one.layer_parameters), one.state_bytes) == ([4 * 4 * (14 + 4 + 2)], 4 * 2 * 4)
    assert one.flops_per_frame == 2 * 4 * 4 * (14 + 4)
    assert manifest.flops_per_frame == both.flops_per_frame + one.flops_per_frame + 2 * 4 * 3
    assert manifest.parameters == both.parameters + one.parameters + 15


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.RNN, 1)])
def test_flops_of_any_layer(tmp_path: Path, kind: type[nn.RNNBase], gates: int) -> None:
    """A layer's FLOPs are those of its weights, whichever kernels the host runs it on."""
    model = Only(kind(5, 4, batch_first=True)).eval()
    manifest = cx.export(model, torch.randn(3, 6, 5), name="only", out=tmp_path).manifest
    assert manifest.layers[0].flops_per_frame == manifest.flops_per_frame == 2 * gates * 4 * (5 + 4)
