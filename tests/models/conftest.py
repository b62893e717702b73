from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def torch_as_it_starts() -> Iterator[None]:
    """One thread, since the inputs are tiny; and torch's fused attention path on, as in a fresh process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
