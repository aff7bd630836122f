"""Requests that are wrong in every way, against a live server; `make soak` sends a million of them."""

import asyncio
from pathlib import Path

import pytest
from soak.fuzz import SETTINGS, Fuzz, attack
from soak.models import export_all
from tests.client.process import serving
from tests.support.shared import make_once


@pytest.fixture(scope="module")
def soaked_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_once(tmp_path_factory, "soaked", export_all)


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
