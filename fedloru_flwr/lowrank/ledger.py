"""The ledger: what has been accumulated, in order, each entry named by a digest of the whole past.

The root digest names ``W0``; an entry's digest is ``sha256(previous digest, scale, draw, factors)``. So the last digest
names the model's whole lineage, and two parties that hold the same digest hold the same model.

An entry may be coded: then its factors are what its bytes decode to, for everybody, the server included, and its bytes
are what travels and is kept.
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedloru_flwr.lowrank.codecs import Codec, CodecError
from fedloru_flwr.lowrank.factors import Adapter

CODED = "coded"  # the key of a coded entry's bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_tensors(tensors: Mapping[str, Tensor], *, salt: bytes = b"") -> str:
    """Return the SHA-256 (hexadecimal) of names, dtypes, shapes and values, independent of the dict's order.

    Tensors on the meta device, as in a plan, have no values to count.
    """
    digest = hashlib.sha256(salt)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        if tensor.numel() and not tensor.is_meta:
            tensor = tensor.cpu().contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor of them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(arrays: Mapping[str, Tensor]) -> bytes:
    """The bytes that travel in place of tensors.

    Raises:
        CodecError: if the tensors are something else.
    """
    if list(arrays) != [CODED] or arrays[CODED].dtype != torch.uint8 or arrays[CODED].dim() != 1:
        raise CodecError(f"expected one array {CODED!r} of bytes, got {', '.join(list(arrays)[:3]) or 'none'}")
    return arrays[CODED].numpy().tobytes()


@dataclass(frozen=True)
class Entry:
    """One accumulated adapter: the model gained ``scale * B A`` in every layer.

    Attributes:
        digest: names the lineage that ends with this entry.
        previous: the digest before it (the root's for the first).
        scale: ``s``.
        adapter: the factors; of a one-sided method ``B`` alone.
        draw: of a one-sided method the number of the draw that gives ``A``, see `frozen_a`; else 0.
        codec: by which the factors are coded; empty if they are not.
        coded: their bytes.
    """

    digest: str
    previous: str
    scale: float
    adapter: Adapter
    draw: int = 0
    codec: str = ""
    coded: bytes = b""

    @classmethod
    def after(cls, previous: str, adapter: Adapter, scale: float, draw: int = 0) -> "Entry":
        """Chain an adapter to the lineage ``previous``."""
        salt = previous.encode() + struct.pack("<dq", scale, draw)
        return cls(digest_tensors(adapter, salt=salt), previous, scale, adapter, draw)

    @classmethod
    def coded_after(cls, previous: str, adapter: Adapter, scale: float, draw: int, codec: Codec, seed: int) -> "Entry":
        """Code an adapter and chain what that leaves of it to the lineage ``previous``.

        Args:
            previous: the lineage before.
            adapter: the factors.
            scale: ``s``.
            draw: see `Entry`.
            codec: how they are coded.
            seed: of the rounding.
        """
        coded, arrived = codec.transmit(adapter, seed)
        return replace(cls.after(previous, arrived, scale, draw), codec=str(codec), coded=coded)

    def tensors(self) -> Adapter:
        """What is kept and sent of it: the factors, or their bytes."""
        return {CODED: as_tensor(self.coded)} if self.codec else self.adapter

    def nbytes(self) -> int:
        """The size of `tensors`."""
        return len(self.coded) if self.codec else sum(tensor.nbytes for tensor in self.adapter.values())

    def link(self) -> dict[str, Any]:
        """The entry without its tensors, as JSON can hold it."""
        link = {"digest": self.digest, "previous": self.previous, "scale": self.scale, "draw": self.draw}
        if self.codec:
            link["codec"] = self.codec
            link["shapes"] = {key: list(tensor.shape) for key, tensor in self.adapter.items()}
        return link

    @classmethod
    def linked(cls, raw: Mapping[str, Any], tensors: Adapter) -> "Entry":
        """The entry of a `link` and its `tensors`.

        Raises:
            ValueError: if it is malformed, or its digest does not belong to the content.
        """
        try:
            digest, previous, scale, draw = raw["digest"], raw["previous"], float(raw["scale"]), raw["draw"]
            codec, coded, adapter = str(raw.get("codec", "")), b"", tensors
            if codec:
                shapes = {str(key): tuple(map(int, shape)) for key, shape in raw["shapes"].items()}
                coded = bytes_of(tensors)
                adapter = Codec.parse(codec).decode(coded, shapes)
        except (KeyError, TypeError, OverflowError, AttributeError) as error:
            raise ValueError(f"a ledger entry lacks or mistypes {error}") from error
        if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (digest, previous)):
            raise ValueError(
                f"expected SHA-256 digests in hexadecimal, got {str(digest)[:80]!r}, {str(previous)[:80]!r}"
            )
        if type(draw) is not int or not 0 <= draw < 2**31:
            raise ValueError(f"expected the number of a draw, got {str(draw)[:40]!r}")
        entry = cls(digest, previous, scale, adapter, draw, codec, coded)
        entry.verify()
        return entry

    def verify(self) -> None:
        """Raise ``ValueError`` if the digest does not belong to the content."""
        if Entry.after(self.previous, self.adapter, self.scale, self.draw).digest != self.digest:
            raise ValueError(f"ledger entry {self.digest[:12]} does not match its content: it is corrupt or forged")


@dataclass(frozen=True)
class Ledger:
    """The accumulated entries in order; a value that is never changed.

    Attributes:
        root: the digest of ``W0``.
        entries: the entries, oldest first.
    """

    root: str
    entries: tuple[Entry, ...] = field(default=())

    @property
    def lineage(self) -> str:
        """The digest of the last entry, or the root's: the name of the model's whole past."""
        return self.entries[-1].digest if self.entries else self.root

    @property
    def version(self) -> int:
        """The number of accumulations."""
        return len(self.entries)

    def append(self, adapter: Adapter, scale: float, draw: int = 0) -> "Ledger":
        """Return the ledger with one entry more."""
        return self.extended(Entry.after(self.lineage, adapter, scale, draw))

    def extended(self, entry: Entry) -> "Ledger":
        """Return the ledger with an entry that follows its lineage."""
        return Ledger(self.root, (*self.entries, entry))

    def missing(self, held: str) -> tuple[Entry, ...] | None:
        """The entries that somebody at lineage ``held`` lacks, oldest first; None if ``held`` is not of this ledger."""
        if held == self.root:
            return self.entries
        for index, entry in enumerate(self.entries):
            if entry.digest == held:
                return self.entries[index + 1 :]
        return None
