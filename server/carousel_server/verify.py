"""`carousel verify`: a bundle checked on this host, without torch."""

from pathlib import Path

from carousel_protos import Bundle
from carousel_server.config import Device, Limits
from carousel_server.engine.golden import Replayed
from carousel_server.engine.golden import replay as replay_golden
from carousel_server.engine.model import Model

__all__ = ["Replayed", "replay"]


def replay(bundle_path: Path, device: Device = "cpu") -> list[Replayed]:
    """Check the files' sha256, load the graphs, and replay the golden vectors through the engine.

    Raises `BundleError` and `LoadError`; a deviation from the eager model is in the answer (`Replayed.ok`).
    """
    bundle = Bundle.open(bundle_path)
    model = Model(bundle, device=device, threads=1, limits=Limits())
    try:
        return replay_golden(model, bundle)
    finally:
        model.shut()
