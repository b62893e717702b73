"""Local training and evaluation of a classifier: plain torch, on tensors that lie in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.data import Samples
from fedloru_flwr.models.plan import has_batch_norm


@dataclass(frozen=True)
class LocalOptimisation:
    """How a client optimises in one round.

    Attributes:
        epochs: passes over its samples.
        batch_size: samples a step; the last batch of an epoch may be smaller.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: this round's rate.
        momentum: SGD's momentum, AdamW's first beta.
        weight_decay: of the trained parameters.
        max_grad_norm: the gradient's norm is clipped to it; 0: not clipped.
        precision: ``"float32"``, or ``"bfloat16"`` for mixed precision: products and convolutions of the forward and
            backward passes are computed in it, weights, gradients, losses and optimiser states stay as they are.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    max_grad_norm: float
    precision: str = "float32"

    def outputs(self, forward: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What ``forward`` gives, computed in `precision` and returned in at least float32 where that is lower."""
        if self.precision == "float32":
            return forward()
        with torch.autocast(device.type, torch.bfloat16):
            return forward().float()


def choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA, else MPS, else the CPU, whatever there is.

    Raises:
        ValueError: if the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there.get(name, False):
        raise ValueError(f"device = {name!r} is not available here; use 'auto' or 'cpu'")
    return torch.device(name)


def random_order(count: int, generator: torch.Generator) -> Tensor:
    """The order in which one epoch goes through so many samples."""
    return torch.randperm(count, generator=generator)


def batches(count: int, batch_size: int, generator: torch.Generator, *, no_single: bool) -> Iterator[Tensor]:
    """Yield the indices of one epoch's batches in random order.

    Args:
        count: number of samples.
        batch_size: samples a batch; the last one may be smaller.
        generator: of the order.
        no_single: join a last batch of one sample to the one before it (batch normalisation cannot train on it).
    """
    chunks = list(torch.split(random_order(count, generator), batch_size))
    if no_single and len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    yield from chunks


def make_optimizer(parameters: list[nn.Parameter], how: LocalOptimisation) -> torch.optim.Optimizer:
    """The client's optimiser of these parameters, in its first state."""
    if how.optimizer == "adamw":
        betas = (how.momentum, 0.999)
        return torch.optim.AdamW(parameters, how.learning_rate, betas=betas, weight_decay=how.weight_decay)
    return torch.optim.SGD(parameters, how.learning_rate, momentum=how.momentum, weight_decay=how.weight_decay)


def train_locally(
    model: nn.Module, samples: Samples, how: LocalOptimisation, generator: torch.Generator, device: torch.device
) -> float:
    """Minimise the cross-entropy over the model's trainable parameters; return the mean loss of the last epoch.

    Args:
        model: changed in place; left on ``device``.
        samples: the client's training samples.
        how: the optimisation.
        generator: of the order of the samples.
        device: where to train.
    """
    model.to(device).train()
    inputs, labels = samples.inputs.to(device), samples.labels.to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, how)
    no_single = has_batch_norm(model)
    if no_single and len(samples) == 1:
        _hold_batch_norm(model)
    total = torch.zeros((), device=device)
    for _ in range(how.epochs):
        total.zero_()
        for indices in batches(len(samples), how.batch_size, generator, no_single=no_single):
            chosen = indices.to(device)
            outputs = how.outputs(partial(model, inputs[chosen]), device)
            loss = functional.cross_entropy(outputs, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            if how.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
            optimizer.step()
            total += loss.detach() * len(indices)
    return float(total) / len(samples)


@dataclass(frozen=True)
class ClassifierWork:
    """What a client does with a classifier of the package's own; others have the same methods."""

    measures = ("accuracy", "loss")

    def train(
        self,
        model: nn.Module,
        samples: Samples,
        how: LocalOptimisation,
        generator: torch.Generator,
        device: torch.device,
    ) -> float:
        """See `train_locally`."""
        return train_locally(model, samples, how, generator, device)

    def evaluate(self, model: nn.Module, samples: Samples, device: torch.device) -> dict[str, float]:
        """See `evaluate`."""
        return evaluate(model, samples, device)


def _hold_batch_norm(model: nn.Module) -> None:
    """Let batch normalisation use its running statistics: a single sample has no variance."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def evaluate(model: nn.Module, samples: Samples, device: torch.device, batch_size: int = 1024) -> dict[str, float]:
    """Return ``accuracy`` (share of right answers) and ``loss`` (mean cross-entropy) of a classifier."""
    model.to(device).eval()
    return scores(model, samples, device, batch_size)


@torch.no_grad()
def scores(
    outputs: Callable[[Tensor], Tensor], samples: Samples, device: torch.device, batch_size: int = 1024
) -> dict[str, float]:
    """Return ``accuracy`` and ``loss`` of a function from inputs to logits."""
    loss, right = 0.0, 0
    for start in range(0, len(samples), batch_size):
        inputs = samples.inputs[start : start + batch_size].to(device)
        labels = samples.labels[start : start + batch_size].to(device)
        logits = outputs(inputs)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return {"accuracy": right / len(samples), "loss": loss / len(samples)}
