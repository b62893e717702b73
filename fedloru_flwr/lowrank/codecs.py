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

Both sides know names and shapes, so that nothing but numbers travels, and the size follows from the shapes: first the
scales of all rows, then the codes of all numbers, then the places of those that are kept.
"""

import importlib.util
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
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
        scales = kept = places = 0
        for shape in shapes:
            count = math.prod(shape)
            if not count:
                continue
            own = self._kept(count)
            kept += own
            scales += _rows(shape) if own == count else 1
            places += 0 if own == count else min(_bitmap_bytes(count), _EliasFano(count, own).size)
        beside = 4 * scales if self.numbers in ("int8", "int4") else 0
        return beside + -(-kept * _BITS[self.numbers] // 8) + places + self.lossless

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
        matrices, places = self._matrices(tensors.values())
        if self.numbers in _FLOATS:
            parts = [matrix.to(_FLOATS[self.numbers]) for matrix in matrices]
        elif sum(matrix.numel() for matrix in matrices) <= _BLOCK:
            parts = _quantise_small(matrices, _BITS[self.numbers], seed)
        else:
            dither = _Dither(seed)
            quantised = [_quantise(matrix, _BITS[self.numbers], dither) for matrix in matrices]
            parts = [*(scales for scales, _ in quantised), *(codes for _, codes in quantised)]
        if self.numbers == "int4":
            count = len(matrices) if len(parts) > 2 else 1
            parts = [*parts[:-count], _write_nibbles(torch.cat(parts[-count:]))]
        data = b"".join(_bytes_of(part) for part in (*parts, *places))
        return _compressed(data) if self.lossless else data

    def _matrices(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What is sent of each tensor, as a matrix whose rows have scales; and the places of what is not all sent."""
        matrices, places = [], []
        for tensor in tensors:
            kept = self._kept(tensor.numel())
            if kept == tensor.numel():
                if kept:
                    matrices.append(_matrix(tensor.detach().float()))
                continue
            flat = tensor.detach().float().flatten()
            chosen = _largest(flat.abs(), kept)
            matrices.append(flat[chosen][None])
            code = _EliasFano(len(flat), kept)
            is_bitmap = code.size >= _bitmap_bytes(len(flat))
            places.append(_write_bitmap(chosen, len(flat)) if is_bitmap else code.write(chosen))
        return matrices, places

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
        sent = [(math.prod(shape), self._kept(math.prod(shape)), shape) for shape in shapes.values()]
        rows = [(_rows(shape) if kept == count else 1) if count else 0 for count, kept, shape in sent]
        counts = [kept for _, kept, _ in sent]
        numbers, end = self._numbers(data, rows, counts)
        reader, found = _Reader(data[end:] if self.keep < 1 else b""), {}
        for name, (count, kept, shape), flat in zip(shapes, sent, torch.split(numbers, counts), strict=True):
            if kept == count:
                found[name] = _unmatrix(flat, tuple(shape))
                continue
            code = _EliasFano(count, kept)
            is_bitmap = code.size >= _bitmap_bytes(count)
            written = reader.take(_bitmap_bytes(count) if is_bitmap else code.size)
            whole = torch.zeros(count)
            whole[_read_bitmap(written, count, kept) if is_bitmap else code.read(written)] = flat
            found[name] = whole.view(tuple(shape))
        return found

    def _numbers(self, data: bytes, rows: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, int]:
        """All numbers that were sent, row by row, and where their bytes end."""
        total, reader = sum(counts), _Reader(data)
        if self.numbers in _FLOATS:
            values = reader.take(total, _FLOATS[self.numbers]).float()
            return values, total * _BITS[self.numbers] // 8
        scales = reader.take(sum(rows), torch.float32)
        if self.numbers == "int8":
            codes = reader.take(total, torch.int8)
        else:
            codes = _read_nibbles(reader.take(-(-total // 2)), total)
        end = 4 * sum(rows) + -(-total * _BITS[self.numbers] // 8)
        if total <= _BLOCK:
            lengths = _lengths(tuple(zip(rows, counts, strict=True)))
            return torch.from_numpy(codes.numpy() * np.repeat(scales.numpy(), lengths)), end
        numbers = torch.empty(total)
        at = row = 0
        for of, count in zip(rows, counts, strict=True):
            if count:
                into, part = numbers[at : at + count].view(of, -1), codes[at : at + count].view(of, -1)
                torch.mul(part, scales[row : row + of, None], out=into)
            at, row = at + count, row + of
        return numbers, end


@dataclass(frozen=True)
class CodecSchedule:
    """A codec that may change over the rounds, written as ``int4`` or ``int4, 100: int8`` (from round 100 on).

    Attributes:
        steps: first rounds, ascending from 1, and codecs.
    """

    steps: tuple[tuple[int, Codec], ...] = ((1, Codec()),)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The schedule of this text.

        Raises:
            CodecError: if it makes no sense, with what is allowed.
        """
        steps = []
        for index, part in enumerate(text.split(",")):
            first, colon, name = part.partition(":")
            if not index:
                first, name = "1", part
            elif not (colon and first.strip().isdecimal()):
                raise CodecError(f"codec {text!r}: expected 'CODEC, ROUND: CODEC, ...', got {part.strip()!r}")
            steps.append((int(first), Codec.parse(name)))
        rounds = [first for first, _ in steps]
        if any(later <= earlier for earlier, later in pairwise(rounds)):
            raise CodecError(f"codec {text!r}: the rounds must ascend, from 2")
        return cls(tuple(steps))

    def __str__(self) -> str:
        (_, first), *later = self.steps
        return ", ".join([str(first), *(f"{begin}: {codec}" for begin, codec in later)])

    def at(self, server_round: int) -> Codec:
        """The codec of a round."""
        return next(codec for first, codec in reversed(self.steps) if first <= max(1, server_round))

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All of them, in order."""
        return tuple(codec for _, codec in self.steps)

    @property
    def is_exact(self) -> bool:
        """Whether float32 tensors always come back bit for bit."""
        return all(codec.is_exact for codec in self.codecs)

    @property
    def is_plain(self) -> bool:
        """Whether tensors travel as they are, in float32 and not compressed."""
        return all(codec == Codec() for codec in self.codecs)


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


def _unmatrix(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a `_matrix` that has been written row by row."""
    first, count = shape[0] if len(shape) > 1 else 1, flat.numel()
    if not count or first <= count // first:
        return flat.reshape(shape)
    return flat.view(count // first, first).T.reshape(shape)


@lru_cache(256)
def _lengths(of: tuple[tuple[int, int], ...]) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The length of every row of matrices of these numbers of rows and numbers."""
    return np.array([count // rows for rows, count in of for _ in range(rows)], dtype=np.int64)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def _largest(sizes: Tensor, kept: int) -> Tensor:
    """The places of the largest, ascending; of equal ones at the limit the first."""
    if sizes.isnan().any():
        sizes = torch.where(sizes.isnan(), math.inf, sizes)
    if sizes.numel() <= _BLOCK:  # NumPy is much faster here
        numbers = sizes.cpu().numpy()
        limit = np.partition(numbers, len(numbers) - kept)[len(numbers) - kept]
        above = numbers > limit
        above[np.flatnonzero(numbers == limit)[: kept - int(above.sum())]] = True
        return torch.from_numpy(np.flatnonzero(above)).to(sizes.device)
    least = torch.topk(sizes, kept, sorted=False).values.min()
    chosen = sizes > least
    chosen[(sizes == least).nonzero().flatten()[: kept - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


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


def _quantise_small(matrices: Sequence[Tensor], bits: int, seed: int) -> list[Tensor]:
    """Scales of all rows and codes of all numbers, at most `_BLOCK` of them, in one go: tensors this small cost more to
    address than to compute."""
    if not matrices:
        return [torch.empty(0), torch.empty(0, dtype=torch.int8)]
    levels = np.float32(2 ** (bits - 1) - 1 - _MARGIN)
    flat = np.concatenate([matrix.cpu().numpy().ravel() for matrix in matrices])
    lengths = _lengths(tuple((len(matrix), matrix.numel()) for matrix in matrices))
    largest = np.maximum.reduceat(np.abs(flat), np.cumsum(lengths) - lengths)
    is_finite = np.isfinite(largest)
    with np.errstate(all="ignore"):  # rows of zeros, and the smallest numbers there are, which have no reciprocal
        factor = levels / largest
        scales = np.where(is_finite, largest / levels, np.float32("nan"))
        factor[~(np.isfinite(factor) & is_finite)] = 0
        scaled = flat * np.repeat(factor, lengths)
    if not is_finite.all():
        scaled[~np.isfinite(scaled)] = 0
    scaled += np.random.Generator(np.random.PCG64(seed)).random(len(scaled), dtype=np.float32)
    codes = np.floor(scaled, out=scaled).astype(np.int8)
    return [torch.from_numpy(scales), torch.from_numpy(codes)]


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
        at = places.cpu().numpy()
        low = (at[:, None] >> np.arange(self._low - 1, -1, -1)) & 1
        high = np.zeros(self._high_bits, dtype=np.uint8)
        high[(at >> self._low) + np.arange(self.kept)] = 1
        return torch.from_numpy(np.concatenate([np.packbits(low.astype(np.uint8)), np.packbits(high)]))

    def read(self, data: Tensor) -> Tensor:
        """The places.

        Raises:
            CodecError: if the bytes are not of as many places in this range.
        """
        low_bytes = -(-self.kept * self._low // 8)
        bits = np.unpackbits(data.numpy()[:low_bytes], count=self.kept * self._low)
        low = bits.reshape(self.kept, self._low).astype(np.int64) @ (1 << np.arange(self._low - 1, -1, -1))
        (set_bits,) = np.unpackbits(data.numpy()[low_bytes:], count=self._high_bits).nonzero()
        if len(set_bits) != self.kept:
            raise CodecError(f"the code of {self.kept} places has {len(set_bits)} of them")
        places = ((set_bits - np.arange(self.kept)) << self._low) + low
        if (places[1:] <= places[:-1]).any() or places[-1] >= self.count:
            raise CodecError(f"the code of {self.kept} places of {self.count} has some twice, or beyond the last")
        return torch.from_numpy(places)


def _bitmap_bytes(count: int) -> int:
    return -(-count // 8)


def _write_bitmap(places: Tensor, count: int) -> Tensor:
    bits = np.zeros(count, dtype=np.uint8)
    bits[places.cpu().numpy()] = 1
    return torch.from_numpy(np.packbits(bits))


def _read_bitmap(data: Tensor, count: int, kept: int) -> Tensor:
    (places,) = np.unpackbits(data.numpy(), count=count).nonzero()
    if len(places) != kept:
        raise CodecError(f"the bitmap of {kept} places has {len(places)} of them")
    return torch.from_numpy(places)


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
