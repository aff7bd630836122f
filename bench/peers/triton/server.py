"""A Triton server on a model of the benchmark: its repository, written anew, and how its process is started."""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from bench.environments import Environment
from bench.models import Exported
from bench.names import TRITON
from bench.servers import Peer, free_port
from bench.sizes import FRAMES, SIZES

_HERE = Path(__file__).parent
_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 64
input {{ name: "x" data_type: TYPE_FP32 dims: [ {frames}, {features} ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ {frames}, 32 ] }}
parameters {{ key: "graph" value {{ string_value: "{graph}" }} }}
instance_group {{ count: {instances} kind: KIND_CPU }}
sequence_batching {{
  max_sequence_idle_microseconds: 600000000
  oldest {{ max_candidate_sequences: {candidates} max_queue_delay_microseconds: {delay_us} }}
  control_input {{
    name: "START" control {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }}
  }}
  control_input {{
    name: "END" control {{ kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] }}
  }}
  control_input {{
    name: "CORRID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}
  }}
}}
"""


@dataclass(frozen=True)
class Settings:
    """What was tried for the best configuration; these are what won."""

    instances: int = 2
    candidates: int = 512
    delay_us: int = 0

    def __str__(self) -> str:
        return (
            f"Python backend with onnxruntime in it, {self.instances} instances, sequence batching oldest, "
            f"max_candidate_sequences {self.candidates}, max_queue_delay {self.delay_us} µs, unary calls"
        )


def peer(environment: Environment, exported: Exported, settings: Settings) -> Peer:
    """Triton on `exported`, in an environment that holds nvidia-pytriton."""
    site = environment.site_packages
    server = site / "pytriton" / "tritonserver"
    # The stub that fits this Python stands where the backend looks for it only if it is put there.
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        shutil.copy(server / "python_backend_stubs" / environment.python_version / stub.name, stub)
    repository = _write_repository(exported, settings)
    port = free_port()
    options = {
        "model-repository": repository,
        "backend-directory": server / "backends",
        "grpc-address": "127.0.0.1",
        "grpc-port": port,
        "allow-http": "false",
        "allow-metrics": "false",
    }
    libraries = [site / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    return Peer(
        TRITON,
        "inference",
        (str(server / "bin" / "tritonserver"), *(f"--{key}={value}" for key, value in options.items())),
        ready="Started GRPCInferenceService",
        optional=True,
        target=f"127.0.0.1:{port}",
        environment=os.environ
        | {
            "PYTHONPATH": str(_HERE.parents[2]),
            "PATH": f"{environment.python.parent}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(str(path) for path in libraries if path),
        },
    )


def _write_repository(exported: Exported, settings: Settings) -> Path:
    folder = exported.folder.parent / f"triton-{exported.name}" / exported.name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copy(_HERE / "model.py", folder / "1" / "model.py")
    config = _CONFIG.format(
        name=exported.name,
        frames=FRAMES,
        features=SIZES[exported.name][0],
        graph=exported.graph.resolve(),
        instances=settings.instances,
        candidates=settings.candidates,
        delay_us=settings.delay_us,
    )
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    return folder.parent.resolve()
