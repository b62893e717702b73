"""Checkpoints: what a run needs to go on, a file for each, beside the parts that several of them share.

::

    checkpoints/
      round-000010.safetensors  round-000020.safetensors
      parts/<name>.safetensors

What grows with the run (the ledger's entries) is written once, as a part; a checkpoint names the parts it needs. Both
carry a digest of their content, so that a file which the disk has damaged is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloru_flwr import atomic
from fedloru_flwr.lowrank import digest_tensors

_NAME = re.compile(r"round-(\d+)\.safetensors")
_UNREADABLE = (SafetensorError, OSError, KeyError, ValueError)


class Checkpoint(NamedTuple):
    """What a run goes on from.

    Attributes:
        server_round: the round after which it was written.
        tensors: in their order.
        state: what JSON can hold.
        parts: the shared ones that it names, in its order.
    """

    server_round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are; made when first written to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parts = directory / "parts"

    def write(
        self,
        server_round: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, Tensor]],
        *,
        keep: int,
    ) -> Path:
        """See `RunDirectory.write_checkpoint`."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.write_parts(parts)
        path = self._directory / f"round-{server_round:06d}.safetensors"
        content = {"round": server_round, "names": list(tensors), "parts": list(parts), "state": state}
        text = json.dumps(content)
        metadata = {"checkpoint": text, "digest": _digest(tensors, text)}
        atomic.write_tensors(path, tensors, metadata)
        self._clean(server_round, keep)
        return path

    def write_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the parts that are not there yet, ahead of the checkpoint that will name them."""
        if odd := [name for name in parts if not name.isalnum()]:
            raise ValueError(f"a part's name may have letters and digits only, got {odd[0]!r}")
        self._directory.mkdir(exist_ok=True)
        for name, part in parts.items():
            path = self._part(name)
            if not path.exists():
                self._parts.mkdir(exist_ok=True)
                atomic.write_tensors(path, part, {"digest": digest_tensors(part)})

    def newest(self) -> Checkpoint | None:
        """Return the newest that can be read, or None if there is none.

        Raises:
            ValueError: there are some, but the disk has damaged all of them.
        """
        saved = self._saved()
        for path in reversed(saved.values()):
            try:
                tensors, metadata = _read_verified(path)
                content = json.loads(metadata["checkpoint"])
                ordered = {name: tensors[name] for name in content["names"]}
                parts = {name: self._read_part(name) for name in content["parts"]}
                return Checkpoint(content["round"], ordered, content["state"], parts)
            except _UNREADABLE as error:
                warnings.warn(f"checkpoint {path} cannot be read ({error}), taking the one before", stacklevel=3)
        if saved:
            raise ValueError(f"no checkpoint in {self._directory} can be read")
        return None

    def _part(self, name: str) -> Path:
        return self._parts / f"{name}.safetensors"

    def _read_part(self, name: str) -> dict[str, Tensor]:
        """Return a part; one that is damaged is removed, so that it is written again when it is next needed."""
        try:
            return _read_verified(self._part(name))[0]
        except (SafetensorError, KeyError, ValueError):
            self._part(name).unlink(missing_ok=True)
            raise

    def _saved(self) -> dict[int, Path]:
        """The files by round, oldest first."""
        found = {}
        for path in self._directory.glob("round-*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def _clean(self, server_round: int, keep: int) -> None:
        """Remove what is superseded, of an abandoned course, or left by a killed process."""
        atomic.remove_leftovers(self._directory)
        saved = self._saved()
        kept = [saved_round for saved_round in saved if saved_round <= server_round][-keep:]
        for saved_round, superseded in saved.items():
            if saved_round not in kept:
                superseded.unlink(missing_ok=True)
        if not self._parts.exists():
            return
        atomic.remove_leftovers(self._parts)
        needed = {name for saved_round in kept for name in _parts_of(saved[saved_round])}
        for path in self._parts.glob("*.safetensors"):
            if path.stem not in needed:
                path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of all that a file holds; of a part, which has no text, the digest of its tensors."""
    told = digest_tensors(tensors)
    return hashlib.sha256(f"{told}{text}".encode()).hexdigest() if text else told


def _read_verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = atomic.read_tensors(path)
    if metadata["digest"] != _digest(tensors, metadata.get("checkpoint", "")):
        raise ValueError(f"{path.name} does not match its digest")
    return tensors, metadata


def _parts_of(path: Path) -> list[str]:
    """The parts that a checkpoint names; none of one that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(json.loads(file.metadata()["checkpoint"])["parts"])
    except _UNREADABLE:
        return []
