"""Files that are whole or absent, whenever the process that writes them is killed.

A file is written under a temporary name in its own directory, flushed to the disk and renamed over the old one.
A line is appended by one write. What a killed process left behind is removed by the next write of the same name.
One process at a time writes a file; any number may read it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import platform
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# In the order of the safetensors library, whose files start with the last of them.
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_HOST = hashlib.sha256(f"{platform.node()} {uuid.getnode()}".encode()).hexdigest()[:12]
_DTYPE_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what was there in one step."""
    _write_chunks(Path(path), (data,))


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = True) -> None:
    """Write ``text`` as UTF-8, line ends as they are; for ``durable`` see `write_tensors`."""
    _write_chunks(Path(path), (text.encode(),), durable=durable)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as JSON: keys in their order, two spaces of indent, a final newline, NaN and infinity as null."""
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write a safetensors file, the same bytes for the same tensors and metadata.

    What is not ``durable`` is whole or absent after a kill, but not surely after a power cut: for files that can be
    had again. It is not waited for, and a killed process's leftover stays.

    The library's own ``save_file`` is not used: it renames a temporary file of its own choosing, which a kill
    leaves behind, makes the file unreadable to others, and orders the metadata at random. Tensors may be on any
    device, strided, or share their storage.

    Raises:
        TypeError: a tensor's dtype has no safetensors name.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"tensor {name!r} is {tensor.dtype}, which safetensors files cannot hold")
    names = sorted(tensors, key=lambda name: (-_DTYPE_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # so that the data are aligned
    chunks = (_raw(tensors[name]) for name in names)
    _write_chunks(Path(path), (len(head).to_bytes(8, "little"), head), chunks, durable=durable)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (copies in memory, names sorted) and the metadata of a safetensors file."""
    with safe_open(os.fspath(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        return tensors, dict(file.metadata() or {})


def append_line(path: str | os.PathLike[str], obj: Any) -> None:
    """Append ``obj`` as one line of JSON, after removing an incomplete last line that a kill may have left."""
    path = Path(path)
    line = _line(obj)
    is_new = not path.exists()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        complete = _complete_part(path.read_bytes())
        if os.fstat(descriptor).st_size > len(complete):
            os.ftruncate(descriptor, len(complete))
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, len(complete))
            raise OSError(f"{path}: no room for another line")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        _sync_directory(path.parent)


def write_lines(path: str | os.PathLike[str], objs: Iterable[Any]) -> None:
    """Write one line of JSON for each object, replacing the whole file in one step."""
    write_bytes(path, b"".join(_line(obj) for obj in objs))


def read_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Return the objects of a file of JSON lines, without an incomplete last line; none if there is no file.

    Raises:
        ValueError: a complete line is not JSON; names the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return []
    objs = []
    for number, line in enumerate(_complete_part(path.read_bytes()).splitlines(), start=1):
        try:
            objs.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return objs


def remove_leftovers(directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in ``directory``, for one file name or for all."""
    pattern = f".{glob.escape(name)}.*.tmp" if name is not None else ".*.tmp"
    for leftover in Path(directory).glob(pattern):
        host, _, process_id = leftover.name.split(".")[-2].rpartition("-")
        if host == _HOST and process_id.isdigit() and not _is_running(int(process_id)):
            _unlink_if_possible(leftover)


def temporary_path(path: Path) -> Path:
    """Return the name under which this process prepares ``path``: ``.<name>.<host>-<pid>.tmp`` beside it.

    Machines and containers that share a directory have process ids in common, but not the host.
    """
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")


def _write_chunks(path: Path, *parts: Iterable[bytes | memoryview], durable: bool = True) -> None:
    if durable:
        remove_leftovers(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.writelines(part)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        _unlink_if_possible(temporary)
        raise
    if durable:
        _sync_directory(path.parent)


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def _line(obj: Any) -> bytes:
    return json.dumps(_plain(obj), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _complete_part(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _plain(value: Any) -> Any:
    """Return ``value`` with numpy and torch scalars as Python's, and null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_running(process_id: int) -> bool:
    if os.name == "nt":
        return False  # signal 0 is an event there; but a file in use cannot be removed there either
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _unlink_if_possible(path: Path) -> None:
    with contextlib.suppress(OSError):  # in use elsewhere, or not ours: harmless
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut, where the system allows it."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(descriptor)
