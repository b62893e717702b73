"""How many bytes a message takes, told from names, shapes and number formats alone.

What is computed here is what `fedloru_flwr.wire.content_bytes` counts on real records. A tensor is an Array object and
its data in chunks; a record refers to its parts by digests of fixed length; equal parts of one message are one object.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SType
from torch import Tensor

_ID = 64  # hexadecimal digits of an object's SHA-256
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_SAFETENSORS_ORDER = tuple(_SAFETENSORS_NAMES)


@dataclass(frozen=True)
class Sketch:
    """A tensor without its numbers.

    Attributes:
        shape: its shape.
        dtype: its number format.
        value: the number that all its elements are, such as 0, or a name that equal tensors share; None: a tensor that
            is like no other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    value: float | str | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "Sketch":
        """The sketch of a tensor; one on the meta device counts as like no other."""
        value = None
        if not tensor.is_meta and tensor.numel():
            flat = tensor.reshape(-1)
            # Most tensors are told by their beginning.
            value = float(flat[0]) if _is_constant(flat[:64]) and _is_constant(flat) else None
        return cls(tuple(tensor.shape), tensor.dtype, value)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return self.numel * self.dtype.itemsize

    def trained(self, equals: str | None = None) -> "Sketch":
        """The tensor after training or averaging: like those of the name ``equals``, or like no other."""
        return Sketch(self.shape, self.dtype, equals)


Sketches = Mapping[str, Sketch]


class Part(NamedTuple):
    """A part of an ArrayRecord: ``key`` tells equal parts; None: there is none equal."""

    key: object
    size: int


@dataclass(frozen=True)
class Blob:
    """Bytes of which only the number is known."""

    size: int


def arrays_bytes(tensors: Sketches) -> int:
    """The bytes of the ArrayRecord that `fedloru_flwr.wire.to_record` makes of tensors, with all its parts."""
    known: set[object] = set()
    size = count = 0
    for sketch in tensors.values():
        array, chunks = _array(sketch.shape, sketch.dtype, sketch.value)
        if array.key is not None and array.key in known:
            continue
        known.add(array.key)
        count += 1
        size += array.size
        for chunk in chunks:
            if chunk.key is None or chunk.key not in known:
                known.add(chunk.key)
                size += chunk.size
    return size + array_record_bytes(len(tensors), sum(map(name_characters, tensors)), count)


def array_record_bytes(names: int, characters: int, distinct: int) -> int:
    """The bytes of an ArrayRecord without its arrays.

    Args:
        names: of its arrays.
        characters: of all names together, see `name_characters`.
        distinct: how many of the arrays differ.
    """
    body = _object_bytes(names, characters)
    return _head_bytes(ArrayRecord, distinct, body) + body


def distinct_arrays_bytes(tensors: Iterable[Sketch]) -> int:
    """The bytes of arrays that are like no other, and of their chunks."""
    parts = (_array(sketch.shape, sketch.dtype, None) for sketch in tensors)
    return sum(array.size + sum(chunk.size for chunk in chunks) for array, chunks in parts)


def name_characters(name: str) -> int:
    """How many characters a name takes in JSON."""
    return len(json.dumps(name))


def content_bytes(records: Mapping[str, int]) -> int:
    """The bytes of a RecordDict: its own, and those of its records, which are given by name."""
    body = _object_bytes(len(records), sum(map(name_characters, records)))
    return _head_bytes(RecordDict, len(records), body) + body + sum(records.values())


def config_bytes(config: Mapping[str, object]) -> int:
    """The bytes of a ConfigRecord; a value may be a `Blob`."""
    return _flat_record_bytes(ConfigRecord, config)


def metrics_bytes(metrics: Mapping[str, float]) -> int:
    """The bytes of a MetricRecord of single numbers."""
    return _flat_record_bytes(MetricRecord, metrics)


