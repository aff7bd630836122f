"""TorchScript: the methods of a bundle's model.pt as functions of named arrays. The only module that imports torch."""

import warnings
from collections.abc import Sequence

import torch
from torch.jit import optimized_execution  # type: ignore[attr-defined]  # public, and not in its list

from carousel_protos import Bundle
from carousel_protos.v1.manifest_pb2 import Manifest, PolicyKind
from carousel_server.config import Device
from carousel_server.engine.arena import Arena
from carousel_server.engine.runtime import RunError
from carousel_server.engine.spec import Array, State
from carousel_server.errors import LoadError

_AHEAD = "_ahead"
# What torch says of an embedding's input beyond its table, the one value that a checked tensor can be wrong in.
_BEYOND = "index out of range"


def load(bundle: Bundle, *, device: Device, threads: int) -> "dict[str, TorchRuntime]":
    """The methods that compute what the float32 graphs compute, by those graphs' file names.

    Raises `LoadError` for a bundle without TorchScript, a file that torch refuses, and a device other than the CPU.
    """
    manifest = bundle.manifest
    if not manifest.torchscript:
        raise LoadError(f"{manifest.name} has no TorchScript; serve it with --runtime onnxruntime")
    if device != "cpu":
        raise LoadError("TorchScript is served on the CPU; use --device cpu, or --runtime onnxruntime")
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", DeprecationWarning)
            module = torch.jit.load(bundle.file(manifest.torchscript))  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"torch cannot load {manifest.torchscript}: {_last_line(error)}") from error
    return {
        graph.file: TorchRuntime(module, manifest, ahead=PolicyKind.POLICY_KIND_LOOKAHEAD in graph.policies)
        for graph in manifest.graphs
        if graph.variant == "float32"
    }


class TorchRuntime:
    """A method of a loaded module: `lookahead` with `ahead`, else `forward`."""

    # PyTorch's threads are the process's, and calls that overlap would share them.
    parallel = False

    def __init__(self, module: torch.jit.ScriptModule, manifest: Manifest, *, ahead: bool) -> None:
        self._method = getattr(module, "lookahead" if ahead else "forward")
        suffixes = ("", _AHEAD) if ahead else ("",)
        self.inputs = [port.name + suffix for port in manifest.inputs for suffix in suffixes]
        self.inputs += [manifest.lengths + suffix for suffix in suffixes]
        self.inputs += [port.name for port in manifest.contexts]
        self.inputs += [state.input for state in manifest.states]
        self.outputs = [port.name for port in manifest.outputs] + [state.output for state in manifest.states]

    def make_arena(self, states: Sequence[State], rows: int) -> Arena:
        """State rows as NumPy arrays."""
        return Arena(states, rows)

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """The method's results, in their order. Raises `RunError`."""
        tensors = [torch.from_numpy(feeds[name]) for name in self.inputs]
        try:
            # Both are a thread's own. The profiling executor would compile anew for the shapes of the first calls.
            with torch.inference_mode(), optimized_execution(False):
                results = self._method(*tensors)
        except RuntimeError as error:
            line = _last_line(error)
            raise RunError(line, rejected=_BEYOND in line) from error
        return [result.numpy() for result in ((results,) if isinstance(results, torch.Tensor) else results)]


def _last_line(error: Exception) -> str:
    """torch's own words, which come after the interpreter's stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: ") if lines else type(error).__name__
