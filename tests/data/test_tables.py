import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedloru_flwr.data import DataError
from fedloru_flwr.data.tables import hub_tables, local_tables

Write = Callable[..., str]
ROWS = [{"x": 1, "label": "a"}, {"x": 2, "label": "b"}]


def rows_of(path: Path) -> dict[str, list[dict[str, object]]]:
    return {split: table.to_pylist() for split, table in local_tables(path).items()}


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,label\n1,a\n2,b\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    for name in ("a.jsonl", "a.ndjson", "lines.json"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "A.PARQUET")
    files = list(tmp_path.iterdir())
    assert len(files) == 6
    for file in files:
        assert rows_of(file) == {"train": ROWS}, file


def test_the_type_of_a_csv_column_is_that_of_all_its_rows(write_csv: Write) -> None:
    rows = [(1, 0)] * 300_000 + [(1.5, 0)]
    path = write_csv(("x", "label"), *rows)
    assert str(local_tables(Path(path))["train"].schema.field("x").type) == "double"


def test_a_json_key_that_a_row_lacks_is_missing_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"x": 1}, {"x": 2, "y": 3}]')
    assert rows_of(tmp_path / "a.json")["train"] == [{"x": 1, "y": None}, {"x": 2, "y": 3}]


def test_row_numbers_that_pandas_left_in_a_parquet_file_are_dropped(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"x": [1], "__index_level_0__": [7]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet")["train"] == [{"x": 1}]


def test_a_folder_of_files_is_read_by_split_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "train-1.csv").write_text("x\n1\n")
    (tmp_path / "train-0.csv").write_text("x\n0.5\n")
    (tmp_path / "test.json").write_text('[{"x": 9}]')
    (tmp_path / "trainers.csv").write_text("x\n8\n")
    (tmp_path / "notes.txt").write_text("not data")
    assert rows_of(tmp_path) == {"train": [{"x": 0.5}, {"x": 1.0}], "test": [{"x": 9}]}


def test_an_image_folder_is_labelled_by_its_sub_folders(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    cat, dog = write_image("dog/1.png", 1), write_image("cat/2.PNG", 2)
    write_image("cat/.hidden.png", 3)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    assert rows_of(tmp_path)["train"] == [
        {"image": {"bytes": None, "path": str(dog)}, "label": "cat"},
        {"image": {"bytes": None, "path": str(cat)}, "label": "dog"},
    ]


def test_an_image_folder_may_have_train_and_test_sub_folders(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image("train/a/1.png", 1)
    write_image("test/b/1.png", 1)
    labels = {split: [row["label"] for row in rows] for split, rows in rows_of(tmp_path).items()}
    assert labels == {"train": ["a"], "test": ["b"]}


def test_a_class_may_be_called_train(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image("train/1.png", 1)
    write_image("bus/1.png", 1)
    assert [row["label"] for row in rows_of(tmp_path)["train"]] == ["bus", "train"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.csv", None, ["not found; looked for", "CSV, JSON, JSON Lines or Parquet"]),
        ("a.xlsx", "", ["files ending in '.xlsx' are not read", ".csv, .json"]),
        ("a.csv", "x,y\n1,2,3\n", ["cannot be read as csv", "Expected 2 columns, got 3", "Repair"]),
        ("a.csv", "", ["cannot be read as csv", "Empty CSV file"]),
        ("a.parquet", "x", ["cannot be read as parquet", "Repair"]),
        ("a.json", "{", ["cannot be read as json", "Repair"]),
        ("a.json", "[1, 2]", ["cannot be read as json", "list of objects, or one object on each line"]),
        ("a.json", '[{"x": 1}, {"x": "a"}]', ["cannot be read as json", "Repair"]),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | None, parts: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        local_tables(tmp_path / name)
    for part in [f"data-path = {str(tmp_path / name)!r}", *parts]:
        assert part in str(error.value)


def test_a_folder_without_data_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_text("")
    with pytest.raises(DataError, match=r"holds no data set, but images\.zip.*one sub-folder of images"):
        local_tables(tmp_path)


def test_files_of_one_split_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-0.csv").write_text("x\n1\n")
    (tmp_path / "train-1.csv").write_text("x\na\n")
    with pytest.raises(DataError, match=r"data-path = .*do not fit together.*same columns and types"):
        local_tables(tmp_path)


def test_a_hub_folder_without_a_train_split_is_refused_with_the_splits_it_has(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "validation.parquet")
    with pytest.raises(DataError, match=r"dataset = 'hub:.*no train split, only validation"):
        hub_tables(str(tmp_path))


def test_a_hub_data_set_that_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset = 'hub:.*cannot be loaded \(\w+: .*Check the name"):
        hub_tables(str(tmp_path))
