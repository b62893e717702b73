"""Random numbers that depend on their labels alone.

Every draw is keyed by the run's seed and a list of labels ("factors", layer, version, ...), never by what was
drawn before. So two machines, or two orders of execution, draw the same numbers.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _key(seed: int, labels: Sequence[object]) -> bytes:
    text = "\x1f".join([str(int(seed)), *map(str, labels)])
    return hashlib.sha256(text.encode()).digest()


def derive_seed(seed: int, *labels: object) -> int:
    """Return a seed in ``[0, 2**63)`` that is a function of ``seed`` and ``labels`` only."""
    return int.from_bytes(_key(seed, labels)[:8], "big") >> 1


def uniform(seed: int, *labels: object, shape: Sequence[int], bound: float) -> Tensor:
    """Draw a float32 tensor of ``shape`` from ``U(-bound, bound)`` with the Philox counter-based generator.

    The draw uses 24-bit integers scaled by exact float32 operations, so it is the same on every machine.
    """
    bits = np.random.Philox(key=int.from_bytes(_key(seed, labels)[:16], "big"))
    unit = np.random.Generator(bits).random(size=tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray((unit * np.float32(2) - np.float32(1)) * np.float32(bound)))


def choose(seed: int, *labels: object, items: Sequence[str], count: int) -> list[str]:
    """Choose ``count`` distinct items without replacement, uniformly, and return them sorted.

    Each item is ranked by a hash of (seed, labels, item); the ``count`` lowest are taken. The choice does not
    depend on the order of ``items``.

    Raises:
        ValueError: if ``count`` is negative or larger than the number of items.
    """
    if not 0 <= count <= len(items):
        raise ValueError(f"cannot choose {count} of {len(items)} items")
    return sorted(sorted(items, key=lambda item: _key(seed, (*labels, item)))[:count])


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


GeneratorStates = tuple[torch.Tensor, Any, Any]


def generator_states() -> GeneratorStates:
    """The states of the global generators of torch (of the CPU), NumPy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def restore_generators(states: GeneratorStates) -> None:
    """Put back what `generator_states` gave."""
    torch_state, numpy_state, python_state = states
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a while, and put back the states they had."""
    before = generator_states()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_generators(before)
