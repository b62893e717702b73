"""The workloads, each defined once: settings for this package; the same samples, model and training for every rival."""

import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import LanguageModelFactory
from benchmarks.prepared import Prepared, Training

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        name: for files and the command line.
        title: for people.
        settings: of `fedloru_flwr.run`; empty where the package has no such workload and its drop-in session is used.
    """

    name: str
    title: str
    settings: dict[str, Scalar] = field(default_factory=dict)

    def prepare(self, directory: Path) -> Path:
        """Write the workload for the rivals, and return the file."""
        path = directory / f"{self.name}.pt"
        prepared = from_settings(self.name, self.settings) if self.settings else language_model()
        prepared.save(path)
        return path


# What this package does beyond the rivals is switched off where it can be: the same work for all.
_SAME_WORK: dict[str, Scalar] = {"algorithm": "fedlora", "aggregation-error": False, "device": "cpu"}

DIGITS = Workload(
    "digits",
    "small CNN on digits: 16 base channels, rank 4, 100 clients iid, 50 a round, 5 local epochs of one batch of 8",
    {
        **_SAME_WORK,
        "dataset": "digits",
        "num-clients": 100,
        "fraction-train": 0.5,
        "held-out-fraction": 0.45,
        "local-epochs": 5,
        "batch-size": 8,
        "model": "cnn",
        "model-width": 16,
        "rank": 4,
    },
)
RESNET = Workload(
    "resnet10",
    "ResNet-10 of width 16 on 32x32 glyphs: rank 4, 20 clients iid, 10 a round, 2 local epochs of one batch of 32",
    {
        **_SAME_WORK,
        "dataset": "glyphs",
        "glyph-samples": 1600,
        "glyph-size": 32,
        "num-clients": 20,
        "fraction-train": 0.5,
        "held-out-fraction": 0.5,
        "local-epochs": 2,
        "batch-size": 32,
        "model": "resnet10",
        "model-width": 16,
        "rank": 4,
    },
)
LANGUAGE = Workload(
    "language-model",
    "byte-level causal language model, 2 layers of width 128: rank 8 on all linear layers of the blocks, 20 clients, "
    "10 a round, 2 local epochs of one batch of 8 sequences of 64 bytes",
)


def from_settings(name: str, settings: dict[str, Scalar]) -> Prepared:
    """The samples that `fedloru_flwr.run` gives to each client under these settings, and what it trains."""
    from fedloru_flwr.config import RunConfig
    from fedloru_flwr.data import load_client
    from fedloru_flwr.registry import ALGORITHMS
    from fedloru_flwr.workload import data_config, network_factory

    config = RunConfig.from_mapping(settings)
    data = data_config(config)
    clients = [load_client(data, number) for number in range(config.num_clients)]
    factory = network_factory(config, clients[0][1])
    plan = ALGORITHMS[config.algorithm].build(config, factory).plan
    offsets = [0]
    for client, _ in clients:
        offsets.append(offsets[-1] + len(client.train))
    return Prepared(
        name=name,
        factory=factory,
        training=Training(
            clients=config.num_clients,
            clients_per_round=int(config.num_clients * config.fraction_train),
            local_epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            max_grad_norm=config.max_grad_norm,
        ),
        rank=config.rank,
        alpha=config.alpha,
        layers=tuple(layer.name for layer in plan.layers),
        dense_leaves=plan.dense_leaves,
        inputs=torch.cat([client.train.inputs for client, _ in clients]),
        labels=torch.cat([client.train.labels for client, _ in clients]),
        offsets=tuple(offsets),
    )


def language_model(clients: int = 20, sequences: int = 8, length: int = 64) -> Prepared:
    """A small language model; the text is that of Python's own help, dealt out in turn."""
    factory = LanguageModelFactory(length=length)
    text = "".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics)).encode()
    count = clients * sequences
    wanted = count * length + 1
    if len(text) < wanted:
        raise RuntimeError(f"Python's help has {len(text)} bytes, {wanted} are needed: use fewer clients")
    stream = torch.frombuffer(bytearray(text[:wanted]), dtype=torch.uint8).long()
    layers = tuple(
        name
        for name, module in factory().named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")
    )
    return Prepared(
        name=LANGUAGE.name,
        factory=factory,
        training=Training(clients=clients, clients_per_round=clients // 2, local_epochs=2, batch_size=sequences),
        rank=8,
        alpha=16.0,
        layers=layers,
        dense_leaves=(),
        inputs=stream[:-1].view(count, length).clone(),
        labels=stream[1:].view(count, length).clone(),
        offsets=tuple(range(0, count + 1, sequences)),
    )


def cohort_of(clients: int, directory: Path) -> Workload:
    """The small CNN with this many clients, all of them in every round, on digits that are repeated with noise.

    The central test samples stay as few as the digits', so that their evaluation does not grow with the clients.
    """
    import numpy as np
    import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
    from pyarrow import parquet
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    tests, each = 360, 15
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(bunch.target), size=clients * each + tests)
    images = (bunch.images[chosen] / 16 + 0.05 * rng.standard_normal((len(chosen), 8, 8))).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(images.ravel(), 8), 8)
    path = directory / f"digits-{clients}.parquet"
    parquet.write_table(pa.table({"image": flat, "label": bunch.target[chosen]}), path)
    return Workload(
        f"clients-{clients}",
        f"small CNN, {clients:,} clients a round",
        {
            **DIGITS.settings,
            "dataset": "local",
            "data-path": str(path.absolute()),
            "num-clients": clients,
            "fraction-train": 1.0,
            "test-fraction": tests / len(chosen),
        },
    )


WORKLOADS = {workload.name: workload for workload in (DIGITS, RESNET, LANGUAGE)}
