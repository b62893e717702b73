"""Small Flower apps that tests write down and run, and the processes that such a run starts."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

_TAG = "SMALL_APP_TAG"
_PYPROJECT = """
[project]
name = "small-app"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "tests"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "small_app:server"
clientapp = "small_app:client"

[tool.flwr.app.config]
"""


def write_app(directory: Path, code: str, config: str = "") -> Path:
    """Write an app whose module defines ``server`` and ``client``, its run config in TOML; return its directory."""
    directory.mkdir()
    (directory / "pyproject.toml").write_text(_PYPROJECT + config)
    (directory / "LICENSE").write_text("None.")
    (directory / "small_app.py").write_text(code)
    return directory


@contextmanager
def a_tag() -> Iterator[dict[str, str]]:
    """Give a variable for a run's processes; they are all gone when the test is over."""
    value = {_TAG: uuid.uuid4().hex}
    yield value
    assert not tagged(value), "the test left processes behind"


def tagged(tag: Mapping[str, str]) -> list[psutil.Process]:
    """The processes that have the variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, a zombie, or another user's
            if process.environ().get(_TAG) == tag[_TAG]:
                found.append(process)
    return found
