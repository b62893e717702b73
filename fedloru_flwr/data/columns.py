"""Read an Arrow table's columns as inputs, labels and groups."""

import io
import json
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
import torch
from PIL import Image, ImageOps
from pyarrow import compute
from torch import Tensor

from fedloru_flwr.data.samples import DataConfig, DataError, Label, Split, closest, fault, split_list

Table: TypeAlias = Any  # pyarrow.Table
Column: TypeAlias = Any  # pyarrow.ChunkedArray, or an Array within one

LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "y")


def read_splits(tables: dict[str, Table], config: DataConfig, origin: str, grouped: bool = True) -> dict[str, Split]:
    """Choose the columns by the ``train`` table and read them from every table.

    Args:
        tables: one for each split, ``train`` among them.
        config: names the columns.
        origin: what to call the source in messages.
        grouped: whether to read the partition column, if ``config`` names one.

    Raises:
        DataError: a column is missing or ambiguous, or holds what cannot be an input, a label or a group.
    """
    for name, table in tables.items():
        _check_table(table, f"the {name} split of {origin}")
    train = tables["train"]
    label = choose_label(train, config, origin)
    inputs = _choose_inputs(train, label, config, origin)
    splits = {}
    for name, table in tables.items():
        where = f"the {name} split of {origin}"
        for key, column in [("label-column", label), *(("input-columns", column) for column in inputs)]:
            _require(table, key, column, where)
        splits[name] = Split(
            inputs=_read_inputs(table, inputs, where),
            labels=read_labels(table, label, where),
            class_names=declared_names(table, label),
            groups=read_groups(table, config, where) if grouped and table is train else (),
        )
    return splits


def _check_table(table: Table, where: str) -> None:
    if not table.num_rows:
        raise DataError(f"{where} has no rows. Give at least one sample.")
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise DataError(f"{where} has more than one column called {', '.join(repeated)}. Rename all but one.")


def _require(table: Table, key: str, column: str, where: str, value: str = "") -> None:
    if column not in table.column_names:
        remedy = f"Its columns are {', '.join(table.column_names)}{closest(column, table.column_names)}"
        raise fault(key, value or column, f"{where} has no column of that name", remedy)


def choose_label(table: Table, config: DataConfig, origin: str) -> str:
    """The column to predict.

    Raises:
        DataError: there is no such column, or several could be meant.
    """
    asked = config.label_column
    if asked == LABEL_COLUMNS[0] and asked not in table.column_names:
        usual = [name for name in LABEL_COLUMNS if name in table.column_names]
        if len(usual) == 1:
            return usual[0]
        if usual:
            problem = f"{origin} has no column of that name, but could mean any of {', '.join(usual)}"
            raise fault("label-column", asked, problem, "Set label-column to one of them")
    _require(table, "label-column", asked, origin)
    return asked


def _choose_inputs(table: Table, label_column: str, config: DataConfig, origin: str) -> list[str]:
    asked = list(split_list(config.input_columns))
    for name in asked:
        _require(table, "input-columns", name, origin)
        if name == label_column:
            raise fault("input-columns", config.input_columns, f"{name!r} is the label", "Leave it out")
    if asked:
        return asked
    others = [name for name in table.column_names if name not in (label_column, config.partition_column)]
    types = {name: table.schema.field(name).type for name in others}
    for kind, belongs in (("images", _is_image), ("lists", _is_list)):
        found = [name for name in others if belongs(types[name])]
        if len(found) > 1:
            problem = f"{origin} has more than one column of {kind}: {', '.join(found)}"
            raise fault("input-columns", "", problem, "Set input-columns to one of them")
        if found:
            return found
    numeric = [name for name in others if _is_number(types[name])]
    if not numeric:
        problem = f"{origin} has no image, list or numeric column besides {label_column!r}"
        raise fault("input-columns", "", problem, f"Its columns are {', '.join(table.column_names)}")
    return numeric


def _is_image(kind: Any) -> bool:
    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def _is_list(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):  # fixed-shape arrays, of `datasets` or of Arrow
        kind = kind.storage_type
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _read_inputs(table: Table, columns: list[str], where: str) -> Tensor:
    kinds = [table.schema.field(name).type for name in columns]
    if len(columns) == 1 and _is_image(kinds[0]):
        return _read_images(table[columns[0]], where)
    if len(columns) == 1 and _is_list(kinds[0]):
        return _read_lists(table[columns[0]], columns[0], where)
    for name, kind in zip(columns, kinds, strict=True):
        if not _is_number(kind):
            problem = f"in {where} it holds {kind}, not numbers"
            remedy = "List numeric columns, or a single column of images or lists"
            raise fault("input-columns", name, problem, remedy)
    features = [_numbers(table[name], name, where, 1) for name in columns]
    return torch.from_numpy(np.stack(features, axis=1))  # (n, features)


