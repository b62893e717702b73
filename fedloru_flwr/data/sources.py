"""Turn a source into training samples, central test samples and a spec; each process does so once."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloru_flwr.data.samples import DataConfig, DataSpec, Label, Samples, Split, closest, fault, generator


@dataclass(frozen=True)
class Stored:
    """Samples as kept in memory: images as uint8, a quarter of what they take as float32."""

    inputs: Tensor  # (n, *input_shape), uint8 or float32
    labels: Tensor  # (n,), int64

    def take(self, indices: np.ndarray) -> "Stored":
        """Return a copy of the samples at ``indices``, as they are kept."""
        chosen = torch.from_numpy(indices.copy())  # torch warns of read-only memory
        return Stored(self.inputs[chosen], self.labels[chosen])

    def samples(self, indices: np.ndarray | None = None) -> Samples:
        """Return the samples at ``indices`` (all by default), images scaled from 0..255 to [0, 1]."""
        kept = self if indices is None else self.take(indices)
        is_image = kept.inputs.dtype == torch.uint8
        return Samples(kept.inputs.float() / 255 if is_image else kept.inputs, kept.labels)


@dataclass(frozen=True)
class Source:
    """A loaded data set: the part that clients share, the central test part, and what both look like."""

    train: Stored
    test: Stored
    spec: DataSpec
    groups: tuple[Label, ...]  # the partition column of the training part, or empty
    kinds: Tensor | None = None  # (n,), int64: classes that texts to learn to write are of, where a column says so
    notes: tuple[str, ...] = ()  # what was left out, for people

    def classes(self, config: DataConfig) -> Tensor:
        """The class of each training sample, int64, shape ``(n,)``, for a partitioner to go by.

        Raises:
            DataError: there are none, and the partitioner needs them.
        """
        if self.train.labels.dim() == 1:
            return self.train.labels
        if self.kinds is not None:
            return self.kinds
        if config.partitioner in ("dirichlet", "shards"):
            problem = f"it deals out classes, and the rows have no column {config.label_column!r} that could say them"
            remedy = "Set label-column to a column of kinds of rows, or use iid or column:<name>"
            raise fault("partitioner", config.partitioner, problem, remedy)
        return torch.zeros(len(self.train.labels), dtype=torch.int64)


def load_source(config: DataConfig) -> Source:
    """Load the source that ``config`` names, or return the one loaded before.

    Raises:
        DataError: the source cannot be read, or its columns or labels are not what ``config`` says.
    """
    defaults = DataConfig()
    is_generated = config.dataset == "glyphs"
    return _load_source(
        replace(
            config,
            # Only what the source depends on tells one from another.
            partitioner=config.partitioner if config.partition_column else defaults.partitioner,
            num_clients=defaults.num_clients,
            dirichlet_alpha=defaults.dirichlet_alpha,
            shards_per_client=defaults.shards_per_client,
            min_partition_size=defaults.min_partition_size,
            held_out_fraction=defaults.held_out_fraction,
            glyph_samples=config.glyph_samples if is_generated else defaults.glyph_samples,
            glyph_size=config.glyph_size if is_generated else defaults.glyph_size,
            glyph_noise=config.glyph_noise if is_generated else defaults.glyph_noise,
            glyph_seed=config.glyph_seed if is_generated else defaults.glyph_seed,
            seed=defaults.seed,
        )
    )


@lru_cache(maxsize=2)
def _load_source(config: DataConfig) -> Source:
    if config.text == "causal-lm":
        return _load_sequences(config)
    splits = _read(config)
    stored, spec = encode(splits, config)
    train, groups = stored["train"], splits["train"].groups
    if "test" in stored:
        return Source(train, stored["test"], spec, groups)
    kept, held = stratified_split(train.labels.numpy(), config.test_fraction)
    if not len(held):
        problem = f"no class of the {len(train.labels)} samples can spare one for the central test part"
        raise fault("test-fraction", config.test_fraction, problem, "Give more samples, or a test split")
    kept_groups = tuple(groups[index] for index in kept) if groups else ()
    return Source(train.take(kept), train.take(held), spec, kept_groups)


def _load_sequences(config: DataConfig) -> Source:
    from fedloru_flwr.data.text import pack, read_sequences

    splits = read_sequences(_tables(config), config, config.data_path or config.dataset)
    train, test = splits["train"], splits.get("test")
    notes = tuple(split.note for split in splits.values() if split.note)
    if test is None:
        kept, held = stratified_split(_numbered(train.kinds, len(train.labels)), config.test_fraction)
        if not len(held):
            problem = f"no kind of the {len(train.labels)} samples can spare one for the central test part"
            raise fault("test-fraction", config.test_fraction, problem, "Give more samples, or a test split")
        train, test = train.take(kept.tolist()), train.take(held.tolist())
    if config.packing:
        train = pack(train, config)
    kinds = torch.from_numpy(_numbered(train.kinds, len(train.labels))) if train.kinds else None
    return Source(
        train=Stored(train.inputs, train.labels),
        test=Stored(test.inputs, test.labels),
        spec=DataSpec((config.max_length,), 0),
        groups=train.groups,
        kinds=kinds,
        notes=notes,
    )


def _numbered(kinds: Sequence[Label], count: int) -> np.ndarray:
    """The kinds as numbers from 0 in their sorted order; all 0 where there are none."""
    order = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
    return np.array([order[kind] for kind in kinds] if kinds else [0] * count, dtype=np.int64)


def _tables(config: DataConfig) -> dict[str, Any]:
    """The Arrow tables of a local or hub source."""
    from fedloru_flwr.data.tables import hub_tables, local_tables

    if config.dataset == "local":
        return local_tables(Path(config.data_path))
    return hub_tables(config.dataset.removeprefix("hub:"))


def read_own_sequences(path: str, config: DataConfig) -> dict[str, Stored]:
    """Read the splits of one client's own file or folder for a causal language model.

    Raises:
        DataError: it cannot be read, or its rows are of no known form.
    """
    from fedloru_flwr.data.tables import local_tables
    from fedloru_flwr.data.text import pack, read_sequences

    splits = read_sequences(local_tables(Path(path)), config, path, grouped=False)
    if config.packing:
        splits["train"] = pack(splits["train"], config)
    return {name: Stored(split.inputs, split.labels) for name, split in splits.items()}


def read_own(path: str, config: DataConfig) -> dict[str, Split]:
    """Read the splits of a file or folder that belongs to one client.

    Raises:
        DataError: it cannot be read, or its columns are not what ``config`` says.
    """
    from fedloru_flwr.data.tables import local_tables

    return _splits(local_tables(Path(path)), config, path, grouped=False)


def _splits(tables: dict[str, Any], config: DataConfig, origin: str, *, grouped: bool) -> dict[str, Split]:
    """The inputs and labels of tables: texts, or everything else."""
    if config.text:
        from fedloru_flwr.data.text import read_texts

        return read_texts(tables, config, origin, grouped)
    from fedloru_flwr.data.columns import read_splits

    return read_splits(tables, config, origin, grouped)


def _read(config: DataConfig) -> dict[str, Split]:
    if config.dataset == "digits":
        return {"train": _read_digits()}
    if config.dataset == "glyphs":
        from fedloru_flwr.data.glyphs import read_glyphs

        return {"train": read_glyphs(config)}
    return _splits(_tables(config), config, config.data_path or config.dataset, grouped=True)


def _read_digits() -> Split:
    path = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    if path.exists():  # as `load_digits` reads it, whose import takes seconds
        rows = np.loadtxt(path, delimiter=",")
        images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)
    else:
        state = random.getstate()
        from sklearn.datasets import load_digits

        random.setstate(state)  # the import draws from Python's global generator
        digits = load_digits()
        images, labels = digits.images, digits.target
    inputs = torch.from_numpy(images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0..16
    return Split(inputs, labels.tolist())


def encode(splits: dict[str, Split], config: DataConfig) -> tuple[dict[str, Stored], DataSpec]:
    """Number the classes 0..C-1 and check that all splits have one input shape.

    The order of the classes is that of ``config.classes``; else the integers below ``config.num_classes``;
    else what the data declare; else the distinct labels of all splits, sorted.

    Raises:
        DataError: a label is none of the classes, or two splits have inputs of different shapes.
    """
    order = _class_order(splits, config)
    shapes = {name: tuple(split.inputs.shape[1:]) for name, split in splits.items()}
    if len(set(shapes.values())) > 1:
        problem = f"inputs have the shape {shapes['train']} in its train split, {shapes['test']} in its test split"
        raise fault("dataset", config.dataset, problem, "Give both splits one shape")
    stored = {name: Stored(split.inputs, _number(split, name, order, config)) for name, split in splits.items()}
    return stored, DataSpec(shapes["train"], len(order))


def _class_order(splits: dict[str, Split], config: DataConfig) -> Sequence[Label]:
    if config.class_names:
        return config.class_names
    if config.num_classes:
        return range(config.num_classes)
    if splits["train"].class_names:
        return range(len(splits["train"].class_names))
    labels = {label for split in splits.values() for label in split.labels}
    if len({type(label) for label in labels}) > 1:
        problem = "the train split has integers and the test split text, or the reverse"
        raise fault("label-column", config.label_column, problem, "Write the labels of both alike")
    return sorted(labels)


def _number(split: Split, where: str, order: Sequence[Label], config: DataConfig) -> Tensor:
    labels = split.labels
    if config.class_names:
        names = split.class_names
        in_range = names and all(isinstance(label, int) and 0 <= label < len(names) for label in labels)
        labels = [names[int(label)] if in_range else str(label) for label in labels]
    numbers = {label: number for number, label in enumerate(order)}
    for row, label in enumerate(labels):
        if label not in numbers:
            key, value = ("classes", config.classes) if config.classes else ("num-classes", len(order))
            hint = closest(label, order) if isinstance(label, str) else ""
            problem = f"the label {label!r} in row {row} (the first is 0) of the {where} split is none of them{hint}"
            remedy = "List every class in classes" if isinstance(label, str) else "Correct the label or the setting"
            raise fault(key, value, problem, remedy)
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split ``n`` samples into ``n - k`` kept and ``k = ceil(fraction * n)`` held, class by class.

    A class of ``m`` samples gives ``fraction * m``, rounded so that the total is ``k`` (largest remainders
    first) and never all of them. The draw is always the same, so that results over seeds share one test set.

    Args:
        labels: int64, shape ``(n,)``.
        fraction: in (0, 1).

    Returns:
        The indices kept and the indices held, both ascending.
    """
    rng = generator("central-split")
    classes, counts = np.unique(labels, return_counts=True)
    exact = fraction * counts
    quotas = np.minimum(np.floor(exact).astype(np.int64), counts - 1)
    short = min(math.ceil(fraction * len(labels)), int((counts - 1).sum())) - quotas.sum()
    open_classes = [c for c in np.argsort(quotas - exact, kind="stable") if quotas[c] < counts[c] - 1]
    quotas[open_classes[: max(int(short), 0)]] += 1
    held = np.sort(
        np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == label))[:quota]
                for label, quota in zip(classes, quotas, strict=True)
            ]
        )
    )
    return np.setdiff1d(np.arange(len(labels)), held), held
