r"""Fewer bytes for the same tensors: number formats, stochastic quantisation, sparsity and a lossless stage.

A codec is named by its stages, joined by ``+``::

    float32 | float16 | bfloat16 | int8 | int4     the numbers' format
    topk:F                                         of each tensor only the share F of the largest magnitudes
    zstd                                           what is left, losslessly compressed

as in ``int8``, ``topk:0.05+int4`` or ``topk:0.05+int8+zstd``. ``int8`` and ``int4`` scale every row by its largest
magnitude and round at random,

.. math:: q = \lfloor x / s + u \rfloor, \quad u \sim U[0, 1), \quad s = \max|x| / (2^{b-1} - 1 - \epsilon)

so that the expectation of ``s q`` is ``x`` (QSGD, arXiv 1610.02132). The rows are those of the tensor's matrix or of
its transpose, whichever are fewer: a factor ``B (out, r)`` has ``r`` of them. The places of what a sparse tensor keeps
are coded by Elias and Fano's method (about ``2 + log2(1 / F)`` bits each), or as one bit a place, whichever is less.

Both sides know names and shapes, so that nothing but numbers travels, and the size follows from the shapes.
"""

import importlib.util
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fedloru_flwr.suggest import did_you_mean

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_MARGIN = 1e-3  # so that rounding up never leaves the range
_BLOCK = 1 << 16  # numbers that are rounded at a time, while they are in the processor's cache
_NOISE = 1 << 18
_RAW, _PACKED = b"\x00", b"\x01"


class CodecError(ValueError):
    """A codec that is not known, or bytes that it cannot have written."""


