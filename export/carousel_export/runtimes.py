"""The two runtimes that the gate asks: onnxruntime on the ONNX files, and the TorchScript file, loaded again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import onnxruntime
import torch
from torch import Tensor
from torch.jit import optimized_execution  # type: ignore[attr-defined]  # public, and not in its list

from carousel_export.errors import GraphError
from carousel_export.graph import LOOKAHEAD, MODEL
from carousel_export.quiet import quiet
from carousel_export.torchscript import LOOKAHEAD_METHOD, TORCHSCRIPT, WHOLE_METHOD
from carousel_export.variants import FLOAT32, variant_file


class Runtime(Protocol):
    """Runs an exported graph on tensors in the contract's order."""

    name: str

    def run(self, tensors: Sequence[Tensor], *, ahead: bool) -> list[Tensor]:
        """The graph's outputs; `ahead`: the lookahead graph's."""


class OnnxRuntime:
    """onnxruntime on the CPU, one thread, loading each graph when it is first run."""

    def __init__(self, folder: Path, variant: str = FLOAT32) -> None:
        self.name = "onnxruntime" if variant == FLOAT32 else f"onnxruntime, {variant}"
        self._folder = folder
        self._variant = variant
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, tensors: Sequence[Tensor], *, ahead: bool) -> list[Tensor]:
        """The graph's outputs; `ahead`: the lookahead graph's."""
        session = self._session(LOOKAHEAD if ahead else MODEL)
        feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    def _session(self, file: str) -> onnxruntime.InferenceSession:
        if file not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            # A plan for each shape that comes by would never be used again.
            options.enable_mem_pattern = False
            # It warns of each sum in float16 that it cannot fold, and computes it later.
            options.log_severity_level = 3
            # onnxruntime 1.31 dies of a signal where this pass meets an LSTM in float16 on the CPU.
            disabled = ["NchwcTransformer"] if self._variant == "float16" else []
            path = str(self._folder / variant_file(file, self._variant))
            self._sessions[file] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        return self._sessions[file]


class TorchScript:
    """The saved TorchScript file, loaded again."""

    name = "torchscript"

    def __init__(self, folder: Path) -> None:
        with quiet():
            self._module = torch.jit.load(folder / TORCHSCRIPT)  # type: ignore[no-untyped-call]

    def run(self, tensors: Sequence[Tensor], *, ahead: bool) -> list[Tensor]:
        """The method's results; `ahead`: those of the method `lookahead`."""
        method = getattr(self._module, LOOKAHEAD_METHOD if ahead else WHOLE_METHOD)
        # The profiling executor would compile anew for the shapes of each of the first calls, and most come once.
        with torch.no_grad(), optimized_execution(False):
            try:
                return list(method(*tensors))
            except RuntimeError as error:
                raise GraphError(
                    f"the TorchScript file fails at another size than the example's: {_cause(error)}; write forward "
                    "without tensors made from sizes, as torch.tensor(x.size(1)) is"
                ) from error


def _cause(error: RuntimeError) -> str:
    """TorchScript's last line says what went wrong; those before it, where."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__).strip()
