"""Requests that are wrong in every way, against a live server; `make soak` sends a million of them."""

import asyncio
import shutil
from pathlib import Path

import pytest
from soak.fuzz import SETTINGS, Fuzz, attack
from soak.models import export_tally
from tests.client.process import serving
from tests.support.shared import make_once


@pytest.fixture(scope="module")
def soaked_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the soak: those of all tests, and the one that counts."""

    def make_models(folder: Path) -> None:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        export_tally(folder)

    return make_once(tmp_path_factory, "soaked", make_models)


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_wrong_requests_change_nothing_for_others(soaked_models: Path, tmp_path: Path, store: str):
    """Thousands of wrong requests: no crash, no hang, no traceback told or logged, other sessions' bits unchanged."""
    fuzz = Fuzz(seed=11, requests=8000)
    kept = (
        {} if store == "memory" else {"store": f"sqlite:{tmp_path / 'sessions'}?synchronous=normal", "cold_after_s": 1}
    )
    with serving(soaked_models, **SETTINGS, **kept) as server:
        asyncio.run(attack(server, fuzz))
        assert server.stop() == 0
    fuzz.judge()
    assert "Traceback" not in "".join(server.log)
