"""A run's data as one file, so that its other processes map it into memory and need not read and partition it anew."""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fedloru_flwr import atomic
from fedloru_flwr.data.samples import DataConfig, DataSpec
from fedloru_flwr.data.sources import Source, Stored
from fedloru_flwr.environment import DATA

_MAX_BYTES = 2**31  # larger data are not worth a copy


def keep(config: DataConfig, source: Source, parts: tuple[np.ndarray, ...], path: Path) -> None:
    """Write the file, unless there is no room for it: nothing depends on it."""
    tensors = {
        "train_inputs": source.train.inputs,
        "train_labels": source.train.labels,
        "test_inputs": source.test.inputs,
        "test_labels": source.test.labels,
        "parts": torch.from_numpy(np.concatenate(parts)),
        "ends": torch.from_numpy(np.cumsum([len(part) for part in parts])),
    }
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_BYTES:
        return
    about = {"config": _digest(config), "spec": json.dumps(asdict(source.spec)), "notes": json.dumps(source.notes)}
    with contextlib.suppress(OSError):
        atomic.write_tensors(path, tensors, about, durable=False)


def kept(config: DataConfig) -> tuple[Source, tuple[np.ndarray, ...]] | None:
    """The source, without groups and kinds, and each client's indices, if the file of this process's run holds them."""
    path = os.environ.get(DATA)
    return _read(path, config) if path else None


@lru_cache(maxsize=2)
def _read(path: str, config: DataConfig) -> tuple[Source, tuple[np.ndarray, ...]] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("config") != _digest(config):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError):
        return None
    shape = json.loads(metadata["spec"])
    spec = DataSpec(tuple(shape["input_shape"]), shape["num_classes"])
    train = Stored(tensors["train_inputs"], tensors["train_labels"])
    parts = np.split(tensors["parts"].numpy(), tensors["ends"][:-1].tolist())
    for part in parts:
        part.setflags(write=False)
    test, notes = Stored(tensors["test_inputs"], tensors["test_labels"]), tuple(json.loads(metadata["notes"]))
    return Source(train, test, spec, (), notes=notes), tuple(parts)


def _digest(config: DataConfig) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
