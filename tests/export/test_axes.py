"""Which axes are batch and time is found by experiment, whatever sizes the example happens to have."""

import pytest
import torch
from torch import Tensor, nn

from carousel_export.axes import find_signature
from carousel_export.eager import Eager

torch.set_num_threads(1)


class Net(nn.Module):
    """Takes `[batch, time, 3]` or, time-major, `[time, batch, 3]`; its outputs have their axes in several orders."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=batch_first)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, _) = self.lstm(x)
        return y, y.permute(2, 1, 0), h


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 3), (1, 3, 3), (3, 1, 3), (4, 6, 3)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_any_example_sizes(shape: tuple[int, int, int], batch_first: bool) -> None:
    """Sizes that coincide, and a batch or a time of one, lead to the same axes as any others."""
    signature = find_signature(Eager(Net(batch_first=batch_first).eval()), (torch.randn(shape),))
    lead = ("batch", "time") if batch_first else ("time", "batch")
    assert signature.inputs[0].eager_dims == (*lead, "3")
    assert [port.eager_dims for port in signature.outputs] == [(*lead, "3"), ("3", *lead[::-1]), ("1", "batch", "3")]
    assert [port.dims for port in signature.outputs] == [("batch", "time", "3")] * 2 + [("batch", "1", "3")]


def test_named_axes_are_the_found_ones() -> None:
    """Axes that the caller names give the signature that is found without."""
    eager, example = Eager(Net(batch_first=False).eval()), (torch.randn(2, 5, 3),)
    named = find_signature(eager, example, dims={"x": ("time", "batch", "3")})
    assert named == find_signature(eager, example)


class Alone(nn.Module):
    """Takes `[3, time]`: one sequence, features first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, frames: Tensor) -> Tensor:
        return self.lstm(frames.movedim(0, -1))[0]


def test_one_sequence_at_a_time() -> None:
    """Where such a model can take a batch is found too, and kept apart from the axes that it has for its caller."""
    signature = find_signature(Eager(Alone().eval()), (torch.randn(3, 1),))
    (frames,), (output,) = signature.inputs, signature.outputs
    assert (frames.eager_dims, frames.fed_dims) == (("3", "time"), ("3", "time", "batch"))
    assert (output.eager_dims, output.fed_dims) == (("time", "4"), ("time", "batch", "4"))


def test_a_port_turns_tensors_both_ways() -> None:
    """What is fed in the model's axes and fetched again is the graph's tensor, and so for a single sequence."""
    signature = find_signature(Eager(Net(batch_first=False).eval()), (torch.randn(2, 5, 3),))
    graph = torch.randn(4, 7, 3)
    for port in (*signature.inputs, *signature.outputs[:2]):
        fed = port.feed(graph)
        assert [fed.shape[port.fed_dims.index(dim)] for dim in ("batch", "time")] == [4, 7]
        assert torch.equal(port.fetch(fed), graph)
        assert torch.equal(port.take(port.give(graph[1])), graph[1])


class Strided(nn.Module):
    """`[batch, time, 3]` → `[batch, frames, 4]`, channels first `[batch, 3, frames]`, and a value `[batch, 4]`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.layers(x.mT)
        y = self.lstm(seen.mT)[0]
        return y, seen, y[:, -1]


@pytest.mark.parametrize(
    ("layers", "frames"),
    [
        ([nn.Conv1d(3, 3, 5, stride=2, padding=1), nn.MaxPool1d(3)], 20),
        ([nn.Conv1d(3, 3, 2, dilation=3), nn.AvgPool1d(2, ceil_mode=True)], 9),
        ([nn.Conv1d(3, 3, 11, stride=8), nn.MaxPool1d(4, padding=1), nn.Conv1d(3, 3, 2, stride=3)], 300),
    ],
    ids=["stride 6", "rounded up", "stride 96"],
)
def test_strides_are_found(layers: list[nn.Module], frames: int) -> None:
    """Behind strides an output's time is a dimension of its own, whose size is known for any number of frames."""
    model = Strided(*layers).eval()
    signature = find_signature(Eager(model), (torch.randn(2, frames, 3),))
    (extent,) = signature.extents
    assert [port.eager_dims for port in signature.outputs] == [
        ("batch", "time_out", "4"),
        ("batch", "3", "time_out"),
        ("batch", "4"),
    ]
    assert signature.outputs[1].dims == ("batch", "time_out", "3")
    assert signature.stride == extent.stride
    with torch.no_grad():
        for length in (*range(frames, frames + 100), 2000):
            assert extent.size(length) == model(torch.randn(1, length, 3))[0].shape[1]
