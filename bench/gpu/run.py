"""Carousel's runtime on a GPU: where nodes run, ragged parity, and step times beside raw cuDNN through PyTorch.

`python -m bench.gpu.run` on a machine with an NVIDIA GPU, onnxruntime-gpu and a CUDA build of PyTorch; with
`--device cpu` the same on the CPU, which tries the script and proves nothing about a GPU.
"""

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from bench.models import Stack, Whole, make
from bench.sizes import COMPARED, FRAMES, SIZES
from rich.console import Console
from rich.table import Table

import carousel_export as cx
from carousel_protos import Bundle
from carousel_server.config import Limits
from carousel_server.engine.device_runtime import DeviceRuntime
from carousel_server.engine.drawn import full_step
from carousel_server.engine.model import Model
from carousel_server.engine.onnx_runtime import providers
from carousel_server.engine.runtime import load_runtimes
from carousel_server.engine.spec import ModelSpec

BATCHES = (1, 8, 32, 64, 128, 256)
GRAPH = "model.onnx"


def device_runtime(bundle: Bundle, device: str) -> DeviceRuntime:
    states = frozenset(state.output for state in bundle.manifest.states)
    return DeviceRuntime(bundle.file(GRAPH), device=device, states=states, variant="float32")


def placement(bundle: Bundle, device: str) -> dict[str, dict[str, int]]:
    """Nodes by operator, for each provider that runs some; loading a `DeviceRuntime` refuses an LSTM on the CPU's."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(bundle.file(GRAPH), options, providers=providers(device))
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return {name: dict(counts) for name, counts in found.items()}


class Step:
    """Steps of the whole way: rows gathered by slot, the graph, rows scattered; answers on the host."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.spec = ModelSpec.read(bundle.manifest)
        self.runtime = device_runtime(bundle, device)
        self.arena = self.runtime.make_arena(self.spec.states, 2 * max(BATCHES))

    def run(self, feeds: dict[str, np.ndarray], slots: np.ndarray) -> dict[str, np.ndarray]:
        """One step; its answers by name."""
        states = zip(self.spec.states, self.arena.gather(slots), strict=True)
        given = feeds | {state.input: rows for state, rows in states}
        results = dict(zip(self.runtime.outputs, self.runtime.run(given), strict=True))
        self.arena.scatter(slots, [results[state.output] for state in self.spec.states])
        return {port.name: results[port.name] for port in self.spec.outputs}


def parity(bundle: Bundle, stack: Stack, device: str) -> dict[str, float]:
    """Largest differences over ragged steps that go on from each other, 13 rows of which none is of one length.

    To the CPU's runtime, and to PyTorch, which on a GPU is cuDNN with TF32 off; `state`: of the rows in the arena.
    """
    rng = np.random.default_rng(5)
    rows, steps = 13, 4
    slots = np.arange(1, rows + 1)
    here, host = Step(bundle, device), load_runtimes(bundle, device="cpu", threads=1)[GRAPH]
    spec = here.spec
    states = {state.input: np.zeros((rows, *state.row), state.dtype) for state in spec.states}
    eager = [None] * rows
    worst = {"cpu": 0.0, "torch": 0.0, "state": 0.0}
    for _ in range(steps):
        lengths = rng.integers(1, 2 * FRAMES, rows).astype(np.int32)
        x = rng.standard_normal((rows, int(lengths.max()), *spec.inputs[0].item)).astype(np.float32)
        feeds = {spec.inputs[0].name: x, spec.lengths: lengths}
        (answer,) = here.run(feeds, slots).values()
        results = dict(zip(host.outputs, host.run(feeds | states), strict=True))
        states = {state.input: results[state.output] for state in spec.states}
        for row, length in enumerate(lengths):
            with torch.inference_mode():
                wanted, eager[row] = stack(torch.from_numpy(x[row : row + 1, :length]).to(device), eager[row])
            on_cpu = results[spec.outputs[0].name][row, :length]
            for name, other in (("cpu", on_cpu), ("torch", wanted[0].cpu().numpy())):
                worst[name] = max(worst[name], float(np.abs(answer[row, :length] - other).max()))
    for row in range(rows):
        for state, value in zip(spec.states, here.arena.read(int(slots[row])), strict=True):
            worst["state"] = max(worst["state"], float(np.abs(value - states[state.input][row]).max()))
    return worst


