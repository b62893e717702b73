"""Out of memory on a client: told in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ClientOutOfMemoryError(RuntimeError):
    """A client has not enough memory for its work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so: Python's, a device's, or that of torch's allocator for the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def explained() -> Iterator[None]:
    """Raise `ClientOutOfMemoryError`, with what to do, for an exception that says there is not enough memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = str(error).strip().partition("\n")[0][:200]
        raise ClientOutOfMemoryError(
            f"not enough memory on this client ({first}): lower batch-size, rank or the model's size"
        ) from error
