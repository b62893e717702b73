"""What every test needs: no telemetry, no file outside temporary directories."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(autouse=True)
def private_places(tmp_path_factory, monkeypatch):
    """Give each test a store, a Flower home and a matplotlib cache of its own."""
    places = tmp_path_factory.mktemp("places")
    monkeypatch.setenv("FEDLORU_STORE", str(places / "store"))
    monkeypatch.setenv("FLWR_HOME", str(places / "flower"))
    if "MPLCONFIGDIR" not in os.environ:
        monkeypatch.setenv("MPLCONFIGDIR", str(places / "matplotlib"))


@pytest.fixture
def fresh_process():
    """One thread, as a run has, and no model kept from another test."""
    import torch

    from fedloru_flwr.clients import session

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    session._hosted.clear()
    yield
    session._hosted.clear()
    torch.set_num_threads(threads)


@pytest.fixture
def quick_books(monkeypatch):
    """No pictures, and no waiting for the disk."""
    from fedloru_flwr.runs import RunDirectory

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(RunDirectory, "draw_curves", lambda self: None)


@pytest.fixture
def rows_of():
    """Read a run's metrics, apart from the times."""

    def read(run: Path) -> list[dict]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    return read
