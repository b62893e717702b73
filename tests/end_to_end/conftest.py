"""Helpers of the end-to-end tests."""

from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parent.parent / "apps" / "quickstart"


@pytest.fixture
def quickstart() -> Path:
    """An app that is not this package's."""
    return QUICKSTART
