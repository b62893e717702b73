"""The directory that `flwr run` is pointed at: a pyproject.toml that names the installed package's apps.

It needs no code of its own, so that a run submits in a second, from a checkout as from an installed wheel.
"""

import importlib.metadata
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedloru_flwr.config import RunConfig

DISTRIBUTION = "fedloru-flwr"
FLOWER_VERSION = "1.41.0"


def app_table() -> dict[str, Any]:
    """The ``[tool.flwr.app]`` table of this package, with every setting's default."""
    return {
        "publisher": "fedloru",
        "fab-format-version": 1,
        "flwr-version-target": FLOWER_VERSION,
        "components": {"serverapp": "fedloru_flwr.server_app:app", "clientapp": "fedloru_flwr.client_app:app"},
        "config": RunConfig().as_mapping(),
    }


@contextmanager
def flower_app() -> Iterator[Path]:
    """Yield a temporary directory with a Flower app that runs this package's ServerApp and ClientApp."""
    with tempfile.TemporaryDirectory(prefix="fedloru-app-") as temporary:
        directory = Path(temporary)
        project = {
            "name": DISTRIBUTION,
            "version": importlib.metadata.version(DISTRIBUTION),
            "description": "fedloru-flwr, as installed",
            "license": {"file": "LICENSE"},
            "dependencies": [f"flwr>={FLOWER_VERSION}"],
        }
        content = {"project": project, "tool": {"flwr": {"app": app_table()}}}
        (directory / "pyproject.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
        (directory / "LICENSE").write_text("Apache-2.0\n")
        yield directory
