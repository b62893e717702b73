"""What every test here needs: the toy federation, one thread as a run has, no pictures, no waiting for the disk."""

import os
import sys
from pathlib import Path

import pytest
import torch

from fedloru_flwr.clients import session
from fedloru_flwr.runs import RunDirectory

sys.path.append(str(Path(__file__).parent.parent / "strategies"))  # for toy_federation


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No model kept from another test either."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(RunDirectory, "draw_curves", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    session._hosted.clear()
    yield
    session._hosted.clear()
    torch.set_num_threads(threads)
