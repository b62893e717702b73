from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from fedloru_flwr.data import DataConfig, DataError
from fedloru_flwr.data.columns import read_splits
from fedloru_flwr.data.samples import Split


def read(columns: dict[str, object], **changes: object) -> Split:
    return read_splits({"train": pa.table(columns)}, DataConfig(**changes), "data.csv")["train"]


def stored(*paths: Path) -> list[dict[str, object]]:
    return [{"bytes": None, "path": str(path)} for path in paths]


def test_inputs_are_the_numeric_columns_but_the_label_and_the_partition_column() -> None:
    split = read(
        {"a": [1, 2], "writer": [5, 6], "note": ["x", "y"], "b": [True, False], "label": [0, 1], "c": [0.5, 1.5]},
        partitioner="column:writer",
    )
    assert split.inputs.dtype == torch.float32
    assert split.inputs.tolist() == [[1.0, 1.0, 0.5], [2.0, 0.0, 1.5]]
    assert split.labels == [0, 1]
    assert split.groups == (5, 6)


def test_asked_for_input_columns_come_in_the_order_asked_for() -> None:
    split = read({"a": [1], "b": [2], "c": [3], "label": ["x"]}, input_columns="c, a")
    assert split.inputs.tolist() == [[3.0, 1.0]]


def test_large_integers_are_rounded_not_refused() -> None:
    assert read({"a": [2**24 + 1], "label": [0]}).inputs.tolist() == [[2.0**24]]


@pytest.mark.parametrize(
    ("value", "shape"),
    [([1, 2, 3], (3,)), ([[1, 2, 3], [4, 5, 6]], (1, 2, 3)), ([[[1, 2, 3]], [[4, 5, 6]]], (2, 1, 3))],
)
def test_lists_become_arrays_and_nested_ones_images_of_one_channel(value: object, shape: tuple[int, ...]) -> None:
    split = read({"id": [7, 8], "pixels": [value, value], "label": [0, 1]})
    assert split.inputs.shape == (2, *shape)
    assert split.inputs[1].flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][: split.inputs[1].numel()]


def test_lists_of_fixed_size_and_sliced_tables_are_read() -> None:
    pixels = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2))
    table = pa.table({"pixels": pixels, "label": [0, 1, 0]}).slice(1)
    assert read_splits({"train": table}, DataConfig(), "x")["train"].inputs.tolist() == [[3.0, 4.0], [5.0, 6.0]]


