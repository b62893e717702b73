"""A client's memory: kept between steps, and told in words that help where there is too little."""

import contextlib
import ctypes
import functools
import os
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


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep freed memory, up to 256 MiB at a heap's end, instead of returning it at every step.

    A training step's tensors of some MB each are otherwise mapped, zeroed and given back again and again, which takes
    a tenth of the time of a batch of small clients. It is done once a process, with glibc alone, and left to the user
    where the environment has settings of that allocator.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that every version takes
        mallopt(_TRIM_THRESHOLD, 256 << 20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of malloc.h


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
