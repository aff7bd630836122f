"""`carousel verify`: a bundle checked on this host, without torch."""

from pathlib import Path

from carousel_protos import Bundle
from carousel_server.config import Device, RuntimeKind
from carousel_server.engine.golden import Replayed
from carousel_server.engine.golden import replay as replay_golden
from carousel_server.engine.runtime import load_runtimes

__all__ = ["Replayed", "replay"]


def replay(bundle_path: Path, device: Device = "cpu", runtime: RuntimeKind = "onnxruntime") -> list[Replayed]:
    """Check the files' sha256, load the graphs, and replay the golden vectors through the engine.

    Raises `BundleError`, `LoadError` and `ConfigError`; a deviation from the eager model is in the answer
    (`Replayed.ok`).
    """
    bundle = Bundle.open(bundle_path)
    return replay_golden(bundle, load_runtimes(bundle, device=device, threads=1, kind=runtime))