def times(bundle: Bundle, stack: Stack, device: str, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Milliseconds of a step: Carousel's, the graph alone with rows on the device, and PyTorch's, in turns.

    All three have the input and the answer on the host, as a server has them, and the states on the device.
    """
    step = Step(bundle, device)
    rows = []
    for batch in BATCHES:
        feeds = full_step(step.spec, step.runtime.inputs, batch, FRAMES)
        slots = np.arange(1, batch + 1)
        inputs = {name: feeds[name] for name in feeds if name not in {state.input for state in step.spec.states}}
        gathered = step.arena.gather(slots)
        bound = inputs | {state.input: value for state, value in zip(step.spec.states, gathered, strict=True)}
        x = torch.from_numpy(feeds[step.spec.inputs[0].name])
        x = x.pin_memory() if device == "cuda" else x
        hidden = SIZES[bundle.manifest.name][1]
        state = tuple(torch.zeros(4, batch, hidden, device=device) for _ in range(2))

        def torch_step(x: torch.Tensor = x, state: tuple[torch.Tensor, ...] = state) -> None:
            with torch.inference_mode():
                y, _ = stack(x.to(device, non_blocking=True), state)
                y.cpu()

        calls: dict[str, Callable[[], object]] = {
            "carousel": lambda inputs=inputs, slots=slots: step.run(inputs, slots),
            "graph": lambda bound=bound: step.runtime.run(bound),
            "torch": torch_step,
        }
        started = time.perf_counter()
        calls["carousel"]()
        first = time.perf_counter() - started
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(_median_s(call, seconds))
        ratio = statistics.median(a / b for a, b in zip(taken["carousel"], taken["torch"], strict=True))
        medians = {f"{name}_ms": statistics.median(each) * 1e3 for name, each in taken.items()}
        rows.append({"batch": batch, "first_ms": first * 1e3, **medians, "carousel_over_torch": ratio})
    return rows


def _median_s(call: Callable[[], object], seconds: float) -> float:
    """The median of one call's time; each ends with its answer on the host, so that nothing is still on its way."""
    taken = []
    call()
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def warm_up_s(bundle: Bundle, device: str) -> float:
    """Seconds that a model takes to run once at each size of batch, as before SERVING."""
    states = frozenset(state.output for state in bundle.manifest.states)
    graphs = [graph for graph in bundle.manifest.graphs if graph.variant == "float32"]
    runtimes = {
        graph.file: DeviceRuntime(bundle.file(graph.file), device=device, states=states, variant="float32")
        for graph in graphs
    }
    model = Model(bundle.manifest, runtimes, Limits(max_batch=max(BATCHES), max_sessions=2 * max(BATCHES)))
    started = time.perf_counter()
    model.warm_up()
    model.steps.shut()
    return time.perf_counter() - started


def show(results: dict[str, Any]) -> None:
    console = Console()
    for name, found in results["models"].items():
        table = Table(title=f"model {name} on {results['machine']['device']}: ms a step of {FRAMES} frames")
        for column in ("batch", "the first", "Carousel", "graph alone", "PyTorch", "Carousel / PyTorch"):
            table.add_column(column, justify="right")
        for row in found["times"]:
            values = [row["first_ms"], row["carousel_ms"], row["graph_ms"], row["torch_ms"], row["carousel_over_torch"]]
            table.add_row(f"{row['batch']}", *(f"{value:.2f}" for value in values))
        console.print(table)
        console.print(f"parity: {found['parity']}; nodes: {found['placement']}; warm-up {found['warm_up_s']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn")
    parser.add_argument("--models", type=Path, default=Path("models/bench-gpu"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    if given.device == "cuda":
        # PyTorch brings the CUDA libraries that onnxruntime needs.
        ort.preload_dlls()
    results: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine(),
            "onnxruntime": ort.__version__,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version() if given.device == "cuda" else None,
        },
        "models": {},
    }
    for name in COMPARED:
        folder = given.models / name / "1"
        if not folder.exists():
            cx.export(
                Whole(make(name)).eval(),
                torch.randn(3, FRAMES, SIZES[name][0]),
                name=name,
                out=given.models,
                version="1",
            )
        bundle, stack = Bundle.open(folder), make(name).to(given.device)
        results["models"][name] = {
            "placement": placement(bundle, given.device),
            "parity": parity(bundle, stack, given.device),
            "warm_up_s": warm_up_s(bundle, given.device),
            "times": times(bundle, stack, given.device, given.rounds, given.seconds),
        }
    out = given.out or Path("bench/results") / f"gpu-{given.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
