"""What the rest of the package says about data: samples, one client's share of them, and the settings."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

PARTITIONERS = ("iid", "dirichlet", "shards", "column:<name>")
SOURCES = ("digits", "local", "hub:<name>", "glyphs")
GLYPH_CLASSES = 62
GLYPH_COLUMNS = ("font", "style", "font-style")

IGNORED = -100  # the label of a token that has to be followed by none in particular; as in torch's cross-entropy

Label: TypeAlias = int | str


class DataError(ValueError):
    """Data or data settings that cannot be used; the message names the setting and how to mend it."""


@dataclass(frozen=True)
class Samples:
    """Labelled samples, in a fixed order. They may be shared by several callers: do not write to them.

    Attributes:
        inputs: float32, shape ``(n, *input_shape)``; of texts int64, the numbers of tokens, ``(n, length)``.
        labels: int64, shape ``(n,)``, each in ``0..num_classes-1``; of a causal language model ``(n, length)``, the
            token that has to follow, or -100 for any.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: "np.ndarray | Tensor | list[int]") -> "Samples":
        """Return a copy of the samples at ``indices`` (integers, shape ``(k,)``), in that order."""
        # A copy, since torch warns of read-only arrays.
        chosen = indices if isinstance(indices, Tensor) else torch.from_numpy(np.array(indices, dtype=np.int64))
        return Samples(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True)
class DataSpec:
    """What a network has to fit: the shape of one input (no batch axis) and the number of classes."""

    input_shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class ClientData:
    """One client's own samples: those it trains on, and those it only evaluates on. Neither is empty."""

    train: Samples
    held_out: Samples


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how clients share them; hashable, every field a flat scalar.

    Attributes:
        dataset: ``"digits"``, ``"local"`` (the file or folder at ``data_path``), ``"hub:<name>"`` or ``"glyphs"``.
        data_path: for ``"local"``: a CSV, JSON, JSON Lines or Parquet file, or a folder.
        partitioner: ``"iid"``, ``"dirichlet"``, ``"shards"`` or ``"column:<name>"``.
        num_clients: how many clients share the training part.
        dirichlet_alpha: concentration; the smaller, the fewer classes a client sees.
        shards_per_client: pieces of the label-sorted training part that a client gets.
        min_partition_size: fewest samples of a client; at least 2, one to train on and one to hold out.
        label_column: column of the labels. The default gives way to another common name where there is
            no such column.
        input_columns: comma list. Empty: the image column, else the one column of lists, else every
            numeric column but the label and the partition column.
        classes: comma list of class names, in the order of the labels 0, 1, ... Empty: the names that the
            data declare, else the distinct labels, sorted.
        num_classes: 0, or the number of classes, with integer labels used as they are.
        test_fraction: central test part of a source without a ``test`` split; it does not depend on ``seed``.
        held_out_fraction: part of each client's samples that it does not train on.
        glyph_samples: how many glyphs to generate, the central test part included; at least two of each class.
        glyph_size: height and width of a glyph's image in pixels, at least 8.
        glyph_noise: standard deviation of the noise on a glyph's pixels, which are in [0, 1].
        glyph_seed: of the glyphs; apart from ``seed``, so that runs over several seeds see one data set.
        text: ``"causal-lm"`` or ``"classification"`` of texts; empty for everything else.
        tokenizer: the transformers model whose tokenizer reads the texts.
        max_length: tokens of a sample at most.
        packing: whether training samples are made of several rows.
        prompt_template: see `fedloru_flwr.data.text`.
        seed: of the partitions and of each client's held-out part.
    """

    dataset: str = "digits"
    data_path: str = ""
    partitioner: str = "iid"
    num_clients: int = 100
    dirichlet_alpha: float = 0.5
    shards_per_client: int = 2
    min_partition_size: int = 2
    label_column: str = "label"
    input_columns: str = ""
    classes: str = ""
    num_classes: int = 0
    test_fraction: float = 0.2
    held_out_fraction: float = 0.2
    glyph_samples: int = 12000
    glyph_size: int = 28
    glyph_noise: float = 0.06
    glyph_seed: int = 0
    text: str = ""
    tokenizer: str = ""
    max_length: int = 512
    packing: bool = False
    prompt_template: str = "auto"
    seed: int = 0

    @property
    def partition_column(self) -> str:
        """The column that ``column:<name>`` partitions by; empty for the other partitioners."""
        kind, _, column = self.partitioner.partition(":")
        return column if kind == "column" else ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names listed in ``classes``."""
        return split_list(self.classes)


