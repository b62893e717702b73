"""A workload as every rival reads it: the clients' samples, what is trained, and how; one file, torch alone needed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import Factory, LanguageModelFactory, NetworkFactory

_FACTORIES: dict[str, Any] = {"network": NetworkFactory, "language-model": LanguageModelFactory}


@dataclass(frozen=True)
class Training:
    """What a client does in a round: plain SGD with momentum, the gradient's norm clipped.

    Attributes:
        clients: how many there are.
        clients_per_round: how many of them train in a round.
        local_epochs: passes over a client's samples.
        batch_size: samples a step.
        learning_rate: of SGD.
        momentum: of SGD; it starts from zero in every round.
        max_grad_norm: the gradient's norm is clipped to it.
    """

    clients: int
    clients_per_round: int
    local_epochs: int
    batch_size: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    max_grad_norm: float = 5.0


@dataclass(frozen=True)
class Prepared:
    """A workload with its data.

    Attributes:
        name: the workload's.
        factory: builds the plain model, frozen weights included.
        training: see `Training`.
        rank: of the low-rank layers.
        alpha: their update is ``alpha / rank * B A``.
        layers: names of the layers that get a low-rank pair beside their frozen weight.
        dense_leaves: names of the parameters trained as they are.
        inputs: of all clients, one after the other.
        labels: likewise.
        offsets: client ``k`` has the samples ``offsets[k]`` to ``offsets[k + 1]``.
    """

    name: str
    factory: Factory
    training: Training
    rank: int
    alpha: float
    layers: tuple[str, ...]
    dense_leaves: tuple[str, ...]
    inputs: Tensor
    labels: Tensor
    offsets: tuple[int, ...]

    def client(self, number: int) -> tuple[Tensor, Tensor]:
        """The samples of a client: views, not copies."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        return self.inputs[part], self.labels[part]

    def cohort(self, server_round: int) -> range:
        """The clients of a round, for those who choose them by themselves: one window after the other."""
        count, clients = self.training.clients_per_round, self.training.clients
        start = (server_round * count) % (clients - count + 1) if clients > count else 0
        return range(start, start + count)

    def steps(self, number: int) -> int:
        """The steps of a client in a round."""
        count = self.offsets[number + 1] - self.offsets[number]
        return -(-count // self.training.batch_size) * self.training.local_epochs

    def save(self, path: Path) -> None:
        """Write the file."""
        kind = next(kind for kind, made in _FACTORIES.items() if isinstance(self.factory, made))
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content |= {
            "factory": {"kind": kind, **dataclasses.asdict(self.factory)},
            "training": dataclasses.asdict(self.training),
        }
        torch.save(content, path)

    @classmethod
    def load(cls, path: str | Path) -> "Prepared":
        """Read the file; the samples stay on disk until they are used."""
        content = torch.load(path, mmap=True, weights_only=True)
        factory = dict(content.pop("factory"))
        made = _FACTORIES[factory.pop("kind")](**factory)
        return cls(**{**content, "factory": made, "training": Training(**content["training"])})


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
