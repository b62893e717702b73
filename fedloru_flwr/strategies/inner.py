"""A Flower strategy used as the inner aggregator: it averages, and adds noise or momentum, but does not sample."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fedloru_flwr import wire

_STATELESS = ("FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "FedProx")
# Under which attributes Flower's wrappers for differential privacy keep a number from round to round.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "DifferentialPrivacyServerSideFixedClipping": (),
    "DifferentialPrivacyClientSideFixedClipping": (),
    "DifferentialPrivacyServerSideAdaptiveClipping": ("clipping_norm",),
    "DifferentialPrivacyClientSideAdaptiveClipping": ("clipping_norm",),
}
# Under which attributes Flower's server optimisers keep their moments.
_MOMENTS = {
    "FedAvgM": ("momentum_vector",),
    "FedAdam": ("m_t", "v_t"),
    "FedYogi": ("m_t", "v_t"),
    "FedAdagrad": ("m_t", "v_t"),
}
_FROM_THE_MEAN = (FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad)
SERVER_OPTIMIZERS = ("none", "fedavgm", "fedadam", "fedyogi", "fedadagrad")


class _CohortGrid(Grid):
    """Shows an inner strategy the drawn participants as all the nodes there are.

    Where the strategy wants more nodes than were drawn (``min_train_nodes`` and the like) it is shown placeholders,
    whose messages are not sent.
    """

    def __init__(self, grid: Grid, node_ids: list[int], at_least: int) -> None:
        self._grid = grid
        self._node_ids = [*node_ids, *range(-1, -1 - max(0, at_least - len(node_ids)), -1)]

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._node_ids)

    def get_nodes(self) -> Iterable[Any]:
        drawn = set(self._node_ids)
        return [node for node in self._grid.get_nodes() if node.node_id in drawn]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise RuntimeError("an inner strategy only configures and aggregates; sending is the outer strategy's part")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise RuntimeError("an inner strategy only configures and aggregates; receiving is the outer strategy's part")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise RuntimeError("an inner strategy only configures and aggregates; sending is the outer strategy's part")


class InnerStrategy:
    """The outer strategy's view of a Flower strategy.

    Args:
        strategy: for example ``FedAvg()``, ``FedAdam()``, ``FedMedian()`` or a DP wrapper around one.

    Raises:
        TypeError: if it is no Flower strategy of the Message API.
        ValueError: if it samples by a fraction of its own.
    """

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(
                "inner must be an instance of a strategy of flwr.serverapp.strategy, got "
                + (f"the class {strategy.__name__}" if isinstance(strategy, type) else type(strategy).__name__)
            )
        self.strategy = strategy
        self._at_least = 0
        for layer in self.layers():
            for phase in ("train", "evaluate"):
                fraction = getattr(layer, f"fraction_{phase}", 1.0)
                if fraction != 1.0 and (fraction != 0.0 or phase == "train"):
                    raise ValueError(
                        f"the inner strategy {type(layer).__name__} has fraction_{phase}={fraction}: participants are "
                        f"drawn by the outer strategy, so give fraction_{phase} to that one"
                    )
            wanted = [getattr(layer, f"min_{what}_nodes", 0) for what in ("train", "evaluate", "available")]
            self._at_least = max(self._at_least, *wanted)
        innermost = self.layers()[-1]
        self.weighted_by: str = getattr(innermost, "weighted_by_key", "num-examples")

    def options(self) -> list[dict[str, int | float]]:
        """The numbers that the strategy and what it wraps were made with, to tell one from another."""
        sampling = ("min_", "fraction_")
        return [
            {
                name: value
                for name, value in sorted(vars(layer).items())
                if isinstance(value, int | float)
                and not name.startswith(sampling)
                and name not in _NUMBERS.get(type(layer).__name__, ())
            }
            for layer in self.layers()
        ]

    def layers(self) -> list[Strategy]:
        """The strategy and what it wraps, outermost first."""
        layers = [self.strategy]
        while isinstance(wrapped := getattr(layers[-1], "strategy", None), Strategy):
            layers.append(wrapped)
        return layers

    def configure(
        self,
        phase: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        node_ids: list[int],
    ) -> RecordDict | None:
        """The content the strategy would send this round; None if it skips the phase.

        Flower's strategies send one content to all; the outer strategy addresses and completes it.
        """
        configure = self.strategy.configure_train if phase == "train" else self.strategy.configure_evaluate
        cohort = _CohortGrid(grid, node_ids, self._at_least)
        for layer in self.layers():
            if isinstance(layer, FedAvgM):
                layer.current_arrays = None  # else it keeps those it has returned, which a restart replaces
        own = ConfigRecord({**config, wire.SERVER_ROUND: server_round})
        messages = list(configure(server_round, arrays, own, cohort))
        return messages[0].content if messages else None

    def aggregate_train(
        self, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate judged and sorted replies."""
        return self.strategy.aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: list[Message]) -> MetricRecord | None:
        """Aggregate judged and sorted evaluation replies."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def is_plain(self) -> bool:
        """Whether it is a weighted mean and nothing else."""
        told = getattr(self.strategy, "is_plain_mean", False)
        return len(self.layers()) == 1 and (told or type(self.strategy).__name__ in ("FedAvg", "FedProx"))

    def needs_each_reply(self) -> str:
        """Why it needs the replies themselves; empty where their weighted mean, as one reply, gives the same."""
        name = type(self.strategy).__name__
        if len(self.layers()) > 1:
            return f"{name} wraps {type(self.layers()[1]).__name__} and may look at each"
        if type(self.strategy) not in _FROM_THE_MEAN or "aggregate_train" in vars(self.strategy):
            return f"{name} may look at each"
        if getattr(self.strategy, "train_metrics_aggr_fn", None) is not aggregate_metricrecords:
            return f"{name} has a train_metrics_aggr_fn, which may look at each"
        return ""

    def has_moments(self) -> bool:
        """Whether it remembers earlier rounds' means, as server optimisers do."""
        return any(type(layer).__name__ in _MOMENTS for layer in self.layers())

    def keeps_unknown_state(self) -> str | None:
        """The name of a layer that carries state from round to round which `read_state` does not know, or None."""
        known = {*_STATELESS, *_MOMENTS, *_NUMBERS}
        for layer in self.layers():
            if type(layer).__name__ not in known and not getattr(layer, "is_stateless", False):
                return type(layer).__name__
            if getattr(layer, "accountant", None) is not None:
                return f"{type(layer).__name__} with its accountant"
        return None

    def is_private(self) -> bool:
        """Whether a wrapper for differential privacy is among the layers."""
        return not self._kinds().isdisjoint(_NUMBERS)

    def clips_updates(self) -> bool:
        """Whether it scales each update by its norm, which must not be zero then."""
        return any(name.startswith("DifferentialPrivacyServerSide") for name in self._kinds())

    def clips_on_clients(self) -> bool:
        """Whether it relies on a mod of the clients that clips their updates."""
        return any(name.startswith("DifferentialPrivacyClientSide") for name in self._kinds())

    def _kinds(self) -> set[str]:
        """The names of the layers' classes and of what these derive from."""
        return {kind.__name__ for layer in self.layers() for kind in type(layer).__mro__}

    def read_state(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The moments of a server optimiser and the clipping norms of DP wrappers, as named tensors.

        Args:
            keys: the Trainables, in order: FedAvgM keeps its momentum as a list.
        """
        found: dict[str, Tensor] = {}
        for index, name, moments in self._moments():
            named = moments.items() if isinstance(moments, dict) else zip(keys, moments, strict=True)
            found |= {f"{index}/{name}/{key}": torch.from_numpy(np.array(value)) for key, value in named}
        for index, layer in enumerate(self.layers()):
            for name in _NUMBERS.get(type(layer).__name__, ()):
                found[f"{index}/{name}"] = torch.tensor(getattr(layer, name), dtype=torch.float64)
        return found

    def write_state(self, tensors: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        """Put back what `read_state` gave."""
        for index, layer in enumerate(self.layers()):
            for name in _MOMENTS.get(type(layer).__name__, ()):
                prefix = f"{index}/{name}/"
                named = {key: tensors[prefix + key].numpy().copy() for key in keys if prefix + key in tensors}
                if named:
                    setattr(layer, name, list(named.values()) if name == "momentum_vector" else named)
            for name in _NUMBERS.get(type(layer).__name__, ()):
                if f"{index}/{name}" in tensors:
                    setattr(layer, name, tensors[f"{index}/{name}"].item())

    def restart(self, keys: Sequence[str], restarted: Collection[str]) -> None:
        """Set the moments of factors that have been drawn anew to zero: they belonged to other variables."""
        for _, _, moments in self._moments():
            if isinstance(moments, dict):
                for key in restarted:
                    if key in moments:
                        moments[key] = np.zeros_like(moments[key])
            else:
                moments[:] = [
                    np.zeros_like(value) if key in restarted else value
                    for key, value in zip(keys, moments, strict=True)
                ]

    def _moments(self) -> Iterator[tuple[int, str, Any]]:
        for index, layer in enumerate(self.layers()):
            for name in _MOMENTS.get(type(layer).__name__, ()):
                if (moments := getattr(layer, name)) is not None:
                    yield index, name, moments


def mean_metrics(metrics: Sequence[Mapping[str, Any]], weighted_by: str) -> dict[str, Any]:
    """The clients' metrics as Flower averages them, to the last bit, without the one that weighs them.

    Args:
        metrics: of each client, all of the same names and lengths.
        weighted_by: the name of the weight.
    """
    weights = [one[weighted_by] for one in metrics]
    total = sum(weights)
    mean: dict[str, Any] = {}
    for one, weight in zip(metrics, [weight / total for weight in weights], strict=True):
        for name, value in one.items():
            if name == weighted_by:
                continue
            if isinstance(value, list):
                parts = [part * weight for part in value]
                mean[name] = [a + b for a, b in zip(mean[name], parts, strict=True)] if name in mean else parts
            else:
                mean[name] = mean[name] + value * weight if name in mean else value * weight
    return mean


def plain_average(weighted_by: str = "num-examples", **keywords: Any) -> FedAvg:
    """Flower's FedAvg over all that were drawn, the default inner strategy."""
    return FedAvg(
        min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, weighted_by_key=weighted_by, **keywords
    )


def server_optimizer(
    name: str, learning_rate: float, momentum: float, second_momentum: float, adaptivity: float
) -> FedAvg | None:
    """One of Flower's server optimisers over the round's mean (Reddi et al., arXiv 2003.00295), or None for ``none``.

    The pseudo-gradient is the mean minus what was sent; for example FedAvgM steps by ``eta v`` with
    ``v <- beta_1 v + mean - w``.

    Args:
        name: one of `SERVER_OPTIMIZERS`.
        learning_rate: ``eta``; 0 for 1 (FedAvgM) or 0.01 (the adaptive ones, whose step is about ``eta`` a number).
        momentum: ``beta_1``.
        second_momentum: ``beta_2`` of FedAdam and FedYogi.
        adaptivity: ``tau``, added to the root of the second moment.
    """
    learning_rate = learning_rate or (1.0 if name == "fedavgm" else 0.01)
    common: dict[str, Any] = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    if name == "fedavgm":
        return FedAvgM(server_learning_rate=learning_rate, server_momentum=momentum, **common)
    if name == "fedadagrad":
        return FedAdagrad(eta=learning_rate, tau=adaptivity, **common)
    adaptive = {"fedadam": FedAdam, "fedyogi": FedYogi}
    if name in adaptive:
        return adaptive[name](eta=learning_rate, beta_1=momentum, beta_2=second_momentum, tau=adaptivity, **common)
    return None