def safetensors_bytes(tensors: Sketches, header: str | None = None) -> int:
    """The bytes of tensors serialised as safetensors, with the text that `fedloru_flwr.wire` puts into its metadata.

    Raises:
        ValueError: a number format that such tensors do not have.
    """
    described: dict[str, object] = {} if header is None else {"__metadata__": {"header": header}}
    offset = 0
    for name in sorted(tensors, key=lambda name: (_SAFETENSORS_ORDER.index(tensors[name].dtype), name)):
        sketch = tensors[name]
        described[name] = {
            "dtype": _SAFETENSORS_NAMES[sketch.dtype],
            "shape": list(sketch.shape),
            "data_offsets": [offset, offset + sketch.nbytes],
        }
        offset += sketch.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def _is_constant(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()
    return bool(low == high)


@lru_cache(maxsize=4096)
def _array(shape: tuple[int, ...], dtype: torch.dtype, value: float | str | None) -> tuple[Part, tuple[Part, ...]]:
    """The Array object of a tensor, and its distinct chunks."""
    # NumPy lacks bfloat16: such a tensor travels as integers of the same bits.
    sent = np.dtype("int16") if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(sent), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    total = header.tell() + math.prod(shape) * sent.itemsize
    numbers: list[int] = []
    chunks: list[Part] = []
    seen: dict[object, int] = {}
    for start in range(0, total, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE):
        length = min(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, total - start)
        # The first chunk begins with the header, which tells the shape.
        place = start if isinstance(value, str) else 0
        key = None if value is None else (sent.str, value, length, shape if start == 0 else None, place)
        if key is None or key not in seen:
            numbers.append(len(chunks))
            if key is not None:
                seen[key] = len(chunks)
            chunks.append(Part(key, _head_bytes(ArrayChunk, 0, length) + length))
        else:
            numbers.append(seen[key])
    meta = {"dtype": sent.name, "shape": shape, "stype": SType.NUMPY, "arraychunk_ids": numbers}
    body = len(json.dumps(meta))
    own = _head_bytes(Array, len(chunks), body) + body
    return Part(None if value is None else (shape, sent.str, value), own), tuple(chunks)


def _head_bytes(kind: type, children: int, body: int) -> int:
    """``<kind> <ids of the children> <length of the body>`` and the byte that ends it."""
    return len(kind.__name__) + 1 + max(0, children * (_ID + 1) - 1) + 1 + len(str(body)) + 1


def _object_bytes(names: int, characters: int) -> int:
    """A JSON object from names to digests."""
    return 2 + characters + names * (2 + _ID + 2) + max(0, names - 1) * 2


def _flat_record_bytes(kind: type, items: Mapping[str, object]) -> int:
    body = sum(_framed(size) for size in _items(items))
    return _head_bytes(kind, 0, body) + body


def _items(items: Mapping[str, object]) -> Iterator[int]:
    """The size of each item of a protocol buffer's map: a key and a value, one of several kinds."""
    for key, value in items.items():
        yield _framed(len(key.encode())) + _framed(_value(value))


def _value(value: object) -> int:
    if isinstance(value, bool):
        return 2
    if isinstance(value, int):
        return 1 + _varint(2 * value if value >= 0 else -2 * value - 1)
    if isinstance(value, float):
        return 9
    if isinstance(value, str):
        return _framed(len(value.encode()))
    if isinstance(value, bytes):
        return _framed(len(value))
    assert isinstance(value, Blob), type(value)
    return _framed(value.size)


def _framed(length: int) -> int:
    """A tag, a length and as many bytes."""
    return 1 + _varint(length) + length


def _varint(number: int) -> int:
    """Bytes of an unsigned number in groups of seven bits."""
    return max(1, -(-number.bit_length() // 7))


def total_nbytes(tensors: Iterable[Sketch]) -> int:
    """The bytes of the elements of several tensors."""
    return sum(sketch.nbytes for sketch in tensors)
