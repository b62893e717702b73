import itertools

import numpy as np
import pytest
from flwr_datasets.partitioner import IidPartitioner

from fedloru_flwr.data import DataConfig, DataError
from fedloru_flwr.data.partitioning import _draw, _iid, partition, top_up

TEN_CLASSES = np.repeat(np.arange(10), 144)[:1437]
WRITERS = [f"w{index % 130:03}" for index in range(1437)]


def config_of(partitioner: str, **changes: object) -> DataConfig:
    return DataConfig(dataset="hub:x", partitioner=partitioner, **changes)


def classes_seen(parts: list[np.ndarray], labels: np.ndarray) -> float:
    return float(np.mean([len(set(labels[part])) for part in parts]))


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "shards", "column:writer"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_goes_to_exactly_one_client(partitioner: str, seed: int) -> None:
    parts = partition(TEN_CLASSES, WRITERS, config_of(partitioner, seed=seed))
    assert len(parts) == 100
    assert sorted(itertools.chain(*map(list, parts))) == list(range(1437))


@pytest.mark.parametrize("clients", [1, 7, 100, 718])
def test_iid_parts_are_those_of_flowers_partitioner(clients: int) -> None:
    config = config_of("iid", num_clients=clients)
    theirs = _draw(IidPartitioner(clients), TEN_CLASSES, clients)
    assert [part.tolist() for part in _iid(TEN_CLASSES, config)] == [part.tolist() for part in theirs]


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "shards"])
def test_the_draw_follows_the_seed(partitioner: str) -> None:
    first, again, other = (partition(TEN_CLASSES, (), config_of(partitioner, seed=seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("alpha", [1e-300, 0.001, 0.01, 0.5, 1e9])
@pytest.mark.parametrize("minimum", [2, 14])
def test_the_minimum_is_met_however_strong_the_skew(alpha: float, minimum: int) -> None:
    config = config_of("dirichlet", dirichlet_alpha=alpha, min_partition_size=minimum)
    parts = partition(TEN_CLASSES, (), config)
    assert min(map(len, parts)) >= minimum
    assert sorted(itertools.chain(*map(list, parts))) == list(range(1437))


def test_a_smaller_alpha_shows_a_client_fewer_classes() -> None:
    seen = [
        classes_seen(partition(TEN_CLASSES, (), config_of("dirichlet", dirichlet_alpha=alpha)), TEN_CLASSES)
        for alpha in (100.0, 0.5, 0.05)
    ]
    assert seen[0] > 6 > seen[1] > 3 > seen[2]


def test_iid_parts_differ_by_one_sample_at_most_and_mix_sorted_labels() -> None:
    parts = partition(TEN_CLASSES, (), config_of("iid"))
    assert {len(part) for part in parts} == {14, 15}
    assert classes_seen(parts, TEN_CLASSES) > 6


def test_shards_are_equal_and_show_a_client_few_classes() -> None:
    parts = partition(TEN_CLASSES, (), config_of("shards", shards_per_client=2))
    assert {len(part) for part in parts} <= {14, 15, 16}
    # 200 shards of 10 classes: at most 9 shards hold two classes, the others one.
    assert sum(len(set(TEN_CLASSES[part])) > 2 for part in parts) <= 9


def test_one_shard_for_each_class_gives_every_client_one_class() -> None:
    labels = np.array([1, 0, 2, 0, 1, 2])
    parts = partition(labels, (), config_of("shards", num_clients=3, shards_per_client=1))
    assert sorted(map(tuple, (labels[part] for part in parts))) == [(0, 0), (1, 1), (2, 2)]


def test_column_values_go_to_clients_round_robin_in_sorted_order() -> None:
    groups = ["c", "a", "b", "a", "c", "b"]
    parts = partition(np.zeros(6, dtype=np.int64), groups, config_of("column:writer", num_clients=2))
    assert [part.tolist() for part in parts] == [[0, 1, 3, 4], [2, 5]]  # a and c; b


def test_a_column_of_integers_is_sorted_as_numbers() -> None:
    groups = [10, 10, 9, 9]
    parts = partition(np.zeros(4, dtype=np.int64), groups, config_of("column:writer", num_clients=2))
    assert [part.tolist() for part in parts] == [[2, 3], [0, 1]]


def test_top_up_takes_from_the_largest_and_leaves_the_others_alone() -> None:
    parts = [np.array([], dtype=np.int64), np.arange(6), np.array([6, 7]), np.array([8])]
    topped = top_up(parts, 2, np.random.default_rng(0))
    assert list(map(len, topped)) == [2, 3, 2, 2]
    assert sorted(topped[2]) == [6, 7]
    assert 8 in topped[3]
    assert sorted(itertools.chain(*map(list, topped))) == list(range(9))


def test_top_up_changes_nothing_where_the_minimum_is_met() -> None:
    parts = [np.array([3, 1]), np.array([0, 2])]
    assert top_up(parts, 2, np.random.default_rng(0)) is parts


def test_top_up_uses_the_last_sample_if_it_must() -> None:
    topped = top_up([np.arange(6), np.arange(0), np.arange(0)], 2, np.random.default_rng(0))
    assert list(map(len, topped)) == [2, 2, 2]


@pytest.mark.parametrize(
    ("partitioner", "changes", "parts"),
    [
        ("iid", {"num_clients": 4}, ["num-clients = 4", "need 8 samples, there are 6", "at most 3 clients"]),
        (
            "dirichlet",
            {"num_clients": 2, "min_partition_size": 4},
            ["num-clients = 2", "min-partition-size = 4", "at most 1 clients, or a lower minimum"],
        ),
        (
            "shards",
            {"num_clients": 2, "shards_per_client": 4},
            ["shards-per-client = 4", "8 shards of 6 samples", "at most 3"],
        ),
        (
            "column:writer",
            {"num_clients": 3},
            ["partitioner = 'column:writer'", "2 distinct values for num-clients = 3", "num-clients = 2 or fewer"],
        ),
    ],
)
def test_too_few_samples_or_values_are_refused_with_the_limit(
    partitioner: str, changes: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        partition(np.array([0, 0, 0, 1, 1, 1]), list("aaabbb"), config_of(partitioner, **changes))
    for part in parts:
        assert part in str(error.value)
