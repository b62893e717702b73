"""The directory that `flwr run` is pointed at: the checkout, or a small app around the installed package."""

import importlib.metadata
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

import fedloru_flwr
from fedloru_flwr.config import RunConfig

DISTRIBUTION = "fedloru-flwr"
FLOWER_VERSION = "1.41.0"


def checkout() -> Path | None:
    """The checkout this package is imported from, or None where it is installed."""
    root = Path(fedloru_flwr.__file__).parent.parent
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None
    return root if project.get("name") == DISTRIBUTION else None


@contextmanager
def flower_app() -> Iterator[Path]:
    """Yield a directory with a Flower app that runs this package's ServerApp and ClientApp."""
    if (root := checkout()) is not None:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="fedloru-app-") as temporary:
        write_app(Path(temporary))
        yield Path(temporary)


def write_app(directory: Path) -> None:
    """Write an app of two modules that import the installed package's apps, with all settings' defaults."""
    package = directory / "fedloru_app"
    package.mkdir()
    (package / "__init__.py").write_text('"""A Flower app around the installed package."""\n')
    for side in ("server_app", "client_app"):
        (package / f"{side}.py").write_text(
            f'"""The {side} of the installed package."""\n\nfrom fedloru_flwr.{side} import app\n\n__all__ = ["app"]\n'
        )
    (directory / "LICENSE").write_text("Apache-2.0\n")
    project = {
        "project": {
            "name": "fedloru-app",
            "version": importlib.metadata.version(DISTRIBUTION),
            "description": "fedloru-flwr, as installed",
            "license": {"file": "LICENSE"},
            "dependencies": [f"flwr>={FLOWER_VERSION}"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedloru",
                    "fab-format-version": 1,
                    "flwr-version-target": FLOWER_VERSION,
                    "components": {
                        "serverapp": "fedloru_app.server_app:app",
                        "clientapp": "fedloru_app.client_app:app",
                    },
                    "config": RunConfig().as_mapping(),
                }
            }
        },
    }
    (directory / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
