"""Bases and ledger entries by digest, on disk, memory-mapped.

One directory holds what a machine has received: ``bases/<lineage>.safetensors``, ``entries/<lineage>.safetensors`` and,
for every client that lives here, the lineage it holds and, by run and round, its own state. In a simulation all virtual
clients share the directory, while each one's holdings are tracked apart, as if it were a machine of its own; on a
deployed client it lies on its disk.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedloru_flwr import atomic
from fedloru_flwr.environment import STORE
from fedloru_flwr.lowrank import Entry, digest_tensors

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DEFAULT_BYTES = 4 * 2**30
_STATES_KEPT_SECONDS = 30 * 24 * 3600.0


class Holdings(NamedTuple):
    """What is noted of a client, of the models that descend from one root.

    Attributes:
        lineage: what it holds; None where nothing is noted.
        base: the lineage of the base that it was last sent, on which it stacks entries; the root if none was.
    """

    lineage: str | None
    base: str


def default_store() -> "Store":
    """A store in ``$FEDLORU_STORE``, as simulations have it; else in ``fedloru`` in Flower's home, and durable.

    Flower's home is ``$FLWR_HOME`` or ``~/.flwr``.
    """
    if explicit := os.environ.get(STORE):
        return _shared_store(explicit)
    home = os.environ.get("FLWR_HOME")
    return Store((Path(home) if home else Path.home() / ".flwr") / "fedloru")


@lru_cache(maxsize=8)
def _shared_store(path: str) -> "Store":
    return Store(Path(path), durable=False)


CHAINS_KEPT = 3  # ends of chains, the newest, for which a quarter of the store may be too little


class Store:
    """What one machine holds, addressed by lineage digests.

    Files appear complete or not at all, and several processes may use one directory. Old files go when the
    total exceeds ``max_bytes``; a client that misses one asks the server for it. Clients' own states nobody else has:
    above the same size those go that no round has touched for 30 days, and only where they are ``durable``.

    Args:
        path: the directory; it is made when first written to.
        max_bytes: size above which the least recently used files are removed.
        durable: clients' own states survive a power cut; the rest can be had again from the server.
    """

    def __init__(self, path: Path, max_bytes: int = _DEFAULT_BYTES, *, durable: bool = True) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.durable = durable

    def _file(self, kind: str, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"expected a SHA-256 digest in hexadecimal, got {digest[:80]!r}")
        return self.path / kind / f"{digest}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_tensors(path, tensors, metadata, durable=False)
        self._trim("*/*.safetensors", self.max_bytes, keep=path)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
                metadata = dict(file.metadata() or {})
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, RuntimeError):  # the last: torch's, for a file that has just gone
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return tensors, metadata

    def put_followed(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the Trainables at the end of a chain; of older ones what fits into a quarter of the store."""
        path = self._file("chains", digest)
        if path.exists():
            return
        self._write(path, tensors, {"digest": digest_tensors(tensors)})
        self._trim("chains/*.safetensors", self.max_bytes // 4, keep=path, newest=CHAINS_KEPT)

    def followed(self, digest: str) -> dict[str, Tensor] | None:
        """The Trainables at the end of a chain, or None; a damaged file is removed and counts as absent."""
        return self._checked(self._file("chains", digest))

    def put_base(self, lineage: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the frozen parameters that ``lineage`` names, unless they are here."""
        path = self._file("bases", lineage)
        if not path.exists():
            self._write(path, tensors, {"digest": digest_tensors(tensors)})

    def has_base(self, lineage: str) -> bool:
        """Whether the base that ``lineage`` names is here."""
        return self._file("bases", lineage).exists()

    def base(self, lineage: str) -> dict[str, Tensor] | None:
        """The frozen parameters that ``lineage`` names, or None; a damaged file is removed and counts as absent."""
        return self._checked(self._file("bases", lineage))

    def _checked(self, path: Path) -> dict[str, Tensor] | None:
        found = self._read(path)
        if found is None:
            return None
        tensors, metadata = found
        if metadata.get("digest") != digest_tensors(tensors):
            path.unlink(missing_ok=True)
            return None
        return tensors

    def put_entry(self, entry: Entry) -> None:
        """Keep a ledger entry, unless it is here."""
        path = self._file("entries", entry.digest)
        if not path.exists():
            self._write(path, entry.tensors(), {"link": json.dumps(entry.link())})

    def entry(self, digest: str) -> Entry | None:
        """The entry of this digest, or None; one that does not match its digest is removed and counts as absent."""
        path = self._file("entries", digest)
        found = self._read(path)
        if found is None:
            return None
        tensors, metadata = found
        try:
            entry = Entry.linked(json.loads(metadata["link"]), tensors)
        except (KeyError, ValueError):
            path.unlink(missing_ok=True)
            return None
        return entry if entry.digest == digest else None

    def _holdings(self, root: str, client: str) -> Path:
        name = hashlib.sha256(f"{root}\x1f{client}".encode()).hexdigest()
        return self.path / "clients" / f"{name}.txt"

    def holdings(self, root: str, client: str) -> Holdings:
        """What ``client`` holds of the models that descend from ``root``."""
        try:
            words = self._holdings(root, client).read_text().split()
        except (OSError, ValueError):
            return Holdings(None, root)
        if len(words) != 2 or not all(_DIGEST.fullmatch(word) for word in words):
            return Holdings(None, root)
        return Holdings(words[0], words[1])

    def set_holdings(self, root: str, client: str, holdings: Holdings) -> None:
        """Note what ``client`` holds now, and the base it has it from."""
        path = self._holdings(root, client)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, f"{holdings.lineage} {holdings.base}\n", durable=False)

    def _states(self, run: str, client: str) -> Path:
        return self.path / "states" / hashlib.sha256(f"{run}\x1f{client}".encode()).hexdigest()

    def put_state(self, run: str, client: str, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what ``client`` has of its own after a round: personal adapters, residuals, control variates."""
        path = self._states(run, client) / f"{server_round}.safetensors"
        first = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_tensors(path, tensors, {"digest": digest_tensors(tensors)}, durable=self.durable)
        if first and self.durable:
            self._trim_states(keep=path.parent)

    def state(self, run: str, client: str, server_round: int) -> dict[str, Tensor] | None:
        """What the client kept after exactly this round, or None; a damaged file counts as absent."""
        found = self._read(self._states(run, client) / f"{server_round}.safetensors")
        if found is None or found[1].get("digest") != digest_tensors(found[0]):
            return None
        return found[0]

    def forget_states(self, run: str, client: str, before: int) -> None:
        """Drop what the client kept of rounds before this one."""
        for path in self._states(run, client).glob("*.safetensors"):
            if path.stem.isdigit() and int(path.stem) < before:
                path.unlink(missing_ok=True)

    def _trim_states(self, keep: Path) -> None:
        """Drop the states of clients and runs long since over, oldest first, while all exceed ``max_bytes``."""
        now, found = time.time(), []
        for directory in (self.path / "states").iterdir():
            with contextlib.suppress(OSError):
                status = [file.stat() for file in directory.iterdir()]
                latest = max((one.st_mtime for one in status), default=0.0)
                found.append((latest, sum(one.st_size for one in status), directory))
        total = sum(size for _, size, _ in found)
        for latest, size, directory in sorted(found):
            if total <= self.max_bytes or now - latest < _STATES_KEPT_SECONDS:
                return
            if directory != keep:
                shutil.rmtree(directory, ignore_errors=True)
                total -= size

    def _trim(self, pattern: str, limit: int, *, keep: Path, newest: int = 0) -> None:
        """Drop the files of a pattern, oldest first, while all exceed a limit; but not one of them, nor the newest."""
        files = []
        for file in self.path.glob(pattern):
            with contextlib.suppress(OSError):  # another process has removed it
                status = file.stat()
                files.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files)[: max(0, len(files) - newest)]:
            if total <= limit:
                return
            if file != keep:
                file.unlink(missing_ok=True)
                total -= size
