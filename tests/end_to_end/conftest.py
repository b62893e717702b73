"""Helpers of the end-to-end tests."""

import json
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parent.parent / "apps" / "quickstart"


@pytest.fixture
def rows_of():
    """Read a run's metrics, apart from the times."""

    def read(run: Path) -> list[dict]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    return read


@pytest.fixture
def quickstart() -> Path:
    """An app that is not this package's."""
    return QUICKSTART
