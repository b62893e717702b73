"""Run a Flower app of a directory in this process, leaving nothing in it, and count the bytes that it sends."""

import contextlib
import importlib
import io
import re
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedloru_flwr import wire
from fedloru_flwr.engines.in_process import InProcessGrid, serve, store_at

_LOCK = threading.Lock()  # Flower's legacy server sends from many threads at once
_ROUND = re.compile(r"round (\d+): loss ([\d.]+)(?:, accuracy ([\d.]+))?")


@dataclass
class AppRun:
    """What came of it: what the app said of each round, and bytes by kind of message and direction."""

    losses: dict[int, float]
    accuracies: dict[int, float]
    sent: Counter[tuple[str, str]]
    output: str

    @property
    def bytes_sent(self) -> int:
        return sum(self.sent.values())


class CountingGrid(InProcessGrid):
    """Counts the content of every message and of its reply, as Flower serialises it."""

    sent: Counter[tuple[str, str]]

    def _handle(self, message: Message) -> Message:
        with _LOCK:
            self._count("down", message)
            reply = super()._handle(message)
            self._count("up", reply)
        return reply

    def _count(self, direction: str, message: Message) -> None:
        if not message.has_error():
            self.sent[message.metadata.message_type, direction] += wire.content_bytes(message.content)


@contextlib.contextmanager
def modules_of(directory: Path) -> Iterator[None]:
    """Import from a directory; afterwards its modules are forgotten, so that others may have their names."""
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{directory}/"):
                del sys.modules[name]


def config_of(directory: Path) -> dict[str, Any]:
    """The table that Flower reads of an app's pyproject.toml."""
    return tomllib.loads((directory / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


def load(reference: str) -> Any:
    """The object that ``module:name`` means."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def run_app(directory: Path, num_supernodes: int, scratch: Path) -> AppRun:
    """Run the app of a directory with its own run config.

    Args:
        directory: of its pyproject.toml.
        num_supernodes: number of clients.
        scratch: where clients keep what they hold.
    """
    config, output = config_of(directory), io.StringIO()
    with modules_of(directory), store_at(scratch), contextlib.redirect_stdout(output):
        server_app, client_app = (load(config["components"][name]) for name in ("serverapp", "clientapp"))
        grid = CountingGrid(client_app, num_supernodes, config["config"])
        grid.sent = Counter()
        serve(server_app, grid, config["config"])
    rounds = _ROUND.findall(output.getvalue())
    return AppRun(
        losses={int(number): float(loss) for number, loss, _ in rounds},
        accuracies={int(number): float(accuracy) for number, _, accuracy in rounds if accuracy},
        sent=grid.sent,
        output=output.getvalue(),
    )


def tree_of(directory: Path) -> dict[str, bytes]:
    """The files of a directory, without what Python leaves."""
    paths: Iterable[Path] = sorted(directory.rglob("*"))
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }
