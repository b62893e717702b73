"""Load what a server or one client works with."""

from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from fedloru_flwr.data.kept import keep, kept
from fedloru_flwr.data.partitioning import partition
from fedloru_flwr.data.samples import ClientData, DataConfig, DataSpec, Samples, check, fault, generator
from fedloru_flwr.data.sources import Source, encode, load_source, read_own, read_own_sequences


def validate(config: DataConfig) -> None:
    """Check everything that can be checked before a client starts: the settings, the source, the partitions.

    Raises:
        DataError: a setting is unknown or impossible, the source cannot be read, all training samples have
            one label, or the samples do not go round. The message says how to mend it.
    """
    partition_indices(config)
    source = _source(config)
    if config.text != "causal-lm" and bool((source.train.labels == source.train.labels[0]).all()):
        problem = f"all {len(source.train.labels)} training samples have the same label"
        raise fault("label-column", config.label_column, problem, "Give samples of two classes or more")


def load_central(config: DataConfig) -> tuple[Samples, DataSpec]:
    """Return the central test samples: the source's ``test`` split, else a fixed ``test_fraction`` of it.

    Raises:
        DataError: see `validate`.
    """
    check(config)
    source = _source(config)
    return source.test.samples(), source.spec


def notes(config: DataConfig) -> tuple[str, ...]:
    """What was left out of the data, for people."""
    return _source(config).notes


def share(config: DataConfig, path: Path) -> None:
    """Write the data and the partitions into a file for a run's other processes, where there is room for it.

    Raises:
        DataError: see `validate`.
    """
    check(config)
    keep(config, load_source(config), _partition(config), path)


def partition_indices(config: DataConfig) -> list[np.ndarray]:
    """Return the indices into the training part of each client's samples (ascending, read-only).

    Together they hold every index once. They depend on the settings only, not on any global random state.

    Raises:
        DataError: see `validate`.
    """
    check(config)
    return list(_partition(config))


def load_client(config: DataConfig, partition_id: int) -> tuple[ClientData, DataSpec]:
    """Return the samples of client ``partition_id``, for a simulation.

    ``held_out_fraction`` of them, at least one and not all, are held out; which ones depends on
    ``(seed, partition_id)`` only. Both parts are shuffled.

    Raises:
        DataError: ``partition_id`` is not in ``0..num_clients-1``; for the rest see `validate`.
    """
    found = _clients.get(config, partition_id)
    if found is None:
        check(config)
        if not 0 <= partition_id < config.num_clients:
            problem = f"with num-clients = {config.num_clients} they go from 0 to {config.num_clients - 1}"
            raise fault("partition-id", partition_id, problem, "Start as many SuperNodes as num-clients says")
        found = _client(config, partition_id), _source(config).spec
        _clients.put(config, partition_id, found)
    return found


def load_own(path: str | Path, config: DataConfig) -> tuple[ClientData, DataSpec]:
    """Return the samples in a client's own file or folder, for a deployment: all are its own.

    Its ``test`` split, where it has one, is held out; else ``held_out_fraction`` of the samples, at least
    one and not all. Since a client may lack a class, the order of the classes cannot be told from its own
    samples: ``classes`` or ``num_classes`` must say it, unless the file itself declares the class names.

    Raises:
        DataError: the path cannot be read, has fewer than two samples, or has a label out of place.
    """
    check(replace(config, dataset="local", data_path=str(path)))
    return _own(str(path), config)


def _source(config: DataConfig) -> Source:
    found = kept(config)
    return load_source(config) if found is None else found[0]


@lru_cache(maxsize=4)
def _partition(config: DataConfig) -> tuple[np.ndarray, ...]:
    if (found := kept(config)) is not None:
        return found[1]
    source = load_source(config)
    parts = partition(source.classes(config).numpy(), source.groups, config)
    for part in parts:
        part.setflags(write=False)
    return tuple(parts)


def _client(config: DataConfig, partition_id: int) -> ClientData:
    samples = _source(config).train.samples(_partition(config)[partition_id])
    return _hold_out(samples, config, generator("client", config.seed, partition_id))


class _Clients:
    """The samples of the clients that were asked for last, which are drawn again and again, up to a size in bytes."""

    limit = 128 * 2**20

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[DataConfig, int], tuple[ClientData, DataSpec]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, config: DataConfig, partition_id: int) -> tuple[ClientData, DataSpec] | None:
        """A client's samples, if they are here."""
        with self._lock:
            if (found := self._found.get((config, partition_id))) is not None:
                self._found.move_to_end((config, partition_id))
            return found

    def put(self, config: DataConfig, partition_id: int, found: tuple[ClientData, DataSpec]) -> None:
        """Keep a client's samples, and let go of others where there is no room for them."""
        with self._lock:
            if (config, partition_id) not in self._found:
                self._found[config, partition_id] = found
                self._bytes += _size(found[0])
            while self._bytes > self.limit:
                _, (gone, _) = self._found.popitem(last=False)
                self._bytes -= _size(gone)


def _size(data: ClientData) -> int:
    return sum(part.inputs.nbytes + part.labels.nbytes for part in (data.train, data.held_out))


_clients = _Clients()


@lru_cache(maxsize=2)
def _own(path: str, config: DataConfig) -> tuple[ClientData, DataSpec]:
    if config.text == "causal-lm":
        return _own_sequences(path, config)
    splits = read_own(path, config)
    if not (config.classes or config.num_classes or splits["train"].class_names):
        problem = "the order of the classes cannot be told from the samples of one client"
        raise fault("num-classes", 0, problem, "Set num-classes for integer labels, or classes for names")
    stored, spec = encode(splits, config)
    train = stored["train"].samples()
    if "test" in stored:
        return ClientData(train, stored["test"].samples()), spec
    if len(train) < 2:
        raise fault("data-path", path, "it has a single sample", "Give one to train on and one to hold out")
    return _hold_out(train, config, generator("own", config.seed)), spec


def _own_sequences(path: str, config: DataConfig) -> tuple[ClientData, DataSpec]:
    stored, spec = read_own_sequences(path, config), DataSpec((config.max_length,), 0)
    train = stored["train"].samples()
    if "test" in stored:
        return ClientData(train, stored["test"].samples()), spec
    if len(train) < 2:
        raise fault("data-path", path, "it has a single sample", "Give one to train on and one to hold out")
    return _hold_out(train, config, generator("own", config.seed)), spec


def held_out_count(count: int, fraction: float) -> int:
    """How many of ``count`` samples a client holds out: about ``fraction`` of them, at least one and not all."""
    return min(max(1, round(fraction * count)), count - 1)


def _hold_out(samples: Samples, config: DataConfig, rng: np.random.Generator) -> ClientData:
    order = rng.permutation(len(samples))
    held = held_out_count(len(samples), config.held_out_fraction)
    return ClientData(train=samples.subset(order[held:]), held_out=samples.subset(order[:held]))
