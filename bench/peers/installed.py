"""How each server that is installed in an environment of its own is started on a model of the benchmark."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bench import environments
from bench.environments import Environment
from bench.models import Exported
from bench.servers import Peer, free_port

_HERE = Path(__file__).parent


def ray_serve(exported: Exported) -> Peer:
    options = _graph(exported) | {"port": free_port()}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0"}
    return _module("Ray Serve", environments.RAY_SERVE, "bench.peers.ray_serve", options, environment=quiet)


def lit_serve(exported: Exported) -> Peer:
    port = free_port()
    options = _graph(exported) | {"port": port}
    return _module(
        "LitServe",
        environments.LITSERVE,
        "bench.peers.lit",
        options,
        wire="litserve",
        ready="Application startup complete",
        target=f"127.0.0.1:{port}",
    )


def bento_ml(exported: Exported) -> Peer:
    port = free_port()
    python = environments.BENTOML.python
    command = (str(python), "-m", "bentoml", "serve", "bench.peers.bento:Chunks", "--host", "127.0.0.1")
    return Peer(
        "BentoML",
        "bentoml",
        (*command, "--port", str(port)),
        ready="Starting production HTTP BentoServer",
        target=f"127.0.0.1:{port}",
        optional=True,
        environment=_environment(python) | {"BENCH_GRAPH": str(exported.graph.resolve()), "BENTOML_DO_NOT_TRACK": "1"},
    )


def ml_server(exported: Exported) -> Peer:
    ports = [str(free_port()) for _ in range(3)]
    python = environments.MLSERVER.python
    command = (str(python), "-m", "bench.peers.mlserver_runtime", "--name", exported.name)
    return Peer(
        "MLServer",
        "mlserver",
        (*command, "--graph", str(exported.graph.resolve()), "--ports", *ports),
        ready="Loaded model|loaded model",
        target=f"127.0.0.1:{ports[0]}",
        optional=True,
        environment=_environment(python),
    )


def torch_serve(exported: Exported) -> Peer:
    """Its model is a folder as `torch-model-archiver --archive-format no-archive` makes it."""
    python = environments.TORCHSERVE.python
    root = (exported.folder.parent / f"torchserve-{exported.name}").resolve()
    folder = root / exported.name
    (folder / "MAR-INF").mkdir(parents=True, exist_ok=True)
    manifest = {
        "createdOn": "",
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {
            "modelName": exported.name,
            "handler": "torchserve_handler.py:handle",
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        },
    }
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.copy(_HERE / "torchserve_handler.py", folder)
    settings = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 64,
        "maxBatchDelay": 1,
        "graph": str(exported.graph.resolve()),
    }
    # JSON is YAML.
    (folder / "model-config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    port = free_port()
    addresses = {"inference": port, "management": free_port(), "metrics": free_port()}
    lines = [f"{name}_address=http://127.0.0.1:{each}" for name, each in addresses.items()]
    lines += [f"grpc_{name}_port={free_port()}" for name in ("inference", "management")]
    lines += ["disable_token_authorization=true", "job_queue_size=4096", "default_response_timeout=60"]
    (root / "config.properties").write_text("\n".join(lines), encoding="utf-8")
    options = {
        "model-store": root,
        "models": f"{exported.name}={exported.name}",
        "ts-config": root / "config.properties",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return Peer(
        "TorchServe",
        "torchserve",
        (str(python.with_name("torchserve")), "--start", "--foreground", "--disable-token-auth", *flags),
        ready="WORKER_MODEL_LOADED",
        target=f"127.0.0.1:{port}",
        optional=True,
        environment=_environment(python) | {"LOG_LOCATION": str(root / "logs"), "METRICS_LOCATION": str(root / "logs")},
    )


def _module(
    name: str,
    installed: Environment,
    module: str,
    options: dict[str, object],
    *,
    wire: str = "http",
    ready: str = r"listening on (\S+)",
    target: str = "",
    environment: dict[str, str] | None = None,
) -> Peer:
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = (str(installed.python), "-m", module, *flags)
    every = _environment(installed.python) | (environment or {})
    return Peer(name, wire, command, ready=ready, target=target, optional=True, environment=every)


def _graph(exported: Exported) -> dict[str, object]:
    return {"graph": exported.graph.resolve()}


def _environment(python: Path) -> dict[str, str]:
    """What a server sees: its own Python first, and this checkout's `bench` alone."""
    path = f"{python.parent}:{os.environ['PATH']}"
    return dict(os.environ) | {"PATH": path, "PYTHONPATH": str(_HERE.parents[1])}


INSTALLED: tuple[tuple[Environment, Callable[[Exported], Peer]], ...] = (
    (environments.RAY_SERVE, ray_serve),
    (environments.MLSERVER, ml_server),
    (environments.TORCHSERVE, torch_serve),
    (environments.BENTOML, bento_ml),
    (environments.LITSERVE, lit_serve),
)
