"""The model, its data and local training: PEFT and torch."""

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.networks import loss_of
from benchmarks.prepared import Prepared, trained


@lru_cache(maxsize=1)
def load(path: str) -> Prepared:
    """The data and settings, once a process."""
    return Prepared.load(path)


@lru_cache(maxsize=1)
def base_network(path: str) -> nn.Module:
    """The frozen network, once a process: what `from_pretrained` would read from a disk."""
    return load(path).factory()


def get_model(path: str) -> nn.Module:
    """The network with PEFT's LoRA layers, built anew; the dense leaves are trained as well."""
    prepared = load(path)
    config = LoraConfig(
        r=prepared.rank,
        lora_alpha=prepared.alpha,
        target_modules=list(prepared.layers),
        lora_dropout=0.0,
        bias="none",
    )
    model = get_peft_model(copy.deepcopy(base_network(path)), config)
    for name in prepared.dense_leaves:
        model.base_model.model.get_parameter(name).requires_grad_(True)
    return model


@lru_cache(maxsize=1)
def kept_model(path: str) -> nn.Module:
    """The same, kept in the process."""
    return get_model(path)


def set_weights(model: nn.Module, received: Mapping[str, Tensor]) -> None:
    """Load what is trained."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(received[name])


def train(model: nn.Module, prepared: Prepared, client: int) -> tuple[float, int]:
    """Train on the client's samples; return the last epoch's mean loss and how many samples there are."""
    how = prepared.training
    inputs, labels = prepared.client(client)
    parameters = list(trained(model).values())
    optimizer = torch.optim.SGD(parameters, how.learning_rate, momentum=how.momentum, fused=True)
    model.train()
    total = 0.0
    for epoch in range(how.local_epochs):
        for chosen in torch.randperm(len(labels)).split(how.batch_size):
            loss = loss_of(model(inputs[chosen]), labels[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, how.max_grad_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if epoch == how.local_epochs - 1:
                total += loss.item() * len(chosen)
    return total / len(labels), len(labels)