def _numbers(column: Column, name: str, where: str, per_row: int) -> np.ndarray:
    """Return the column as float32, flat, ``per_row`` values for each row."""
    # Not a "safe" cast: that one refuses integers above 2**24.
    values = np.array(compute.cast(column, pa.float32(), safe=False).to_numpy(zero_copy_only=False))
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        problem = f"{where} has a missing, NaN or infinite value in row {bad[0] // per_row} (the first is 0)"
        raise fault("input-columns", name, problem, "Fill it in, or remove the row or the column")
    return values


def _read_lists(column: Column, name: str, where: str) -> Tensor:
    """Return lists of equal lengths as float32: (n, k); nested twice (n, 1, h, w); deeper as they are."""
    values = pa.chunked_array(column).combine_chunks()
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    shape = [len(values)]
    while _is_list(values.type):
        lengths = compute.fill_null(compute.list_value_length(values), -1).to_numpy(zero_copy_only=False)
        bad = np.flatnonzero((lengths != lengths[0]) | (lengths < 1))
        if len(bad):
            row = bad[0] // int(np.prod(shape[1:]))
            problem = f"{where} has a list of another length than the first, or none, in row {row} (the first is 0)"
            raise fault("input-columns", name, problem, "Give lists of one length in all rows")
        shape.append(int(lengths[0]))
        values = values.flatten()
    if not _is_number(values.type):
        raise fault("input-columns", name, f"in {where} its lists hold {values.type}", "Give lists of numbers")
    inputs = torch.from_numpy(_numbers(values, name, where, int(np.prod(shape[1:])))).reshape(shape)
    return inputs.unsqueeze(1) if len(shape) == 3 else inputs


def _read_images(column: Column, where: str) -> Tensor:
    """Return the images as uint8, shape (n, channels, h, w)."""
    images: list[np.ndarray] = []
    for row, stored in enumerate(column):
        name = stored["path"].as_py() or f"row {row} (the first is 0)"
        pixels = _read_image(stored.as_py(), name, where)
        if images and pixels.shape != images[0].shape:
            problem = f"its (channels, height, width) is {pixels.shape}, that of the first image {images[0].shape}"
            raise fault("image", name, f"in {where}, {problem}", "Resize or convert the images to one shape")
        images.append(pixels)
    return torch.from_numpy(np.stack(images))


def _read_image(stored: dict[str, Any] | None, name: str, where: str) -> np.ndarray:
    """Return one image as uint8, shape (1, h, w) if grey, else (3, h, w)."""
    try:
        if stored is None:
            raise ValueError("it is missing")
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        remedy = "Remove it, or save it again as an 8-bit grey or RGB image"
        raise fault("image", name, f"in {where}, it cannot be read ({error})", remedy) from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_labels(table: Table, column: str, where: str) -> list[Label]:
    """The labels of every row.

    Raises:
        DataError: a row has none, or what names no class.
    """
    values = table[column].to_pylist()
    for row, value in enumerate(values):
        if value is None or value == "" or value != value:  # NaN
            problem = f"{where} is unlabelled in row {row} (the first is 0)"
            raise fault("label-column", column, problem, "Label every row, or remove those without a label")
        if not isinstance(value, int | str) and not (isinstance(value, float) and value.is_integer()):
            problem = f"{where} has {value!r} in row {row} (the first is 0), which names no class"
            raise fault("label-column", column, problem, "Use a column of integers or of text")
    return [value if isinstance(value, str) else int(value) for value in values]


def declared_names(table: Table, column: str) -> tuple[str, ...]:
    """Return the class names that `datasets` keeps in a table's metadata, or none."""
    kept = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(kept).get("info", {}).get("features", {}).get(column, {})
    return tuple(feature.get("names", ())) if isinstance(feature, dict) else ()


def read_groups(table: Table, config: DataConfig, where: str) -> tuple[Label, ...]:
    """The partition column's value of every row; empty where ``config`` names no such column.

    Raises:
        DataError: there is no such column, or it holds other things than text and integers.
    """
    column = config.partition_column
    if not column:
        return ()
    _require(table, "partitioner", column, where, config.partitioner)
    groups = table[column].to_pylist()
    for row, group in enumerate(groups):
        if not isinstance(group, int | str):
            problem = f"{where} has {group!r} there in row {row} (the first is 0)"
            raise fault("partitioner", config.partitioner, problem, "Use a column of text or integers")
    return tuple(groups)
