import os

import pytest
import torch

from fedloru_flwr.clients import session
from fedloru_flwr.runs import RunDirectory


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """One thread, as a run has, no model kept from another test, no pictures, and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(RunDirectory, "draw_curves", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    session._hosted.clear()
    yield
    session._hosted.clear()
    torch.set_num_threads(threads)
