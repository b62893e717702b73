import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fedloru_flwr.data import DataConfig, DataError, sources
from fedloru_flwr.data.samples import Split
from fedloru_flwr.data.sources import _read_digits, encode, load_source, stratified_split

Write = Callable[..., str]


def split_of(labels: list[int | str], class_names: tuple[str, ...] = (), width: int = 1) -> Split:
    return Split(torch.zeros(len(labels), width), labels, class_names)


def numbered(labels: list[int | str], class_names: tuple[str, ...] = (), **changes: object) -> tuple[list[int], int]:
    stored, spec = encode({"train": split_of(labels, class_names)}, DataConfig(**changes))
    return stored["train"].labels.tolist(), spec.num_classes


def test_classes_are_numbered_in_sorted_order() -> None:
    assert numbered(["dog", "cat", "dog"]) == ([1, 0, 1], 2)
    assert numbered([10, 9, 30]) == ([1, 0, 2], 3)


def test_the_classes_of_both_splits_are_numbered_together() -> None:
    stored, spec = encode({"train": split_of(["a", "c"]), "test": split_of(["b"])}, DataConfig())
    assert stored["train"].labels.tolist() == [0, 2]
    assert stored["test"].labels.tolist() == [1]
    assert spec.num_classes == 3


def test_listed_classes_fix_the_order_and_may_be_absent() -> None:
    assert numbered(["dog", "cat"], classes="fish, dog, cat") == ([1, 2], 3)
    assert numbered([7, 5], classes="5,6,7") == ([2, 0], 3)


def test_a_number_of_classes_leaves_integer_labels_as_they_are() -> None:
    assert numbered([3, 1], num_classes=5) == ([3, 1], 5)


def test_declared_class_names_leave_labels_as_they_are_unless_classes_are_listed() -> None:
    assert numbered([2, 0], ("a", "b", "c")) == ([2, 0], 3)
    assert numbered([2, 0], ("a", "b", "c"), classes="c,b,a") == ([0, 2], 3)


@pytest.mark.parametrize(
    ("labels", "changes", "parts"),
    [
        (["cat", "dgo"], {"classes": "cat,dog"}, ["classes = 'cat,dog'", "'dgo' in row 1", "did you mean 'dog'"]),
        ([0, 3], {"num_classes": 3}, ["num-classes = 3", "3 in row 1", "Correct the label"]),
        ([0, -1], {"num_classes": 3}, ["num-classes = 3", "-1 in row 1"]),
        (["a"], {"num_classes": 3}, ["num-classes = 3", "'a' in row 0", "List every class in classes"]),
    ],
)
def test_a_label_out_of_place_is_named(labels: list[int | str], changes: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        numbered(labels, **changes)
    for part in parts:
        assert part in str(error.value)


def test_splits_of_unlike_labels_or_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"label-column = 'label'.*integers.*text"):
        encode({"train": split_of([0]), "test": split_of(["a"])}, DataConfig())
    with pytest.raises(DataError, match=r"shape \(1,\) in its train split, \(2,\) in its test split"):
        encode({"train": split_of([0]), "test": split_of([0], width=2)}, DataConfig())


def test_the_central_split_takes_the_same_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    kept, held = stratified_split(labels, 0.2)
    assert np.bincount(labels[held]).tolist() == [2, 4, 1]
    assert sorted([*kept, *held]) == list(range(35))
    assert not np.array_equal(held, [0, 1, 10, 11, 12, 13, 30])  # drawn, not the first of each class


def test_the_central_split_rounds_the_total_up_and_spares_lonely_classes() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    assert np.bincount(labels[stratified_split(labels, 0.2)[1]], minlength=3).tolist() == [1, 1, 0]
    assert np.bincount(labels[stratified_split(labels, 0.9)[1]], minlength=3).tolist() == [3, 2, 0]


def test_digits_are_scaled_images_split_four_to_one() -> None:
    source = load_source(DataConfig())
    assert source.train.inputs.shape == (1437, 1, 8, 8)
    assert source.test.inputs.shape == (360, 1, 8, 8)
    assert (source.spec.input_shape, source.spec.num_classes) == ((1, 8, 8), 10)
    assert source.train.inputs.dtype == torch.float32
    assert (source.train.inputs.min(), source.train.inputs.max()) == (0.0, 1.0)
    assert source.train.labels.dtype == torch.int64
    assert source.test.labels.bincount().tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]


