"""A Flower strategy used as the inner aggregator: it averages, and adds noise or momentum, but does not sample."""

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, Strategy

from fedloru_flwr import wire


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

    def keeps_state(self) -> str | None:
        """The name of a layer that carries state from round to round, or None."""
        stateless = {"FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "FedProx"}
        return next((type(layer).__name__ for layer in self.layers() if type(layer).__name__ not in stateless), None)


def plain_average(weighted_by: str = "num-examples", **keywords: Any) -> FedAvg:
    """Flower's FedAvg over all that were drawn, the default inner strategy."""
    return FedAvg(
        min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, weighted_by_key=weighted_by, **keywords
    )