@dataclass(frozen=True)
class Split:
    """One split of a source as read: inputs as a tensor, labels and groups as the source has them.

    Attributes:
        inputs: shape ``(n, *input_shape)``; uint8 for images, to be divided by 255, int64 for texts, else float32.
        labels: ``n`` integers or class names.
        class_names: the names of integer labels 0, 1, ... where the source declares them, else empty.
        groups: ``n`` values of the partition column, or empty.
    """

    inputs: Tensor
    labels: list[Label]
    class_names: tuple[str, ...] = ()
    groups: tuple[Label, ...] = ()


def split_list(text: str) -> tuple[str, ...]:
    """Return the entries of a comma list, without the blanks around them."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def fault(key: str, value: object, problem: str, remedy: str) -> DataError:
    """Return the error that setting ``key`` (kebab-case) has ``value``, what is wrong and what mends it."""
    return DataError(f"{key} = {value!r}: {problem}. {remedy}.")


def closest(value: object, names: Iterable[object]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the name most like ``value``, or nothing if none is like it."""
    matches = difflib.get_close_matches(str(value), [str(name) for name in names], n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def generator(stream: str, *numbers: int) -> np.random.Generator:
    """Return a random generator that depends on the stream's name and the numbers (all >= 0) only."""
    # The length and the closing 1 keep streams apart: numpy ignores zeros at the end of a seed.
    return np.random.default_rng([len(stream), *stream.encode(), *numbers, 1])


def check(config: DataConfig) -> None:
    """Check what can be told from the settings alone, without loading anything.

    Raises:
        DataError: a value is unknown or out of range.
    """
    _check_choices(config)
    _check_ranges(config)
    names = config.class_names
    if len(set(names)) < len(names):
        raise fault("classes", config.classes, "a class is listed twice", "List every class once")
    if names and config.num_classes not in (0, len(names)):
        problem = f"classes lists {len(names)} names"
        raise fault("num-classes", config.num_classes, problem, "Leave one of the two unset")


def _check_choices(config: DataConfig) -> None:
    for key, value, allowed in (
        ("dataset", config.dataset, SOURCES),
        ("partitioner", config.partitioner, PARTITIONERS),
    ):
        kind, colon, name = value.partition(":")
        known = value in allowed or (colon and name and f"{kind}:<name>" in allowed)
        if not known or "<" in value:
            hint = closest(kind if colon else value, [entry.partition(":")[0] for entry in allowed])
            raise fault(key, value, f"unknown{hint}", f"Use one of: {', '.join(allowed)}")
    if config.dataset == "local" and not config.data_path:
        raise fault("data-path", "", "dataset = 'local' needs a file or folder", "Set data-path")
    if config.dataset == "digits" and config.partition_column:
        remedy = "Use iid, dirichlet or shards, or a local or hub data set"
        raise fault("partitioner", config.partitioner, "the digits have no columns", remedy)
    if config.dataset == "glyphs" and config.partition_column not in ("", *GLYPH_COLUMNS):
        problem = f"the glyphs have no such column{closest(config.partition_column, GLYPH_COLUMNS)}"
        remedy = f"Use {', '.join(f'column:{name}' for name in GLYPH_COLUMNS)}, iid, dirichlet or shards"
        raise fault("partitioner", config.partitioner, problem, remedy)


def _check_ranges(config: DataConfig) -> None:
    for key, number, least in (
        ("num-clients", config.num_clients, 1),
        ("shards-per-client", config.shards_per_client, 1),
        ("min-partition-size", config.min_partition_size, 2),
        ("num-classes", config.num_classes, 0),
        ("glyph-samples", config.glyph_samples, 2 * GLYPH_CLASSES),
        ("glyph-size", config.glyph_size, 8),
        ("glyph-seed", config.glyph_seed, 0),
        ("seed", config.seed, 0),
    ):
        if number < least:
            why = {
                "min-partition-size": "; a client needs one sample to train on and one to hold out",
                "glyph-samples": f"; each of the {GLYPH_CLASSES} classes needs two, one to train on and one to test on",
                "glyph-size": " pixels, too few to tell characters apart",
            }.get(key, "")
            raise fault(key, number, f"below {least}{why}", f"Use an integer of at least {least}")
    if not 0 < config.dirichlet_alpha < float("inf"):
        remedy = "Use a number above 0, such as 0.5; the smaller, the more skewed"
        raise fault("dirichlet-alpha", config.dirichlet_alpha, "not a positive finite number", remedy)
    if not 0 <= config.glyph_noise < float("inf"):
        remedy = "Use a number from 0 (none), such as 0.06; pixels are in [0, 1]"
        raise fault("glyph-noise", config.glyph_noise, "not a finite number of at least 0", remedy)
    for key, fraction in (
        ("test-fraction", config.test_fraction),
        ("held-out-fraction", config.held_out_fraction),
    ):
        if not 0 < fraction < 1:
            raise fault(key, fraction, "not between 0 and 1", "Use a fraction such as 0.2")