def test_arrays_of_an_extension_type_are_read() -> None:
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
    assert read({"pixels": array, "label": [0, 1]}).inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_images_become_bytes_by_channel_row_and_column(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    inputs = read({"image": stored(tmp_path / "rgb.png"), "label": [0]}).inputs
    assert inputs.dtype == torch.uint8
    assert inputs.tolist() == [[[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]]


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_grey_images_have_one_channel_and_others_three(tmp_path: Path, mode: str, channels: int) -> None:
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    inputs = read({"image": stored(tmp_path / "a.png"), "label": [0]}).inputs
    assert inputs.tolist() == torch.full((1, channels, 2, 3), 255).tolist()


def test_images_stored_as_bytes_are_read(write_image: Callable[..., Path]) -> None:
    path = write_image("a.png", 9)
    inputs = read({"image": [{"bytes": path.read_bytes(), "path": "gone.png"}], "label": [0]}).inputs
    assert inputs.tolist() == [[[[9, 9, 9], [9, 9, 9]]]]


def test_an_image_of_another_shape_is_named(write_image: Callable[..., Path]) -> None:
    paths = write_image("a.png", 0), write_image("odd.png", 0, (4, 4, 3))
    with pytest.raises(DataError, match=r"odd\.png.*\(3, 4, 4\).*first image \(1, 2, 3\).*Resize or convert"):
        read({"image": stored(*paths), "label": [0, 1]})


def test_a_broken_or_missing_image_is_named(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for path in (tmp_path / "broken.png", tmp_path / "missing.png"):
        with pytest.raises(DataError, match=rf"image = .*{path.name}.*cannot be read.*Remove it"):
            read({"image": stored(write_image("a.png", 0), path), "label": [0, 1]})


def test_an_image_of_more_than_eight_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png.*more than 8 bits.*8-bit grey or RGB"):
        read({"image": stored(tmp_path / "deep.png"), "label": [0]})


@pytest.mark.parametrize("column", ["labels", "fine_label", "target", "class", "y"])
def test_another_common_label_column_stands_in_for_the_default(column: str) -> None:
    assert read({"a": [1, 2], column: [4, 5]}).labels == [4, 5]


def test_labels_may_be_text_whole_numbers_or_booleans() -> None:
    assert read({"a": [1, 2], "label": ["x", "y"]}).labels == ["x", "y"]
    assert read({"a": [1, 2], "label": [1.0, 2.0]}).labels == [1, 2]
    assert read({"a": [1, 2], "label": [True, False]}).labels == [1, 0]


@pytest.mark.parametrize(
    ("columns", "changes", "parts"),
    [
        ({"a": [1], "kind": [0]}, {}, ["label-column = 'label'", "no column of that name", "columns are a, kind"]),
        ({"a": [1], "y": [0], "target": [0]}, {}, ["label-column = 'label'", "target, y", "Set label-column"]),
        ({"a": [1], "kind": [0]}, {"label_column": "kin"}, ["label-column = 'kin'", "did you mean 'kind'"]),
        ({"a": [1], "label": [0]}, {"input_columns": "b"}, ["input-columns = 'b'", "columns are a, label"]),
        ({"a": [1], "label": [0]}, {"input_columns": "a,label"}, ["'label' is the label", "Leave it out"]),
        ({"a": ["x"], "label": [0]}, {"input_columns": "a"}, ["input-columns = 'a'", "string, not numbers"]),
        ({"a": ["x"], "label": [0]}, {}, ["no image, list or numeric column", "columns are a, label"]),
        ({"a": [[1]], "b": [[1]], "label": [0]}, {}, ["more than one column of lists: a, b", "Set input-columns"]),
        ({"a": [1.0, None], "label": [0, 1]}, {}, ["input-columns = 'a'", "missing, NaN or infinite", "row 1"]),
        ({"a": [1.0, float("nan")], "label": [0, 1]}, {}, ["input-columns = 'a'", "row 1", "Fill it in"]),
        ({"a": [[1, 2], [1, None]], "label": [0, 1]}, {}, ["input-columns = 'a'", "row 1", "Fill it in"]),
        ({"a": [[1, 2], [1]], "label": [0, 1]}, {}, ["input-columns = 'a'", "another length", "row 1"]),
        ({"a": [[[1], [2]], [[1], []]], "label": [0, 1]}, {}, ["input-columns = 'a'", "row 1", "one length"]),
        ({"a": [[], []], "label": [0, 1]}, {}, ["input-columns = 'a'", "row 0", "one length"]),
        ({"a": [["x"]], "label": [0]}, {}, ["input-columns = 'a'", "lists hold string", "lists of numbers"]),
        ({"a": [1, 2], "label": [0, None]}, {}, ["label-column = 'label'", "unlabelled in row 1", "Label every row"]),
        ({"a": [1, 2], "label": ["x", ""]}, {}, ["label-column = 'label'", "unlabelled in row 1"]),
        ({"a": [1, 2], "label": [0, float("nan")]}, {}, ["label-column = 'label'", "unlabelled in row 1"]),
        ({"a": [1, 2], "label": [0, 0.5]}, {}, ["label-column = 'label'", "0.5 in row 1", "integers or of text"]),
        (
            {"a": [1], "label": [0]},
            {"partitioner": "column:writer"},
            ["partitioner = 'column:writer'", "no column of that name", "a, label"],
        ),
        (
            {"a": [1, 2], "label": [0, 1], "writer": ["x", None]},
            {"partitioner": "column:writer"},
            ["partitioner = 'column:writer'", "None there in row 1", "text or integers"],
        ),
        ({"a": pa.array([], pa.int64()), "label": pa.array([], pa.int64())}, {}, ["the train split", "no rows"]),
    ],
)
def test_columns_that_cannot_be_used_are_named_with_the_remedy(
    columns: dict[str, object], changes: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        read(columns, **changes)
    for part in [*parts, "data.csv"] if "is the label" not in parts[0] else parts:
        assert part in str(error.value)


def test_two_columns_of_one_name_are_refused() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([0])], names=["a", "a", "label"])
    with pytest.raises(DataError, match="more than one column called a"):
        read_splits({"train": table}, DataConfig(), "data.csv")


def test_a_test_split_without_a_column_of_the_train_split_is_refused() -> None:
    tables = {"train": pa.table({"a": [1], "label": [0]}), "test": pa.table({"a": [1]})}
    with pytest.raises(DataError, match=r"label-column = 'label': the test split of data\.csv has no column"):
        read_splits(tables, DataConfig(), "data.csv")
