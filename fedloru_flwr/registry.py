"""The algorithms by name: what each is, and what turns settings into its strategy. A new one is one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

if TYPE_CHECKING:
    from torch import nn

    from fedloru_flwr.config import RunConfig
    from fedloru_flwr.strategies import FederatedStrategy
    from fedloru_flwr.strategies.federated import CommonOptions

    Build = Callable[..., FederatedStrategy]


@dataclass(frozen=True)
class Algorithm:
    """A row of the registry.

    Attributes:
        build: makes the strategy from settings, the network's factory and `CommonOptions`.
        factorised: it trains factors; else every parameter.
        accumulates: it accumulates the factors' product by the settings' schedule.
    """

    build: "Build"
    factorised: bool = True
    accumulates: bool = False


def _fedavg(
    config: "RunConfig", model: "Callable[[], nn.Module]", **common: "Unpack[CommonOptions]"
) -> "FederatedStrategy":
    from fedloru_flwr.strategies import FedAvg

    return FedAvg(model, seed=config.seed, **common)


def _fedlora(
    config: "RunConfig", model: "Callable[[], nn.Module]", **common: "Unpack[CommonOptions]"
) -> "FederatedStrategy":
    from fedloru_flwr.strategies import FedLoRA

    return FedLoRA(
        model,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=config.target_modules,
        dense_leaves=config.dense_leaves,
        seed=config.seed,
        **common,
    )


def _fedloru(
    config: "RunConfig", model: "Callable[[], nn.Module]", **common: "Unpack[CommonOptions]"
) -> "FederatedStrategy":
    from fedloru_flwr.strategies import FedLoRU

    return FedLoRU(
        model,
        rank=config.rank,
        alpha=config.alpha,
        accumulate_every=config.accumulate_every,
        accumulate_at=config.accumulation_rounds,
        reinit=cast("Any", config.reinit),
        accumulate_into=cast("Any", config.accumulate_into),
        target_modules=config.target_modules,
        dense_leaves=config.dense_leaves,
        seed=config.seed,
        **common,
    )


ALGORITHMS = {
    "fedavg": Algorithm(_fedavg, factorised=False),
    "fedlora": Algorithm(_fedlora),
    "fedloru": Algorithm(_fedloru, accumulates=True),
}
