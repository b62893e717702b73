import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedloru_flwr.data import sources


@pytest.fixture(autouse=True)
def _fresh_source_cache() -> Iterator[None]:
    """Temporary paths may come back with other contents: forget the sources that other tests loaded."""
    yield
    sources._load_source.cache_clear()


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., str]:
    """Write rows (the first one the header) to a CSV file and return its path."""

    def write(*rows: tuple[object, ...], name: str = "data.csv") -> str:
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return str(tmp_path / name)

    return write


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., Path]:
    """Write a constant image of the given shape, grey (h, w) or RGB (h, w, 3), and return its path."""

    def write(name: str, value: int, shape: tuple[int, ...] = (2, 3)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)
        return path

    return write
