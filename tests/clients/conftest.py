import pytest
import torch

from fedloru_flwr.clients import session


@pytest.fixture(autouse=True)
def fresh_process():
    """One thread, as a run has, and no model kept from another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    session._hosted.clear()
    yield
    session._hosted.clear()
    torch.set_num_threads(threads)
