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
scales of all rows (of a sparse tensor one), then the codes of all numbers, then the places of those that are kept,
counted through all tensors.
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
import numpy.typing as npt
import torch
from torch import Tensor

from fedloru_flwr.suggest import did_you_mean

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_MARGIN = 1e-3  # so that rounding up never leaves the range
_BLOCK = 1 << 16  # numbers that are rounded at a time, while they are in the processor's cache
_NOISE = 1 << 18
_LEAST_SHARE = 1e-4
_MOST_A_BYTE, _ALWAYS = 1 << 18, 1 << 20  # numbers that so many bytes can stand for: zeros that zstd has compressed
Floats = npt.NDArray[np.float32]
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
        if not _LEAST_SHARE <= self.keep <= 1:
            raise CodecError(f"topk:{self.keep:g}: expected a share of the numbers from {_LEAST_SHARE:g} to 1")
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
        stages = [f"topk:{self.keep!r}"] * (self.keep < 1) + [self.numbers] + ["zstd"] * self.lossless
        return "+".join(stages)

    @property
    def is_exact(self) -> bool:
        """Whether float32 tensors come back bit for bit."""
        return self.numbers == "float32" and self.keep == 1

    def size(self, shapes: Iterable[Sequence[int]]) -> int:
        """The bytes of tensors of these shapes: exactly, or with zstd at most."""
        return self._layout(shapes).size + self.lossless

    def _layout(self, shapes: Iterable[Sequence[int]]) -> "_Layout":
        return _layout(tuple(map(tuple, shapes)), self.keep, _BITS[self.numbers])

    def encode(self, tensors: Mapping[str, Tensor], seed: int) -> bytes:
        """The tensors as bytes, in the order given.

        A row that has a number which is not finite comes back as numbers that are not.

        Args:
            tensors: of floating point; wider ones than float32 are rounded to it.
            seed: of the rounding; the same gives the same bytes, on the CPU and on a GPU.
        """
        return self._encode(list(tensors.values()), seed)[0]

    def transmit(self, tensors: Mapping[str, Tensor], seed: int) -> tuple[bytes, dict[str, Tensor]]:
        """The tensors as bytes, and what these decode to."""
        data, numbers = self._encode(list(tensors.values()), seed)
        if numbers is None:
            return data, self.decode(data, {key: tensor.shape for key, tensor in tensors.items()})
        return data, dict(zip(tensors, numbers.split_up(), strict=True))

    @torch.no_grad()
    def _encode(self, tensors: Sequence[Tensor], seed: int) -> "tuple[bytes, _Numbers | None]":
        """The bytes and, where they are at hand, the numbers that they decode to."""
        layout = self._layout(tensor.shape for tensor in tensors)
        plain = [tensor.detach().float() for tensor in tensors]
        arrived: _Numbers | None = None
        if self.keep < 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in plain]) if plain else torch.empty(0)
            chosen = _chosen(flat, layout)
            parts, sent = self._quantised(_numpy(flat[chosen.to(flat.device)]), layout, seed)
            parts.append(_numpy(layout.places.write(chosen)))
            arrived = sent.at(chosen)
        elif layout.total <= _BLOCK:
            parts, arrived = self._quantised(layout.by_rows(plain), layout, seed)
        else:
            parts = self._of_large(plain, seed)
        data = b"".join(part.tobytes() for part in parts)
        return (_compressed(data) if self.lossless else data), arrived

    def _quantised(self, values: Floats, layout: "_Layout", seed: int) -> "tuple[list[Any], _Numbers]":
        """Numbers, row by row, as parts of the bytes; and what these stand for."""
        if self.numbers in _FLOATS:
            sent = torch.from_numpy(values).to(_FLOATS[self.numbers])
            return [_numpy(sent.view(torch.uint8))], _Numbers(sent.float().numpy(), layout)
        scales, codes = _quantise_small(values, layout.lengths, _BITS[self.numbers], seed)
        arrived = codes * np.repeat(scales, layout.lengths)
        return [scales, codes if self.numbers == "int8" else _write_nibbles(codes)], _Numbers(arrived, layout)

    def _of_large(self, tensors: Sequence[Tensor], seed: int) -> "list[Any]":
        """Tensors as parts of the bytes, one after the other: each is large enough to be worth it."""
        matrices = [_matrix(tensor) for tensor in tensors if tensor.numel()]
        if self.numbers in _FLOATS:
            return [_numpy(matrix.to(_FLOATS[self.numbers]).flatten().view(torch.uint8)) for matrix in matrices]
        dither = _Dither(seed)
        quantised = [_quantise(matrix, _BITS[self.numbers], dither) for matrix in matrices]
        codes = [_numpy(codes) for _, codes in quantised]
        if self.numbers == "int4":
            codes = [_write_nibbles(np.concatenate(codes))]
        return [*(_numpy(scales) for scales, _ in quantised), *codes]

    @torch.no_grad()
    def decode(self, data: bytes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors that were encoded, in float32 on the CPU; what was not sent is zero.

        Raises:
            CodecError: if the bytes are not those of tensors of these shapes.
        """
        total = sum(math.prod(shape) for shape in shapes.values())
        if total > _ALWAYS + _MOST_A_BYTE * len(data):
            raise CodecError(f"{len(data)} bytes cannot stand for {total} numbers")
        layout = self._layout(shapes.values())
        if self.lossless:
            data = _expanded(data, layout.size)
        if len(data) != layout.size:
            raise CodecError(f"{len(data)} bytes where {self} has {layout.size} for these shapes")
        numbers = _Numbers(self._read(data, layout), layout)
        if self.keep < 1:
            numbers = numbers.at(layout.places.read(np.frombuffer(data, np.uint8)[layout.size - layout.places.size :]))
        return dict(zip(shapes, numbers.split_up(), strict=True))

    def _read(self, data: bytes, layout: "_Layout") -> Floats:
        """All numbers that were sent, row by row."""
        if self.numbers in _FLOATS:
            with warnings.catch_warnings():  # torch says that one must not write to what it is lent
                warnings.simplefilter("ignore")
                sent = torch.frombuffer(data or b"\0", dtype=torch.uint8)[: layout.sent * _BITS[self.numbers] // 8]
            return sent.clone().view(_FLOATS[self.numbers]).float().numpy()
        scales = np.frombuffer(data, np.float32, len(layout.lengths))
        codes: Any
        if self.numbers == "int8":
            codes = np.frombuffer(data, np.int8, layout.sent, scales.nbytes)
        else:
            codes = _read_nibbles(np.frombuffer(data, np.uint8, -(-layout.sent // 2), scales.nbytes), layout.sent)
        if layout.sent <= _BLOCK or self.keep < 1:
            small: Floats = np.asarray(codes * np.repeat(scales, layout.lengths))
            return small
        numbers, at, row = np.empty(layout.sent, np.float32), 0, 0
        for rows, count in zip(layout.rows, layout.counts, strict=True):
            if count:  # a scale repeated for each number would take as much memory again
                into = numbers[at : at + count].reshape(rows, -1)
                np.multiply(codes[at : at + count].reshape(rows, -1), scales[row : row + rows, None], out=into)
            at, row = at + count, row + rows
        return numbers


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


def _numpy(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().numpy()


@dataclass(frozen=True)
class _Layout:
    """Where the numbers of tensors of some shapes go, as far as that follows from the shapes.

    Attributes:
        shapes: of the tensors.
        counts: of numbers in each.
        total: their sum.
        rows: of each tensor's matrix.
        kept: of each one's numbers.
        sent: their sum.
        lengths: of the rows that have a scale each.
        order: the place among all numbers of each one that is written, row by row; None: as they are.
        inverse: the place among those written of each one.
        places: the code of the places of those sent; of none where all are.
        size: of all in bytes.
    """

    shapes: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    total: int
    rows: tuple[int, ...]
    kept: tuple[int, ...]
    sent: int
    lengths: Any
    order: Any
    inverse: Any
    places: "_Places"
    size: int

    def by_rows(self, tensors: Sequence[Tensor]) -> Floats:
        """The numbers of tensors, row by row."""
        if not tensors:
            return np.empty(0, np.float32)
        flat: Floats = _numpy(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        return flat if self.order is None else flat[self.order]


@lru_cache(256)
def _layout(shapes: tuple[tuple[int, ...], ...], keep: float, bits: int) -> _Layout:
    counts = tuple(math.prod(shape) for shape in shapes)
    rows = tuple(map(_rows, shapes))
    kept = tuple(min(count, max(1, math.ceil(keep * count))) for count in counts)
    total, sent = sum(counts), sum(kept)
    if keep < 1:
        lengths = np.array([own for own in kept if own], np.int64)
    else:
        lengths = np.repeat([count // max(1, of) for of, count in zip(rows, counts, strict=True)], rows).astype(
            np.int64
        )
    order = inverse = None
    if keep == 1 and total <= _BLOCK:
        at = torch.split(torch.arange(total), list(counts)) if counts else ()
        written = [_matrix(one.view(shape)).flatten() for one, shape in zip(at, shapes, strict=True) if one.numel()]
        order = torch.cat(written).numpy() if written else np.empty(0, np.int64)
        inverse = np.argsort(order)
        if (order == np.arange(total)).all():
            order = inverse = None
    places = _Places(total, sent if keep < 1 else 0)
    size = -(-sent * bits // 8) + places.size + (4 * len(lengths) if bits < 16 else 0)
    return _Layout(shapes, counts, total, rows, kept, sent, lengths, order, inverse, places, size)


@dataclass(frozen=True)
class _Numbers:
    """What tensors decode to.

    Attributes:
        values: all numbers, row by row; or at their places.
        layout: of the tensors.
        is_placed: whether they are at their places.
    """

    values: Floats
    layout: _Layout
    is_placed: bool = False

    def at(self, places: Tensor) -> "_Numbers":
        """The numbers at their places, among zeros."""
        whole = np.zeros(self.layout.total, np.float32)
        whole[places.cpu().numpy()] = self.values
        return _Numbers(whole, self.layout, True)

    def split_up(self) -> list[Tensor]:
        """The tensors."""
        layout, values = self.layout, self.values
        by_rows = not self.is_placed and layout.total > _BLOCK
        if not self.is_placed and layout.inverse is not None:
            values = values[layout.inverse]
        flats = torch.split(torch.from_numpy(values), list(layout.counts))
        if by_rows:
            return [_unmatrix(flat, shape) for flat, shape in zip(flats, layout.shapes, strict=True)]
        return [flat.view(shape) for flat, shape in zip(flats, layout.shapes, strict=True)]


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


def _chosen(flat: Tensor, layout: _Layout) -> Tensor:
    """The places of what is sent of sparse tensors, ascending, on the CPU."""
    sizes, found, at = flat.abs(), [], 0
    if bool(sizes.isnan().any()):
        sizes = torch.where(sizes.isnan(), math.inf, sizes)
    for count, kept in zip(layout.counts, layout.kept, strict=True):
        if count:
            found.append(_largest(sizes[at : at + count], kept) + at)
        at += count
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def _largest(sizes: Tensor, kept: int) -> Tensor:
    """The places of the largest, ascending, on the CPU; of equal ones at the limit the first."""
    if kept == sizes.numel():
        return torch.arange(kept)
    if sizes.numel() <= _BLOCK:  # NumPy is much faster here
        numbers = _numpy(sizes)
        limit = np.partition(numbers, len(numbers) - kept)[len(numbers) - kept]
        chosen = numbers > limit
        chosen[np.flatnonzero(numbers == limit)[: kept - int(chosen.sum())]] = True
        return torch.from_numpy(np.flatnonzero(chosen))
    least = torch.topk(sizes, kept, sorted=False).values.min()
    above = sizes > least
    above[(sizes == least).nonzero().flatten()[: kept - int(above.sum())]] = True
    return above.nonzero().flatten().cpu()


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


def _quantise_small(flat: Floats, lengths: Any, bits: int, seed: int) -> tuple[Floats, Any]:
    """Scales of all rows and codes of all numbers in one go: small tensors cost more to address than to compute."""
    levels = np.float32(2 ** (bits - 1) - 1 - _MARGIN)
    if not len(lengths):
        return np.empty(0, np.float32), np.empty(0, np.int8)
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
    return scales, np.floor(scaled, out=scaled).astype(np.int8)


def _quantise(matrix: Tensor, bits: int, dither: _Dither) -> tuple[Tensor, Tensor]:
    """Scales ``(rows,)`` and int8 codes of every number, row by row."""
    levels = 2 ** (bits - 1) - 1 - _MARGIN
    largest = torch.maximum(matrix.amax(1), -matrix.amin(1))  # six times as fast as the norm
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


def _write_nibbles(codes: Any) -> Any:
    """Two codes of -7 to 7 a byte, the first in the upper half."""
    codes = codes.view(np.uint8)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(0))
    return (codes[::2] << 4) | (codes[1::2] & 15)


def _read_nibbles(data: Any, count: int) -> Any:
    codes = np.empty(2 * len(data), np.int8)
    signed = data.view(np.int8)
    codes[::2] = signed >> 4
    codes[1::2] = (signed << 4) >> 4
    return codes[:count]


@dataclass(frozen=True)
class _Places:
    """A code of ascending places, as Elias and Fano's or as one bit a place, whichever is less.

    Elias and Fano's: the lower bits as they are, the upper ones as the gaps of set bits.

    Attributes:
        count: of all places.
        kept: how many are coded.
    """

    count: int
    kept: int

    @property
    def _low(self) -> int:
        return max(0, (self.count // max(1, self.kept)).bit_length() - 1)

    @property
    def _high_bits(self) -> int:
        return self.kept + (self.count >> self._low) + 1

    @property
    def _coded_bytes(self) -> int:
        return -(-self.kept * self._low // 8) + -(-self._high_bits // 8)

    @property
    def _is_bitmap(self) -> bool:
        return self._coded_bytes >= -(-self.count // 8)

    @property
    def size(self) -> int:
        """In bytes."""
        return (-(-self.count // 8) if self._is_bitmap else self._coded_bytes) if self.kept else 0

    def write(self, places: Tensor) -> Tensor:
        """As bytes."""
        at = places.cpu().numpy()
        if not self.kept:
            return torch.empty(0, dtype=torch.uint8)
        if self._is_bitmap:
            bits = np.zeros(self.count, dtype=np.uint8)
            bits[at] = 1
            return torch.from_numpy(np.packbits(bits))
        low = (at[:, None] >> np.arange(self._low - 1, -1, -1)) & 1
        high = np.zeros(self._high_bits, dtype=np.uint8)
        high[(at >> self._low) + np.arange(self.kept)] = 1
        return torch.from_numpy(np.concatenate([np.packbits(low.astype(np.uint8)), np.packbits(high)]))

    def read(self, data: Any) -> Tensor:
        """The places.

        Raises:
            CodecError: if the bytes are not of as many places in this range.
        """
        if self._is_bitmap:
            (places,) = np.unpackbits(data, count=self.count).nonzero()
        else:
            low_bytes = -(-self.kept * self._low // 8)
            bits = np.unpackbits(data[:low_bytes], count=self.kept * self._low)
            low = bits.reshape(self.kept, self._low).astype(np.int64) @ (1 << np.arange(self._low - 1, -1, -1))
            (places,) = np.unpackbits(data[low_bytes:], count=self._high_bits).nonzero()
        if len(places) != self.kept:
            raise CodecError(f"the code of {self.kept} places has {len(places)} of them")
        if not self._is_bitmap:
            places = ((places - np.arange(self.kept)) << self._low) + low
            if (places[1:] <= places[:-1]).any() or (self.kept and places[-1] >= self.count):
                raise CodecError(f"the code of {self.kept} places of {self.count} has some twice, or beyond the last")
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
