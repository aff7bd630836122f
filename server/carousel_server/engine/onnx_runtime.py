"""onnxruntime: an ONNX file as a function of named arrays. The only module that imports it."""

import re
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from carousel_server.config import Device
from carousel_server.engine.arena import Arena
from carousel_server.engine.runtime import RunError
from carousel_server.engine.spec import Array, State
from carousel_server.errors import LoadError

_PROVIDERS: dict[Device, list[tuple[str, dict[str, str]]]] = {
    "cpu": [("CPUExecutionProvider", {})],
    # TF32 would cost three digits of parity.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})],
}
_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")


class OnnxRuntime:
    """One graph, loaded. Raises `LoadError` for a file that onnxruntime refuses or a device that is not there."""

    parallel = True

    def __init__(self, path: Path, *, device: Device, threads: int, variant: str, spinning: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Shapes change with every step: patterns kept for each would only grow.
        options.enable_mem_pattern = False
        # A pool of each session's own: that of the process, which Python can make, spins and cannot be told not to.
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        # What was checked was read as ONNX; a file's name could ask for another format.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = _PROVIDERS[device][0][0]
        if wanted not in ort.get_available_providers():
            raise LoadError(
                f"onnxruntime here has no {wanted} (it has {', '.join(ort.get_available_providers())}); "
                "install onnxruntime-gpu in place of onnxruntime, or use --device cpu"
            )
        try:
            # onnxruntime 1.31 dies of a signal where this pass meets an LSTM in float16 on the CPU.
            disabled = ["NchwcTransformer"] if variant == "float16" else []
            self._session = ort.InferenceSession(
                path, options, providers=_PROVIDERS[device], disabled_optimizers=disabled
            )
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise LoadError(f"onnxruntime cannot load {path.name}: {_first_line(error)}") from error
        if self._session.get_providers()[0] != wanted:
            raise LoadError(f"onnxruntime fell back from {wanted}: its CUDA libraries are missing or do not fit")
        self._check_placement(path.name, wanted)
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    def _check_placement(self, name: str, wanted: str) -> None:
        """Raise `LoadError` where a recurrent node runs elsewhere than asked: each call would wait for copies."""
        parts = self._session.get_provider_graph_assignment_info()
        placed = [(part.ep_name, node) for part in parts for node in part.get_nodes()]
        for provider, node in placed:
            if provider != wanted and node.op_type in _RECURRENT:
                raise LoadError(
                    f"{name} has {node.op_type} {node.name}, which {wanted} does not run and {provider} would; "
                    "use --device cpu, or another variant"
                )

    def make_arena(self, states: Sequence[State], rows: int) -> Arena:
        """State rows as NumPy arrays."""
        return Arena(states, rows)

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """The graph's outputs, in its order. Raises `RunError`."""
        # A batch of 0 ends the process inside onnxruntime's LSTM.
        assert all(len(array) for array in feeds.values()), "a step has at least one row"
        try:
            outputs: list[Array] = self._session.run(None, feeds)
        except Exception as error:
            raise run_error(error) from error
        return outputs


def run_error(error: Exception) -> RunError:
    """What onnxruntime raised in a run."""
    return RunError(_first_line(error), rejected=isinstance(error, InvalidArgument))


def providers(device: Device) -> list[tuple[str, dict[str, str]]]:
    """What runs a graph there, first what does if it can, with options."""
    return _PROVIDERS[device]


def about() -> dict[str, str]:
    """What there is of onnxruntime here, in words."""
    return {
        "onnxruntime": ort.__version__,
        "providers": ", ".join(ort.get_available_providers()),
        "CUDA": getattr(ort, "cuda_version", "") or "none in this build of onnxruntime; onnxruntime-gpu has it",
    }


def _first_line(error: Exception) -> str:
    """onnxruntime's own words, without the place in its sources where they were said."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^.*Status Message: (\S+\.(cc|h|cu):\d+ .*?\) ?)?", "", line)
