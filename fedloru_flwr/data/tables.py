"""Find and read files, folders and hub data sets, as Arrow tables: one for each split."""

import json
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
from pyarrow import csv, parquet

from fedloru_flwr.data.samples import fault

Table: TypeAlias = Any  # pyarrow.Table

TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FILE = re.compile(r"(train|test)([-_.].*)?")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` stores its images


def local_tables(path: Path) -> dict[str, Table]:
    """Read a file or folder of the user's own: its ``train`` split and, where it has one, its ``test`` split.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    if not path.exists():
        remedy = "Give an existing CSV, JSON, JSON Lines or Parquet file, or a folder"
        raise fault("data-path", str(path), f"not found; looked for {path.absolute()}", remedy)
    return _folder_tables(path) if path.is_dir() else {"train": _read_file(path)}


def hub_tables(name: str) -> dict[str, Table]:
    """Read the ``train`` and, where there is one, ``test`` split of a data set of the Hugging Face hub.

    A local folder in the hub's layout is read in the same way, but not copied to the hub's cache.

    Raises:
        DataError: the data set cannot be loaded, or has no ``train`` split.
    """
    is_folder = Path(name).is_dir()
    with tempfile.TemporaryDirectory() if is_folder else nullcontext() as cache_dir:
        try:
            splits = _hub_splits(name, cache_dir=cache_dir, keep_in_memory=is_folder)
        except Exception as error:  # the hub's client, fsspec and the readers raise all sorts
            problem = f"cannot be loaded ({type(error).__name__}: {error})"
            remedy = "Check the name and the network, or download it and use dataset = 'local'"
            raise fault("dataset", f"hub:{name}", problem, remedy) from error
        if "train" not in splits:
            problem = f"it has no train split, only {', '.join(sorted(splits))}"
            raise fault("dataset", f"hub:{name}", problem, "Choose a data set with a train split")
        return {key: splits[key].with_format("arrow")[:] for key in ("train", "test") if key in splits}


def _hub_splits(name: str, **load_dataset_kwargs: Any) -> dict[str, Any]:
    from flwr_datasets import FederatedDataset

    splits: dict[str, Any] = {}

    def keep(loaded: Any) -> Any:
        splits.update(loaded)
        return loaded

    federated = FederatedDataset(
        dataset=name, partitioners={"train": 1}, shuffle=False, preprocessor=keep, **load_dataset_kwargs
    )
    try:
        # Not `load_split`: that one reports to Flower's telemetry, which writes to the user's home.
        _ = federated.partitioners
    except ValueError:
        if not splits:  # else only the train split is missing, which the caller reports
            raise
    return splits


def _folder_tables(folder: Path) -> dict[str, Table]:
    files: dict[str, list[Path]] = {}
    for path in _visible(folder, TABLE_SUFFIXES):
        if match := SPLIT_FILE.fullmatch(path.stem):
            files.setdefault(match[1], []).append(path)
    if "train" in files:
        return {split: _concatenate([_read_file(path) for path in paths], folder) for split, paths in files.items()}
    if _class_folders(folder / "train"):
        folders = {split: folder / split for split in ("train", "test")}
        return {split: _image_table(path) for split, path in folders.items() if path.is_dir()}
    return {"train": _image_table(folder)}


def _concatenate(tables: list[Table], folder: Path) -> Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        problem = f"the files of a split do not fit together ({error})"
        raise fault("data-path", str(folder), problem, "Give them the same columns and types") from error


def _visible(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    paths = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in paths if path.suffix.lower() in suffixes)


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_table(folder: Path) -> Table:
    images = [(path, label.name) for label in _class_folders(folder) for path in _visible(label, IMAGE_SUFFIXES)]
    if not images:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        remedy = "Give train.csv (or .json, .jsonl, .parquet), or one sub-folder of images for each class"
        raise fault("data-path", str(folder), f"the folder holds no data set, but {found}", remedy)
    stored = [{"bytes": None, "path": str(path)} for path, _ in images]
    return pa.table({"image": pa.array(stored, IMAGE), "label": [label for _, label in images]})


def _read_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        remedy = f"Give a file that ends in {', '.join(TABLE_SUFFIXES)}, or a folder"
        raise fault("data-path", str(path), f"files ending in {suffix!r} are not read", remedy)
    try:
        if suffix == ".csv":
            # One block: a column's type is then inferred from all of its rows, not from the first ones.
            block = csv.ReadOptions(block_size=path.stat().st_size + 1)
            return csv.read_csv(path, read_options=block)
        return _read_parquet(path) if suffix == ".parquet" else _read_json(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"cannot be read as {suffix[1:]} ({error})"
        raise fault("data-path", str(path), problem, "Repair the file, or save it in another format") from error


def _read_parquet(path: Path) -> Table:
    with parquet.ParquetFile(path) as file:
        table = file.read()
    # The row numbers that pandas leaves behind are no feature.
    return table.drop_columns([name for name in table.column_names if name.startswith("__index_level_")])


def _read_json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8").strip()
    lines = [line for line in text.split("\n") if line.strip()]
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or one object on each line")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})