@dataclass(frozen=True)
class Codec:
    """How tensors become bytes.

    Attributes:
        numbers: one of `FORMATS`.
        keep: share of each tensor's numbers that is sent, at least one of them; 1: all.
        lossless: whether the bytes are compressed by zstd, where that makes them fewer.

    Raises:
        CodecError: if it makes no sense, or if the zstandard library is missing.
    """

    numbers: str = "float32"
    keep: float = 1.0
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.numbers not in FORMATS:
            raise CodecError(_unknown(self.numbers))
        if not 0 < self.keep <= 1:
            raise CodecError(f"topk:{self.keep:g} keeps no share of the numbers: expected one above 0, up to 1")
        if self.lossless and importlib.util.find_spec("zstandard") is None:
            raise CodecError("zstd needs the zstandard library: pip install 'fedloru-flwr[zstd]'")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The codec of this name.

        Raises:
            CodecError: if there is none, with what is allowed.
        """
        found: dict[str, Any] = {}
        for stage in text.replace(" ", "").split("+"):
            name, has_share, share = stage.partition(":")
            new: dict[str, Any]
            if name in FORMATS:
                new = {"numbers": name}
            elif name == "zstd":
                new = {"lossless": True}
            elif name == "topk" and _NUMBER.fullmatch(share):
                new = {"keep": float(share)}
            else:
                raise CodecError(_unknown(stage))
            if bool(has_share) != (name == "topk") or new.keys() & found.keys():
                raise CodecError(
                    f"codec {text!r}: {stage!r} takes no number, or is of a kind that stands twice; {_ALLOWED}"
                )
            found |= new
        return cls(**found)

    def __str__(self) -> str:
        stages = [f"topk:{self.keep:g}"] * (self.keep < 1) + [self.numbers] + ["zstd"] * self.lossless
        return "+".join(stages)

    @property
    def is_exact(self) -> bool:
        """Whether float32 tensors come back bit for bit."""
        return self.numbers == "float32" and self.keep == 1

    def size(self, shapes: Iterable[Sequence[int]]) -> int:
        """The bytes of tensors of these shapes: exactly, or with zstd at most."""
        return sum(self._size(math.prod(shape), _rows(shape)) for shape in shapes) + self.lossless

    def _size(self, count: int, rows: int) -> int:
        kept = self._kept(count)
        places = 0 if kept == count else min(_bitmap_bytes(count), _EliasFano(count, kept).size)
        scales = 4 * (rows if kept == count else 1) if self.numbers in ("int8", "int4") else 0
        return scales + -(-kept * _BITS[self.numbers] // 8) + places if count else 0

    def _kept(self, count: int) -> int:
        return min(count, max(1, math.ceil(self.keep * count)))

    @torch.no_grad()
    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> bytes:
        """The tensors as bytes, in the order given.

        A row that has a number which is not finite comes back as numbers that are not.

        Args:
            tensors: of floating point; wider ones than float32 are rounded to it.
            seed: of the rounding; the same gives the same bytes, on the CPU and on a GPU.
        """
        dither = _Dither(seed) if self.numbers in ("int8", "int4") else None
        parts = [part for tensor in tensors.values() for part in self._encode(tensor.detach().float(), dither)]
        data = b"".join(part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in parts)
        return _compressed(data) if self.lossless else data

    def _encode(self, tensor: Tensor, dither: "_Dither | None") -> list[Tensor]:
        count = tensor.numel()
        if not count:
            return []
        kept = self._kept(count)
        if kept == count:
            return self._written(_matrix(tensor), dither)
        flat = tensor.flatten()
        places = _largest(flat.abs(), kept)
        code = _EliasFano(count, kept)
        written = code.write(places) if code.size < _bitmap_bytes(count) else _write_bitmap(places, count)
        return [*self._written(flat[places][None], dither), written]

    def _written(self, matrix: Tensor, dither: "_Dither | None") -> list[Tensor]:
        if dither is None:
            return [matrix.to(_FLOATS[self.numbers]).flatten()]
        scales, codes = _quantise(matrix, _BITS[self.numbers], dither)
        return [scales, codes if self.numbers == "int8" else _write_nibbles(codes)]

    @torch.no_grad()
    def decode(self, data: bytes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors that were encoded, in float32 on the CPU; what was not sent is zero.

        Raises:
            CodecError: if the bytes are not those of tensors of these shapes.
        """
        expected = self.size(shapes.values()) - self.lossless
        if self.lossless:
            data = _expanded(data, expected)
        if len(data) != expected:
            raise CodecError(f"{len(data)} bytes where {self} has {expected} for these shapes")
        reader = _Reader(data)
        return {name: self._decode(reader, tuple(shape)) for name, shape in shapes.items()}

    def _decode(self, reader: "_Reader", shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.zeros(shape)
        kept = self._kept(count)
        if kept == count:
            rows = _rows(shape)
            return _unmatrix(self._read(reader, rows, count // rows), shape)
        values = self._read(reader, 1, kept)[0]
        code = _EliasFano(count, kept)
        is_bitmap = code.size >= _bitmap_bytes(count)
        written = reader.take(_bitmap_bytes(count) if is_bitmap else code.size)
        flat = torch.zeros(count)
        flat[_read_bitmap(written, count, kept) if is_bitmap else code.read(written)] = values
        return flat.view(shape)

    def _read(self, reader: "_Reader", rows: int, length: int) -> Tensor:
        if self.numbers in _FLOATS:
            return reader.take(rows * length, _FLOATS[self.numbers]).float().view(rows, length)
        scales = reader.take(rows, torch.float32)
        if self.numbers == "int8":
            codes = reader.take(rows * length, torch.int8)
        else:
            codes = _read_nibbles(reader.take(-(-rows * length // 2)), rows * length)
        return codes.view(rows, length) * scales[:, None]


_NUMBER = re.compile(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?")
_ALLOWED = f"expected {', '.join(FORMATS)}, with topk:SHARE before and zstd after it where wanted, joined by +"


def _unknown(stage: str) -> str:
    return f"codec stage {stage!r} is not known, {_ALLOWED}" + did_you_mean(stage, (*FORMATS, "topk", "zstd"))


class _Reader:
    """Bytes taken from the front."""

    def __init__(self, data: bytes) -> None:
        with warnings.catch_warnings():  # torch says that one must not write to what it is lent
            warnings.simplefilter("ignore")
            self._data = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self._at = 0

    def take(self, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """The next so many numbers; they may lie in the message's bytes, and are only read."""
        start, self._at = self._at, self._at + count * dtype.itemsize
        taken = self._data[start : self._at]
        return (taken.clone() if dtype.itemsize > 1 else taken).view(dtype)  # a copy begins at a whole address


def _rows(shape: Sequence[int]) -> int:
    """The rows of a tensor's matrix, see `_matrix`."""
    first = shape[0] if len(shape) > 1 else 1
    count = math.prod(shape)
    return min(first, count // first) if count else 0


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as the matrix ``(first axis, others)`` or its transpose, whichever has fewer rows."""
    matrix = tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return matrix if len(matrix) <= matrix.shape[1] else matrix.T.contiguous()


def _unmatrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    first = shape[0] if len(shape) > 1 else 1
    return matrix.reshape(shape) if first <= math.prod(shape) // first else matrix.T.reshape(shape)


def _largest(sizes: Tensor, kept: int) -> Tensor:
    """The places of the largest, ascending; of equal ones at the limit the first."""
    sizes = torch.where(sizes.isnan(), math.inf, sizes)
    limit = torch.topk(sizes, kept, sorted=False).values.min()
    above = sizes > limit
    at_limit = (sizes == limit).nonzero().flatten()[: kept - int(above.sum())]
    above[at_limit] = True
    return above.nonzero().flatten()


class _Dither:
    """Numbers of ``U[0, 1)`` for rounding: slices of one supply, each from a place of its own.

    Every number's is uniform, which is all that an unbiased rounding needs; to draw one for each would take longer
    than everything else.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._supply = torch.rand(_NOISE, generator=self._generator)

    def take(self, count: int, device: torch.device) -> Tensor:
        """So many, at most `_BLOCK`."""
        self._supply = self._supply.to(device)
        start = int(torch.randint(_NOISE - count + 1, (), generator=self._generator))
        return self._supply[start : start + count]


def _quantise(matrix: Tensor, bits: int, dither: _Dither) -> tuple[Tensor, Tensor]:
    """Scales ``(rows,)`` and int8 codes of every number, row by row."""
    levels = 2 ** (bits - 1) - 1 - _MARGIN
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=1)
    is_finite = largest.isfinite()
    factor = torch.where(is_finite & (largest > 0), levels / largest, 0.0)
    scales = torch.where(is_finite, largest / levels, math.nan)
    # The smallest numbers there are have no reciprocal: their rows are zero.
    factor = torch.where(factor.isfinite(), factor, 0.0)
    if not bool(is_finite.all()):
        matrix = torch.where(is_finite[:, None], matrix, 0.0)
    rows, length = matrix.shape
    codes = torch.empty(rows, length, dtype=torch.int8, device=matrix.device)
    high, wide = max(1, _BLOCK // length), min(length, _BLOCK)
    space = torch.empty(min(rows, high) * wide, device=matrix.device)
    for top in range(0, rows, high):
        for left in range(0, length, wide):
            block = matrix[top : top + high, left : left + wide]
            scaled = space[: block.numel()].view(block.shape)
            torch.mul(block, factor[top : top + high, None], out=scaled)
            scaled += dither.take(block.numel(), block.device).view(block.shape)
            codes[top : top + high, left : left + wide] = scaled.floor_()
    return scales, codes.flatten()


def _write_nibbles(codes: Tensor) -> Tensor:
    """Two codes of -7 to 7 a byte, the first in the upper half."""
    codes = codes.view(torch.uint8)
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return (codes[::2] << 4) | (codes[1::2] & 15)


def _read_nibbles(data: Tensor, count: int) -> Tensor:
    codes = torch.stack([data >> 4, data & 15], dim=1).flatten()[:count].view(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


@dataclass(frozen=True)
class _EliasFano:
    """Ascending places below ``count``: their lower bits as they are, the upper ones as the gaps of set bits.

    Attributes:
        count: of all places.
        kept: how many are coded.
    """

    count: int
    kept: int

    @property
    def _low(self) -> int:
        return max(0, (self.count // self.kept).bit_length() - 1)

    @property
    def _high_bits(self) -> int:
        return self.kept + (self.count >> self._low) + 1

    @property
    def size(self) -> int:
        """In bytes."""
        return -(-self.kept * self._low // 8) + -(-self._high_bits // 8)

    def write(self, places: Tensor) -> Tensor:
        """As bytes."""
        shifts = torch.arange(self._low - 1, -1, -1, device=places.device)
        low = (places[:, None] >> shifts) & 1
        high = torch.zeros(self._high_bits, dtype=torch.uint8, device=places.device)
        high[(places >> self._low) + torch.arange(self.kept, device=places.device)] = 1
        return torch.cat([_pack_bits(low.flatten().to(torch.uint8)), _pack_bits(high)])

    def read(self, data: Tensor) -> Tensor:
        """The places.

        Raises:
            CodecError: if the bytes are not of as many places in this range.
        """
        low_bytes = -(-self.kept * self._low // 8)
        low = _unpack_bits(data[:low_bytes])[: self.kept * self._low].view(self.kept, self._low).long()
        set_bits = _unpack_bits(data[low_bytes:])[: self._high_bits].nonzero().flatten()
        if len(set_bits) != self.kept:
            raise CodecError(f"the code of {self.kept} places has {len(set_bits)} of them")
        high = set_bits - torch.arange(self.kept)
        shifts = torch.arange(self._low - 1, -1, -1)
        places = (high << self._low) + (low << shifts).sum(1)
        if bool((places[1:] <= places[:-1]).any()) or int(places[-1]) >= self.count:
            raise CodecError(f"the code of {self.kept} places of {self.count} has some twice, or beyond the last")
        return places


def _bitmap_bytes(count: int) -> int:
    return -(-count // 8)


def _write_bitmap(places: Tensor, count: int) -> Tensor:
    bits = torch.zeros(count, dtype=torch.uint8, device=places.device)
    bits[places] = 1
    return _pack_bits(bits)


def _read_bitmap(data: Tensor, count: int, kept: int) -> Tensor:
    places = _unpack_bits(data)[:count].nonzero().flatten()
    if len(places) != kept:
        raise CodecError(f"the bitmap of {kept} places has {len(places)} of them")
    return places


def _pack_bits(bits: Tensor) -> Tensor:
    """Bits as bytes, the first in the highest place."""
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8, device=bits.device)
    for place in range(8):
        packed |= bits[:, place] << (7 - place)
    return packed


def _unpack_bits(data: Tensor) -> Tensor:
    return ((data[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1).flatten()


def _compressed(data: bytes) -> bytes:
    import zstandard

    packed: bytes = zstandard.ZstdCompressor(level=3).compress(data)
    return _PACKED + packed if len(packed) < len(data) else _RAW + data


def _expanded(data: bytes, size: int) -> bytes:
    """What was compressed, of this size; a frame that says otherwise is not expanded."""
    if data[:1] == _RAW:
        return data[1:]
    if data[:1] != _PACKED:
        raise CodecError("the bytes do not begin as those of zstd's stage")
    import zstandard

    try:
        told = zstandard.frame_content_size(data[1:])
        if told != size:
            raise CodecError(f"a frame of {told} bytes where there should be {size}")
        expanded: bytes = zstandard.ZstdDecompressor().decompress(data[1:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd cannot read the bytes: {error}") from error
    return expanded
