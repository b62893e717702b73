import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloru_flwr.data import (
    DataConfig,
    DataError,
    load_central,
    load_client,
    load_own,
    loading,
    partition_indices,
    validate,
)

Write = Callable[..., str]
SKEWED = DataConfig(partitioner="dirichlet", dirichlet_alpha=0.01)
PARTITIONERS = ("iid", "dirichlet", "shards")

NAMESPACE = """
import hashlib, random
import numpy as np
import torch
from fedloru_flwr.data import DataConfig, load_central, load_client, partition_indices, validate

def fingerprint(partitioner):
    config = DataConfig(partitioner=partitioner, dirichlet_alpha=0.01, seed=5)
    validate(config)
    digest = hashlib.sha256()
    for part in partition_indices(config):
        digest.update(part.tobytes() + b"|")
    client, central = load_client(config, 42)[0], load_central(config)[0]
    for tensor in (client.train.inputs, client.held_out.labels, central.inputs):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

def global_random_states():
    name, keys, *rest = np.random.get_state()
    return repr((random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()))
"""


def run_python(script: str) -> list[str]:
    """Return the words that the script prints, run in a process of its own."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_every_process_draws_the_same_and_leaves_the_global_random_states_alone() -> None:
    here: dict[str, Any] = {}
    exec(NAMESPACE, here)
    elsewhere = run_python(
        f"{NAMESPACE}\n"
        "random.seed(9), np.random.seed(9), torch.manual_seed(9)\n"
        "before = global_random_states()\n"
        f"print(*map(fingerprint, {PARTITIONERS}), global_random_states() == before)"
    )
    assert elsewhere == [*(here["fingerprint"](partitioner) for partitioner in PARTITIONERS), "True"]


def test_importing_the_package_does_not_import_the_slow_libraries() -> None:
    loaded = run_python("import sys, fedloru_flwr.data; print(*{name.split('.')[0] for name in sys.modules})")
    assert "torch" in loaded
    assert not {"datasets", "flwr_datasets", "sklearn", "pyarrow", "pandas", "PIL"} & set(loaded)


def test_clients_and_the_central_test_part_share_no_sample() -> None:
    central, spec = load_central(SKEWED)
    assert (len(central), spec.input_shape, spec.num_classes) == (360, (1, 8, 8), 10)
    parts = partition_indices(SKEWED)
    assert sorted(np.concatenate(parts)) == list(range(1437))
    assert min(map(len, parts)) == 2


def test_the_central_test_part_does_not_depend_on_the_seed() -> None:
    assert torch.equal(load_central(DataConfig(seed=1))[0].inputs, load_central(DataConfig(seed=2))[0].inputs)


def test_partition_indices_cannot_be_written_to() -> None:
    parts = partition_indices(DataConfig())
    with pytest.raises(ValueError, match="read-only"):
        parts[0][0] = 0
    parts.clear()
    assert len(partition_indices(DataConfig())) == 100


def test_a_client_trains_on_four_fifths_of_its_samples_and_holds_out_the_rest() -> None:
    config = DataConfig(num_clients=10)
    client, spec = load_client(config, 3)
    size = len(partition_indices(config)[3])
    assert (len(client.train), len(client.held_out)) == (size - round(0.2 * size), round(0.2 * size))
    assert client.train.inputs.shape[1:] == spec.input_shape


def test_the_smallest_client_still_has_a_sample_of_each_kind() -> None:
    sizes = [len(part) for part in partition_indices(SKEWED)]
    client = load_client(SKEWED, sizes.index(2))[0]
    assert (len(client.train), len(client.held_out)) == (1, 1)
    greedy = load_client(replace(SKEWED, held_out_fraction=0.99), sizes.index(max(sizes)))[0]
    assert len(greedy.train) >= 1


def test_a_client_has_its_own_samples_shuffled(write_csv: Write) -> None:
    path = write_csv(("a", "label"), *[(i, i % 2) for i in range(100)])
    config = DataConfig(dataset="local", data_path=path, num_clients=2)
    client = load_client(config, 1)[0]
    values = [*client.train.inputs[:, 0].tolist(), *client.held_out.inputs[:, 0].tolist()]
    assert len(values) == 40
    assert values != sorted(values)
    assert not set(values) & set(load_client(config, 0)[0].train.inputs[:, 0].tolist())


def test_clients_stay_in_memory_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(num_clients=20, seed=7)
    assert load_client(config, 3)[0] is load_client(config, 3)[0]
    clients = loading._Clients()
    monkeypatch.setattr(loading, "_clients", clients)
    clients.limit = 3 * loading._size(load_client(config, 0)[0])
    for client in range(20):
        load_client(config, client)
    assert clients.get(config, 0) is None
    assert clients.get(config, 19) is not None
    assert 2 <= len(clients._found) <= 3
    assert clients._bytes == sum(loading._size(data) for data, _ in clients._found.values())
    assert len(load_client(config, 0)[0].train) == len(load_client(replace(config), 0)[0].train)


def test_the_held_out_part_depends_on_the_seed_and_the_partition_only(write_csv: Write) -> None:
    rows = [(i, f"w{i % 2}", i % 2) for i in range(40)]
    path = write_csv(("a", "writer", "label"), *rows)
    config = DataConfig(dataset="local", data_path=path, partitioner="column:writer", num_clients=2)
    held = load_client(config, 0)[0].held_out
    assert torch.equal(load_client(replace(config, dirichlet_alpha=9.0), 0)[0].held_out.inputs, held.inputs)
    assert not torch.equal(load_client(replace(config, seed=1), 0)[0].held_out.inputs, held.inputs)


@pytest.mark.parametrize("partition_id", [-1, 100])
def test_a_partition_that_does_not_exist_is_refused(partition_id: int) -> None:
    with pytest.raises(DataError, match=rf"partition-id = {partition_id}: .*from 0 to 99.*SuperNodes"):
        load_client(DataConfig(), partition_id)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 2000}, r"num-clients = 2000: .*there are 1437\. Use at most 718 clients"),
        ({"min_partition_size": 15}, r"min-partition-size = 15.*need 1500 samples"),
        ({"partitioner": "dirichlet", "dirichlet_alpha": -1.0}, r"dirichlet-alpha = -1\.0"),
        ({"dataset": "local", "data_path": "no/such.csv"}, r"data-path = 'no/such\.csv': not found"),
    ],
)
def test_validate_refuses_what_cannot_run(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate(replace(DataConfig(), **changes))


def test_validate_refuses_a_constant_label(write_csv: Write) -> None:
    path = write_csv(("a", "label"), *[(i, "same") for i in range(10)])
    with pytest.raises(DataError, match="label-column = 'label': all 8 training samples have the same label"):
        validate(DataConfig(dataset="local", data_path=path, num_clients=2))


def test_a_deployed_client_uses_all_of_its_own_samples(write_csv: Write) -> None:
    path = write_csv(("a", "label"), *[(i, "dog") for i in range(10)])
    # The settings of the run, where clients and their partitions mean nothing to this client.
    client, spec = load_own(path, DataConfig(classes="cat,dog,fish", dataset="local"))
    assert spec.num_classes == 3
    assert (len(client.train), len(client.held_out)) == (8, 2)
    assert sorted([*client.train.inputs[:, 0], *client.held_out.inputs[:, 0]]) == list(range(10))
    assert client.train.labels.tolist() == [1] * 8


def test_a_deployed_client_leaves_out_the_partition_column_but_needs_none(write_csv: Write) -> None:
    config = DataConfig(dataset="hub:x", partitioner="column:writer", num_classes=2)
    with_column = write_csv(("a", "writer", "label"), (1, 5, 0), (2, 5, 1))
    without = write_csv(("a", "label"), (1, 0), (2, 1), name="other.csv")
    for path in (with_column, without):
        assert load_own(path, config)[1].input_shape == (1,)


def test_a_deployed_client_holds_out_its_own_test_split(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,label\n1,0\n")
    (tmp_path / "test.csv").write_text("a,label\n2,1\n3,0\n")
    client, _ = load_own(tmp_path, DataConfig(num_classes=2))
    assert client.train.inputs.tolist() == [[1.0]]
    assert client.held_out.inputs.tolist() == [[2.0], [3.0]]


def test_a_deployed_client_must_be_told_the_classes(write_csv: Write) -> None:
    path = write_csv(("a", "label"), (1, 0), (2, 1))
    with pytest.raises(DataError, match=r"num-classes = 0: the order of the classes.*Set num-classes.*or classes"):
        load_own(path, DataConfig())


def test_a_deployed_client_with_a_single_sample_is_refused(write_csv: Write) -> None:
    path = write_csv(("a", "label"), (1, 0))
    with pytest.raises(DataError, match=r"data-path = .*single sample.*one to hold out"):
        load_own(path, DataConfig(num_classes=2))
