from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloru_flwr.data import DataConfig, DataError, Samples
from fedloru_flwr.data.samples import check, closest, generator


def test_subset_keeps_the_order_asked_for() -> None:
    samples = Samples(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([7, 8, 9]))
    chosen = samples.subset(np.array([2, 0]))
    assert len(chosen) == 2
    assert chosen.inputs.tolist() == [[3.0], [1.0]]
    assert chosen.labels.tolist() == [9, 7]


def test_subset_takes_lists_tensors_and_read_only_arrays_and_copies() -> None:
    samples = Samples(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]))
    read_only = np.array([1])
    read_only.setflags(write=False)
    for indices in ([1], torch.tensor([1]), read_only):
        chosen = samples.subset(indices)
        assert chosen.labels.tolist() == [1]
        chosen.inputs.zero_()
    assert samples.inputs.tolist() == [[1.0], [2.0]]


def test_an_empty_subset_has_the_input_shape() -> None:
    samples = Samples(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert samples.subset([]).inputs.shape == (0, 4)


def test_streams_of_random_numbers_differ_by_name_and_number() -> None:
    draws = {generator(*key).integers(2**62) for key in (("a", 0), ("a", 1), ("b", 0), ("a", 0, 0))}
    assert len(draws) == 4
    assert generator("a", 1).integers(2**62) == generator("a", 1).integers(2**62)


def test_the_closest_name_is_offered_only_if_it_is_close() -> None:
    assert closest("dirichlt", ["iid", "dirichlet"]) == " (did you mean 'dirichlet'?)"
    assert closest("zzz", ["iid", "dirichlet"]) == ""


def test_the_default_settings_and_every_kind_of_source_and_partitioner_pass() -> None:
    for dataset in ("local", "hub:owner/name"):
        for partitioner in ("iid", "dirichlet", "shards", "column:writer"):
            check(DataConfig(dataset=dataset, data_path="x.csv", partitioner=partitioner))
    check(DataConfig())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset": "digit"}, ["dataset = 'digit'", "did you mean 'digits'", "digits, local, hub:<name>"]),
        ({"dataset": "hub:"}, ["dataset = 'hub:'", "hub:<name>"]),
        ({"dataset": "local"}, ["data-path = ''", "Set data-path"]),
        ({"partitioner": "dirichlt"}, ["partitioner = 'dirichlt'", "did you mean 'dirichlet'"]),
        ({"partitioner": "colum:x"}, ["partitioner = 'colum:x'", "did you mean 'column'"]),
        ({"partitioner": "column:<name>"}, ["partitioner = 'column:<name>'", "Use one of"]),
        ({"partitioner": "column:x"}, ["partitioner = 'column:x'", "the digits have no columns"]),
        ({"num_clients": 0}, ["num-clients = 0", "at least 1"]),
        ({"shards_per_client": 0}, ["shards-per-client = 0", "at least 1"]),
        ({"min_partition_size": 1}, ["min-partition-size = 1", "one to hold out", "at least 2"]),
        ({"num_classes": -1}, ["num-classes = -1", "at least 0"]),
        ({"seed": -1}, ["seed = -1", "at least 0"]),
        ({"dirichlet_alpha": 0.0}, ["dirichlet-alpha = 0.0", "above 0"]),
        ({"dirichlet_alpha": float("nan")}, ["dirichlet-alpha = nan", "above 0"]),
        ({"dirichlet_alpha": float("inf")}, ["dirichlet-alpha = inf", "above 0"]),
        ({"test_fraction": 1.0}, ["test-fraction = 1.0", "between 0 and 1"]),
        ({"held_out_fraction": 0.0}, ["held-out-fraction = 0.0", "between 0 and 1"]),
        ({"classes": "a, b,a"}, ["classes = 'a, b,a'", "twice"]),
        ({"classes": "a,b", "num_classes": 3}, ["num-classes = 3", "classes lists 2 names"]),
    ],
)
def test_an_impossible_setting_is_named_with_its_value_and_the_remedy(
    changes: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        check(replace(DataConfig(), **changes))
    for part in parts:
        assert part in str(error.value)
