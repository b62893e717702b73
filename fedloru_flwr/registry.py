"""The algorithms by name: the class of each and the settings it takes. A new one is one row here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Unpack

if TYPE_CHECKING:
    from fedloru_flwr.config import RunConfig
    from fedloru_flwr.strategies import FederatedStrategy
    from fedloru_flwr.strategies.federated import CommonOptions, ModelSource

_OF_FACTORS = ("adapter", "ranks", "accumulate_every", "accumulate_at", "accumulate_when", "reinit", "accumulate_into")


@dataclass(frozen=True)
class Algorithm:
    """A row of the registry.

    Attributes:
        cls: the name of its strategy in `fedloru_flwr.strategies`.
        own: settings of its own, beside those that every factor-based method takes.
        factorised: it trains factors; else every parameter.
    """

    cls: str
    own: tuple[str, ...] = ()
    factorised: bool = True

    @property
    def every(self) -> int:
        """``tau`` where the settings do not say."""
        accumulation = getattr(self.strategy, "accumulation", None)
        return accumulation.every if accumulation is not None else 0

    @property
    def strategy(self) -> "type[FederatedStrategy]":
        """The strategy's class."""
        found: type[FederatedStrategy] = getattr(import_module("fedloru_flwr.strategies"), self.cls)
        return found

    @property
    def foreign(self) -> tuple[str, ...]:
        """Settings that it does not have: other methods' own, and where it trains no factors those of factors."""
        others = {name for other in ALGORITHMS.values() for name in other.own} - set(self.own)
        return (*sorted(others), *(() if self.factorised else _OF_FACTORS))

    def build(
        self, config: "RunConfig", model: "ModelSource", **common: "Unpack[CommonOptions]"
    ) -> "FederatedStrategy":
        """Make the strategy that the settings describe."""
        own: dict[str, Any] = {"seed": config.seed}
        if self.factorised:
            own |= {
                "rank": config.rank,
                "alpha": config.alpha,
                "accumulate_every": config.accumulate_every,
                "accumulate_at": config.accumulation_rounds,
                "accumulate_when": config.accumulate_when,
                "reinit": config.reinit,
                "accumulate_into": config.accumulate_into,
                "adapter": None if config.adapter == "auto" else config.adapter,
                "ranks": config.ranks,
                "target_modules": config.target_modules,
                "dense_leaves": "all" if config.dense_leaves == "auto" else config.dense_leaves,
            }
        own |= {name: getattr(config, name) for name in self.own}
        return self.strategy(model, **own, **common)


ALGORITHMS = {
    "fedavg": Algorithm("FedAvg", factorised=False),
    "fedlora": Algorithm("FedLoRA"),
    "fedloru": Algorithm("FedLoRU"),
    "fedloru-seeded": Algorithm("FedLoRUSeeded"),
    "pfedloru": Algorithm("PFedLoRU", ("personal_rank", "personal_alpha", "global_epochs", "personal_epochs")),
    "mfedloru": Algorithm("MFedLoRU", ("nested_scale",)),
    "fedhm": Algorithm("FedHM"),
    "fedpara": Algorithm("FedPara"),
    "ffa-lora": Algorithm("FFALoRA"),
    "rolora": Algorithm("RoLoRA"),
    "flora": Algorithm("FLoRA"),
    "fedex-lora": Algorithm("FedExLoRA"),
    "flexlora": Algorithm("FlexLoRA"),
    "hetlora": Algorithm("HetLoRA"),
    "fedsa-lora": Algorithm("FedSALoRA"),
    "lowrank-ef": Algorithm("LowRankEF"),
}
