"""States on a device: the same answers to the bit, here with the CPU as the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import pytest

from carousel_protos import Bundle, newest_version
from carousel_protos.v1.manifest_pb2 import Policy
from carousel_server.config import Limits
from carousel_server.engine import moves
from carousel_server.engine.arena import START_ROW, Arena
from carousel_server.engine.device_arena import DeviceArena
from carousel_server.engine.device_runtime import DeviceRuntime
from carousel_server.engine.golden import replay
from carousel_server.engine.model import Model
from carousel_server.engine.onnx_runtime import OnnxRuntime
from carousel_server.engine.runtime import Runtime, load_runtimes
from carousel_server.engine.session import Event, Result
from carousel_server.engine.spec import State
from carousel_server.errors import LoadError

STATES = (
    State("h", "h_n", np.dtype("<f4"), (2, 3)),
    State("n", "n_n", np.dtype("<i8"), (1, 4), initial=np.arange(4, dtype="<i8").reshape(1, 4)),
)


def open_bundle(models: Path, name: str) -> Bundle:
    return Bundle.open(newest_version(models / name))


def on_device(bundle: Bundle) -> dict[str, Runtime]:
    states = frozenset(state.output for state in bundle.manifest.states)
    return {
        graph.file: DeviceRuntime(bundle.file(graph.file), device="cpu", states=states, variant=graph.variant)
        for graph in bundle.manifest.graphs
    }


@pytest.mark.parametrize("seed", range(3))
def test_arena_on_a_device_is_the_arena(seed: int) -> None:
    """Taken, given back, written, scattered and gathered in any order, rows are those of the NumPy arena."""
    rng = np.random.default_rng(seed)
    arenas = (Arena(STATES, 9), DeviceArena(STATES, 9, "cpu"))
    held: list[int] = []

    def draw(rows: int) -> list[np.ndarray]:
        return [(rng.standard_normal((rows, *state.row)) * 9).astype(state.dtype) for state in STATES]

    for _ in range(80):
        kind = rng.choice(["take", "give", "write", "scatter", "gather"])
        if kind == "take" and len(held) < 9:
            here, there = (arena.take() for arena in arenas)
            assert here == there
            held.append(here)
        elif kind == "give" and held:
            slot = held.pop(rng.integers(len(held)))
            for arena in arenas:
                arena.give_back(slot)
        elif kind == "write" and held:
            rows = [array[0] for array in draw(1)]
            for arena in arenas:
                arena.write(held[0], rows)
        elif held:
            chosen = rng.permutation(held)[: rng.integers(1, len(held) + 1)]
            check_move(arenas, np.array([*chosen, START_ROW], np.intp), draw if kind == "scatter" else None)
        for slot in held:
            for here, there in zip(*(arena.read(slot) for arena in arenas), strict=True):
                np.testing.assert_array_equal(here, there)


def check_move(
    arenas: tuple[Arena, DeviceArena], slots: np.ndarray, draw: Callable[[int], list[np.ndarray]] | None
) -> None:
    """Both gather the same rows; with `draw`, both then scatter what a graph would give on the device."""
    rows, gathered = (arena.gather(slots) for arena in arenas)
    for row, value in zip(rows, gathered, strict=True):
        np.testing.assert_array_equal(value.numpy()[: len(slots)], row)
    if draw is not None:
        values = draw(gathered[0].shape()[0])
        arenas[0].scatter(slots, [array[: len(slots)] for array in values])
        for value, array in zip(gathered, values, strict=True):
            value.update_inplace(array)
        arenas[1].scatter(slots, gathered)


@dataclass
class Answers:
    """What a session was answered, as bytes."""

    values: list[tuple[bytes, ...]] = field(default_factory=list)

    def deliver(self, event: Event) -> None:
        assert isinstance(event, Result), event
        self.values.append(event.data)


def chunks(model: Model, seed: int) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    rng = np.random.default_rng(seed)
    (port,) = model.spec.inputs
    for left in range(4, -1, -1):
        shape = (int(rng.integers(1, 9)), *port.item)
        data = rng.standard_normal(shape) if port.dtype.kind == "f" else rng.integers(0, 11, shape)
        yield {port.name: data.astype(port.dtype)}, left == 0


def stream(model: Model, policies: list[Policy]) -> list[list[tuple[bytes, ...]]]:
    """Seven sessions for each policy, all at once in ragged steps; every third opens when the others are half done."""
    numbers = count()
    answers = []
    for wave in (2, 1):
        live = []
        for policy in policies:
            for _ in range(7 * wave // 3 + 1):
                number = next(numbers)
                session = model.open(f"s{number}", policy, {}, {})
                session.sink = Answers()
                answers.append(session.sink)
                live.append((session, chunks(model, number)))
        for index in range(5):
            for session, source in live:
                tensors, end = next(source)
                model.submit(session, index, tensors, end=end)
            while model.steps.turn():
                pass
        for session, _ in live:
            model.release(session)
    return [each.values for each in answers]


@pytest.mark.parametrize("name", ["tagger", "speaker"])
def test_streams_on_a_device_answer_the_same_bits(models: Path, name: str) -> None:
    """Under every policy, batches filled up and rows used again, each session gets the NumPy arena's bytes."""
    bundle = open_bundle(models, name)
    policies = list(bundle.manifest.policies)
    found = []
    for runtimes in (load_runtimes(bundle, device="cpu", threads=1), on_device(bundle)):
        model = Model(bundle.manifest, runtimes, Limits(max_sessions=40))
        model.warm_up()
        found.append(stream(model, policies))
        model.steps.shut()
    assert found[0] == found[1]
    assert all(any(map(len, values)) for values in found[0])


