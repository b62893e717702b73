"""Deal the training samples out to clients: every sample to exactly one client, none below the minimum."""

import contextlib
import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedloru_flwr.data.samples import DataConfig, fault, generator


def partition(labels: np.ndarray, groups: Sequence[Any], config: DataConfig) -> list[np.ndarray]:
    """Return each client's sample indices, ascending: the partitioner's draw, topped up to the minimum.

    Args:
        labels: int64, shape ``(n,)``.
        groups: ``n`` values of the partition column; unused by the other partitioners.
        config: settings; ``seed`` decides the draw.

    Raises:
        DataError: there are fewer samples, shards or (but for the glyphs) column values than the clients need.
    """
    _check_enough(len(labels), groups, config)
    # Ties (which samples of a class, which neighbours) are broken at random, not by the order of the file.
    order = generator("partition", config.seed).permutation(len(labels))
    state = random.getstate()
    try:
        if config.partition_column:
            by_group = _by_few_groups if config.dataset == "glyphs" else _by_group
            parts = by_group([groups[index] for index in order], config)
        else:
            draw = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards}[config.partitioner]
            parts = draw(labels[order], config)
    finally:
        random.setstate(state)  # the import of Flower's partitioners draws from Python's global generator
    parts = top_up(parts, config.min_partition_size, generator("top-up", config.seed))
    return [np.sort(order[part]) for part in parts]


def top_up(parts: list[np.ndarray], minimum: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Move random samples, one by one, from the then largest part to those with fewer than ``minimum``.

    No part that gives falls below ``minimum``, since ``minimum * len(parts)`` samples must be there.
    """
    sizes = np.array([len(part) for part in parts])
    if sizes.min() >= minimum:
        return parts
    pools = [rng.permutation(part).tolist() for part in parts]
    for needy, pool in enumerate(pools):
        while sizes[needy] < minimum:
            donor = int(sizes.argmax())
            pool.append(pools[donor].pop())
            sizes[needy] += 1
            sizes[donor] -= 1
    return [np.array(pool, dtype=np.int64) for pool in pools]


def _check_enough(num_samples: int, groups: Sequence[Any], config: DataConfig) -> None:
    clients, least = config.num_clients, config.min_partition_size
    if clients * least > num_samples:
        problem = f"with min-partition-size = {least} they need {clients * least} samples, there are {num_samples}"
        remedy = f"Use at most {num_samples // least} clients" + (", or a lower minimum" if least > 2 else "")
        raise fault("num-clients", clients, problem, remedy)
    if config.partitioner == "shards" and clients * config.shards_per_client > num_samples:
        problem = f"{clients} clients need {clients * config.shards_per_client} shards of {num_samples} samples"
        remedy = f"Use at most {num_samples // clients}"
        raise fault("shards-per-client", config.shards_per_client, problem, remedy)
    # Glyphs are generated: dividing a font among clients is no mistake, dividing a writer would be.
    if config.partition_column and config.dataset != "glyphs" and len(set(groups)) < clients:
        problem = f"the column has {len(set(groups))} distinct values for num-clients = {clients}"
        remedy = f"Use num-clients = {len(set(groups))} or fewer, or another partitioner"
        raise fault("partitioner", config.partitioner, problem, remedy)


def _iid(labels: np.ndarray, config: DataConfig) -> list[np.ndarray]:
    """Deal the samples out evenly: what Flower's IidPartitioner gives, whose import takes seconds."""
    return np.array_split(np.arange(len(labels)), config.num_clients)


def _dirichlet(labels: np.ndarray, config: DataConfig) -> list[np.ndarray]:
    """Give client k a share p_ck of class c, with p_c ~ Dirichlet(alpha, ..., alpha) over the clients."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=config.num_clients,
        partition_by="label",
        alpha=float(config.dirichlet_alpha),
        min_partition_size=0,  # with a minimum it draws anew, then gives up; `top_up` always succeeds
        shuffle=False,
        seed=config.seed,
    )
    return _draw(partitioner, labels, config.num_clients)


def _shards(labels: np.ndarray, config: DataConfig) -> list[np.ndarray]:
    """Cut the label-sorted samples into equal shards and deal ``shards_per_client`` to each client.

    McMahan et al. 2017 (arXiv 1602.05629), section 3. Flower's ShardPartitioner drops the samples that do
    not fill a shard (37 of 1437 for 200 shards), so the draw is made here: shards differ by one sample.
    """
    num_shards = config.num_clients * config.shards_per_client
    shards = np.array_split(np.argsort(labels, kind="stable"), num_shards)
    dealt = generator("shards", config.seed).permutation(num_shards).reshape(config.num_clients, -1)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _by_group(groups: Sequence[Any], config: DataConfig) -> list[np.ndarray]:
    """Give the j-th distinct value, in sorted order, to client ``j mod num_clients``."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar that cannot be switched off
        natural = _draw(NaturalIdPartitioner("label"), groups, len(set(groups)))
    return [np.concatenate(natural[client :: config.num_clients]) for client in range(config.num_clients)]


def _by_few_groups(groups: Sequence[Any], config: DataConfig) -> list[np.ndarray]:
    """Give each client samples of as few distinct values as possible, and clients about equally many samples.

    At least as many clients as values: each value is cut into equal pieces, of one client each; one by one, clients
    go to the value whose pieces are largest. Fewer: one by one, the largest value goes whole to the client that has
    least. Ties go to the first in sorted order.
    """
    names, numbers = np.unique(np.array(groups), return_inverse=True)
    values = [np.flatnonzero(numbers == number) for number in range(len(names))]
    sizes = np.array([len(value) for value in values])
    if config.num_clients >= len(values):
        pieces = np.ones(len(values), dtype=np.int64)
        for _ in range(config.num_clients - len(values)):
            pieces[(sizes / pieces).argmax()] += 1
        return [part for value, count in zip(values, pieces, strict=True) for part in np.array_split(value, count)]
    hands: list[list[np.ndarray]] = [[] for _ in range(config.num_clients)]
    held = np.zeros(config.num_clients, dtype=np.int64)
    for number in np.argsort(-sizes, kind="stable"):
        least = int(held.argmin())
        hands[least].append(values[number])
        held[least] += sizes[number]
    return [np.concatenate(hand) for hand in hands]


def _draw(partitioner: Any, labels: Any, num_parts: int) -> list[np.ndarray]:
    """Return the indices of each part that a Flower partitioner makes of samples with these labels."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": labels, "index": range(len(labels))})
    return [np.array(partitioner.load_partition(part)[:]["index"], dtype=np.int64) for part in range(num_parts)]
