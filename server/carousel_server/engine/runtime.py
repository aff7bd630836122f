"""What runs a bundle's graphs: the interface, and the choice between the modules that have it."""

from collections.abc import Sequence
from typing import Any, Protocol

from carousel_protos import Bundle
from carousel_protos.v1.manifest_pb2 import Graph
from carousel_server.config import Device, RuntimeKind, require
from carousel_server.engine.arena import Arena
from carousel_server.engine.spec import State
from carousel_server.errors import LoadError


class Runtime(Protocol):
    """One graph, loaded: a function of named arrays."""

    inputs: list[str]
    outputs: list[str]
    # Whether calls may overlap.
    parallel: bool

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """The graph's outputs, in its order. Raises `RunError`.

        States go in as `make_arena`'s arena gathers them, and come out as it scatters them; all else are arrays.
        """

    def make_arena(self, states: Sequence[State], rows: int) -> Arena:
        """`rows` state rows in the memory that this runtime takes its states from."""


class RunError(Exception):
    """A runtime refused or failed a call; `rejected` says that the inputs' values were at fault."""

    def __init__(self, message: str, *, rejected: bool) -> None:
        super().__init__(message)
        self.rejected = rejected


def load_runtimes(
    bundle: Bundle, *, device: Device, threads: int, spinning: bool = False, kind: RuntimeKind = "onnxruntime"
) -> dict[str, Runtime]:
    """A bundle's graphs of every variant that `kind` can run, by file name.

    Raises `LoadError`, `BundleError`, and `ConfigError` where the library of `kind` is not installed.
    """
    require(kind)
    # Each library is imported by its own module alone, and only when it is chosen.
    if kind == "torchscript":
        from carousel_server.engine.torch_runtime import load  # noqa: PLC0415

        return dict(load(bundle, device=device, threads=threads))
    if any(_is_torchscript(bundle, graph) for graph in bundle.manifest.graphs):
        raise LoadError(f"{bundle.manifest.name} has TorchScript and no ONNX; serve it with --runtime torchscript")
    from carousel_server.engine.device_runtime import DeviceRuntime  # noqa: PLC0415
    from carousel_server.engine.onnx_runtime import OnnxRuntime  # noqa: PLC0415

    states = frozenset(state.output for state in bundle.manifest.states)
    loaded: dict[str, Runtime] = {}
    for graph in bundle.manifest.graphs:
        path, variant = bundle.file(graph.file), graph.variant
        if device == "cpu":
            loaded[graph.file] = OnnxRuntime(path, device=device, threads=threads, variant=variant, spinning=spinning)
        elif variant != "int8":  # DynamicQuantizeLSTM is the CPU's alone
            loaded[graph.file] = DeviceRuntime(path, device=device, states=states, variant=variant)
    return loaded


def _is_torchscript(bundle: Bundle, graph: Graph) -> bool:
    return graph.file == bundle.manifest.torchscript