def test_golden_answers_are_the_eager_models(models: Path) -> None:
    """The bundle's golden vectors replayed through the device's path are within tolerance, at the same errors."""
    bundle = open_bundle(models, "tagger")
    checked = replay(bundle, on_device(bundle))
    assert all(each.ok for each in checked)
    assert checked == replay(bundle, load_runtimes(bundle, device="cpu", threads=1))


def test_batches_are_powers_of_two(models: Path) -> None:
    """A step of five rows runs as eight, whose states come back as eight, and whose answers as five."""
    bundle = open_bundle(models, "tagger")
    runtime = on_device(bundle)["model.onnx"]
    arena = DeviceArena([State.read(state) for state in bundle.manifest.states], 10, "cpu")
    assert list(arena.buckets(64)) == [1, 2, 4, 8, 16, 32, 64]
    rows = arena.gather(np.arange(1, 6))
    feeds = dict(zip([state.input for state in bundle.manifest.states], rows, strict=True))
    assert [value.shape()[0] for value in rows] == [8, 8]
    feeds |= {"x": np.ones((5, 3, 5), np.float32), "lengths": np.full(5, 3, np.int32)}
    results = dict(zip(runtime.outputs, runtime.run(feeds), strict=True))
    kept = {state.output for state in bundle.manifest.states}
    assert {len(value) for name, value in results.items() if name not in kept} == {5}
    assert {results[name].shape()[0] for name in kept} == {8}


@pytest.mark.parametrize("dtype", sorted(moves._TYPES))
def test_moving_graphs_are_valid_onnx(dtype: str) -> None:
    """The graphs that are written by hand pass onnx's own checker, and name the dtype's tensors."""
    for make in (moves.gather, moves.scatter):
        model = onnx.load_from_string(make(dtype, (300, 2)))
        onnx.checker.check_model(model, full_check=True)
        assert onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type) == np.dtype(dtype)


def test_a_recurrent_node_elsewhere_is_refused(models: Path) -> None:
    """A graph whose LSTM another provider would run is not loaded: the line names the node and both providers."""
    runtime = OnnxRuntime(open_bundle(models, "tagger").file("model.onnx"), device="cpu", threads=1, variant="float32")
    with pytest.raises(LoadError, match=r"has LSTM .* which CUDAExecutionProvider does not run"):
        runtime._check_placement("model.onnx", "CUDAExecutionProvider")
