"""The toy federation for every test here, and the surroundings that it has there."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "strategies"))  # for toy_federation


@pytest.fixture(autouse=True)
def surroundings(fresh_process, quick_books):
    """What every test here has."""