def test_the_digits_are_those_that_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = _read_digits()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    loaded = _read_digits()
    assert torch.equal(from_file.inputs, loaded.inputs)
    assert from_file.labels == loaded.labels


def test_a_source_is_loaded_once_for_all_seeds_and_partitioners() -> None:
    first = load_source(DataConfig())
    assert load_source(DataConfig(seed=3, partitioner="dirichlet", num_clients=7)) is first
    assert load_source(DataConfig(test_fraction=0.5)) is not first


def test_a_table_in_any_format_is_the_same_source(tmp_path: Path) -> None:
    rows = [{"a": i, "b": i / 2, "label": "even" if i % 2 == 0 else "odd"} for i in range(10)]
    lines = [",".join(map(str, row.values())) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,label", *lines]))
    (tmp_path / "t.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for suffix in ("csv", "json", "parquet"):
        source = load_source(DataConfig(dataset="local", data_path=str(tmp_path / f"t.{suffix}")))
        assert (source.spec.input_shape, source.spec.num_classes) == ((2,), 2)
        inputs = torch.cat([source.train.inputs, source.test.inputs])
        labels = torch.cat([source.train.labels, source.test.labels])
        order = inputs[:, 0].argsort()
        assert inputs[order].tolist() == [[i, i / 2] for i in range(10)]
        assert labels[order].tolist() == [0, 1] * 5
        assert len(source.test.labels) == 2


def test_groups_follow_their_samples_into_the_training_part(write_csv: Write) -> None:
    path = write_csv(("a", "writer", "label"), *[(i, f"w{i}", i % 2) for i in range(10)])
    source = load_source(DataConfig(dataset="local", data_path=path, partitioner="column:writer"))
    assert list(source.groups) == [f"w{int(value)}" for value in source.train.inputs[:, 0]]


def test_an_image_folder_with_a_test_split_keeps_it(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for name, value in (("train/cat/1.png", 0), ("train/dog/1.png", 255), ("test/dog/1.png", 51)):
        write_image(name, value)
    source = load_source(DataConfig(dataset="local", data_path=str(tmp_path)))
    assert (source.spec.input_shape, source.spec.num_classes) == ((1, 2, 3), 2)
    assert source.train.labels.tolist() == [0, 1]
    assert source.train.inputs.dtype == torch.uint8
    test = source.test.samples()
    assert torch.allclose(test.inputs, torch.full((1, 1, 2, 3), 0.2))
    assert test.labels.tolist() == [1]


def test_too_few_samples_for_a_central_test_part_are_refused(write_csv: Write) -> None:
    path = write_csv(("a", "label"), (1, 0), (2, 1))
    with pytest.raises(DataError, match=r"test-fraction = 0\.2: no class of the 2 samples.*test split"):
        load_source(DataConfig(dataset="local", data_path=path))


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder in the layout and with the schema of MNIST on the hub: parquet files under mnist/."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    for split, values in (("train", [3, 1, 4, 1]), ("test", [5, 9])):
        images = [Image.fromarray(np.full((28, 28), 10 * value, dtype=np.uint8)) for value in values]
        table = datasets.Dataset.from_dict({"image": images, "label": values}, features=features)
        (tmp_path / "mnist").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "mnist" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_a_hub_data_set_gives_scaled_images_and_its_own_classes(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    source = load_source(DataConfig(dataset=f"hub:{hub_folder}"))
    assert (source.spec.input_shape, source.spec.num_classes) == ((1, 28, 28), 10)
    assert source.train.labels.tolist() == [3, 1, 4, 1]
    assert source.test.labels.tolist() == [5, 9]
    assert torch.allclose(source.test.samples().inputs[1], torch.full((1, 28, 28), 90 / 255))
    assert list(home.iterdir()) == []  # nothing in the user's home


def test_a_parquet_file_of_images_declares_its_classes(hub_folder: Path) -> None:
    path = hub_folder / "mnist" / "train-00000-of-00001.parquet"
    splits = sources.read_own(str(path), DataConfig())
    assert splits["train"].class_names == tuple("0123456789")
    assert splits["train"].inputs.shape == (4, 1, 28, 28)
