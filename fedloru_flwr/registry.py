"""The algorithms by name: what turns settings into a strategy. A new algorithm is one row here."""

from collections.abc import Callable
from typing import Unpack

from torch import nn

from fedloru_flwr.config import RunConfig
from fedloru_flwr.strategies import FedAvg, FederatedStrategy, FedLoRA, FedLoRU
from fedloru_flwr.strategies.federated import CommonOptions


def _fedavg(config: RunConfig, model: Callable[[], nn.Module], **common: Unpack[CommonOptions]) -> FederatedStrategy:
    return FedAvg(model, seed=config.seed, **common)


def _fedlora(config: RunConfig, model: Callable[[], nn.Module], **common: Unpack[CommonOptions]) -> FederatedStrategy:
    return FedLoRA(
        model,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=config.target_modules,
        dense_leaves=config.dense_leaves,
        seed=config.seed,
        **common,
    )


def _fedloru(config: RunConfig, model: Callable[[], nn.Module], **common: Unpack[CommonOptions]) -> FederatedStrategy:
    return FedLoRU(
        model,
        rank=config.rank,
        alpha=config.alpha,
        accumulate_every=config.accumulate_every,
        accumulate_at=config.accumulation_rounds,
        reinit="keep" if config.reinit == "keep" else "reset",
        accumulate_into="stack" if config.accumulate_into == "stack" else "merge",
        target_modules=config.target_modules,
        dense_leaves=config.dense_leaves,
        seed=config.seed,
        **common,
    )


BUILDERS = {"fedavg": _fedavg, "fedlora": _fedlora, "fedloru": _fedloru}


def build_strategy(
    config: RunConfig, model: Callable[[], nn.Module], **common: Unpack[CommonOptions]
) -> FederatedStrategy:
    """Build the strategy that ``config.algorithm`` names.

    Args:
        config: checked settings.
        model: the factory of the network.
        common: what every strategy takes, see `FederatedStrategy`.
    """
    return BUILDERS[config.algorithm](config, model, **common)
