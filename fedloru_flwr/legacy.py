"""Low-rank training for projects with ``NumPyClient`` and ``flwr.server.strategy``, which Flower calls legacy.

Flower runs such projects through a server of its own, which knows model weights as one list of arrays. Here they are
run by a strategy of this package over the Message API instead, with the project's parts as they are: the client around
the session's model, the legacy strategy as the inner one, which configures and averages.

::

    app = legacy_server_app(server_fn, FedLoRU, Net, rank=4, alpha=4, accumulate_every=10)  # server_app.py
    app = legacy_client_app(client_fn, Net)  # client_app.py, with def client_fn(context, net)
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.logger import log
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server import strategy as legacy
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloru_flwr import wire
from fedloru_flwr.clients.mods import session_mod
from fedloru_flwr.clients.session import LowRankSession, ModelSource
from fedloru_flwr.models.plan import build_seeded
from fedloru_flwr.strategies.federated import EvaluateFunction, FederatedStrategy

ClientFunction = Callable[[Context, nn.Module], Client | NumPyClient]
ServerFunction = Callable[[Context], ServerAppComponents]
StrategyFactory = Callable[..., FederatedStrategy]
Options = Callable[[Context], Mapping[str, Any]]
_TIMEOUT = 3600.0
_OWN_LOSS = "legacy-loss"  # a metric that a client itself calls loss, beside the loss that it returns
_OWN_KEYS = (wire.HEADER, wire.ENTRIES, wire.STATISTICS, wire.EXTRAS)

# --- the client -------------------------------------------------------------------------------------------------------


def legacy_client_app(client_fn: ClientFunction, model: ModelSource, *, mods: list[Mod] | None = None) -> ClientApp:
    """Make a ClientApp of a ``client_fn`` whose clients train a model that is given to them.

    ``fit`` and ``evaluate`` are called as Flower calls them. The parameters they receive are what ``get_parameters``
    gives for that model as it came, or the values of its state dict where the client has none, so that setting them is
    allowed and changes nothing; those that ``fit`` returns must be the model's after training. What travels is neither,
    but the model's factors.

    Args:
        client_fn: as before, but with the model as its second argument, which the client is to be built around.
        model: a factory (a class or a function without arguments) or an instance, see `LowRankSession`.
        mods: of the Message API; those of ``flwr.client.mod`` read messages that are not sent here.

    Raises:
        TypeError: if ``client_fn`` does not take two arguments.
    """
    _check_client_fn(client_fn)
    app = ClientApp(mods=[session_mod, *(mods or [])])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        session = LowRankSession(model, message, context, base_by_value=True)
        client = _client(client_fn, context, session.model)
        result = client.fit(FitIns(_parameters(client, session.model), _config(message)))
        _check_status(result, "fit")
        _check_returned(result.parameters, _parameters(client, session.model))
        return session.reply({**result.metrics, wire.NUM_EXAMPLES: result.num_examples})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        session = LowRankSession(model, message, context, base_by_value=True)
        client = _client(client_fn, context, session.model)
        result = client.evaluate(EvaluateIns(_parameters(client, session.model), _config(message)))
        _check_status(result, "evaluate")
        metrics = {_OWN_LOSS if name == "loss" else name: value for name, value in result.metrics.items()}
        return session.reply({"loss": result.loss, **metrics, wire.NUM_EXAMPLES: result.num_examples})

    return app


def _check_client_fn(client_fn: ClientFunction) -> None:
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one.name for one in inspect.signature(client_fn).parameters.values() if one.kind in places]
    if len(taken) != 2:
        raise TypeError(
            f"client_fn takes ({', '.join(taken)}), expected (context, net): the model comes with the call, with its "
            "adapters inside; take it as the second argument and build the client around it, instead of a model of "
            "client_fn's own"
        )


def _client(client_fn: ClientFunction, context: Context, model: nn.Module) -> Client:
    client = client_fn(context, model)
    if not isinstance(client, Client | NumPyClient):
        raise TypeError(f"client_fn returned {type(client).__name__}, expected a NumPyClient or its to_client()")
    return client.to_client()


def _parameters(client: Client, model: nn.Module) -> Parameters:
    """The model's weights as the project sees them."""
    told = client.get_parameters(GetParametersIns(config={}))
    if told.status.code == Code.OK:
        return told.parameters
    return ndarrays_to_parameters(_ndarrays(model.state_dict()))


def _ndarrays(state_dict: Mapping[str, Tensor]) -> list[NDArray[Any]]:
    """The values of a state dict; bfloat16, which NumPy lacks, in float32."""
    values = (value.detach().cpu() for value in state_dict.values())
    return [(value.float() if value.dtype == torch.bfloat16 else value).numpy() for value in values]


def _config(message: Message) -> dict[str, Scalar]:
    """The project's own settings of this round."""
    records = message.content.config_records.values()
    return {
        name: value
        for record in records
        for name, value in record.items()
        if name not in _OWN_KEYS and not isinstance(value, list)
    }


def _check_status(result: FitRes | EvaluateRes, what: str) -> None:
    if result.status.code in (Code.FIT_NOT_IMPLEMENTED, Code.EVALUATE_NOT_IMPLEMENTED):
        raise ValueError(f"No {what} function registered: the client has no method {what}")  # as a Message-API app says
    if result.status.code != Code.OK:
        raise ValueError(f"the client's {what} says {result.status.code.name}: {result.status.message}")


def _check_returned(returned: Parameters, expected: Parameters) -> None:
    """Refuse parameters that are not those of the model: they would be lost."""
    got, have = parameters_to_ndarrays(returned), parameters_to_ndarrays(expected)
    if len(got) == len(have) and all(_same(a, b) for a, b in zip(got, have, strict=True)):
        return
    unlike = f"{sum(not _same(a, b) for a, b in zip(got, have, strict=False))} of them other than the model's"
    raise ValueError(
        f"fit returned {len(got)} arrays, the model it was given has {len(have)}"
        + (f", {unlike}" if len(got) == len(have) else "")
        + ": what is sent is taken from that model, so train the one that client_fn receives as its second argument, "
        "and return its parameters unchanged"
    )


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f"))


# --- the server -------------------------------------------------------------------------------------------------------


def legacy_server_app(
    server_fn: ServerFunction,
    strategy: StrategyFactory,
    model: ModelSource,
    *,
    options: Options | None = None,
    **keywords: Any,
) -> ServerApp:
    """Make a ServerApp of a ``server_fn`` whose legacy strategy becomes the inner one of a strategy of this package.

    Args:
        server_fn: as before; its ``ServerAppComponents`` hold a strategy and a config.
        strategy: for example ``FedLoRU``.
        model: a factory (a class or a function without arguments), see `from_legacy`.
        options: further arguments of ``strategy`` that depend on the context, such as the run config.
        keywords: arguments of ``strategy``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        components = server_fn(context)
        _check_components(components)
        given = components.strategy or legacy.FedAvg()
        settings = {**keywords, **(options(context) if options else {})}
        low_rank = from_legacy(strategy, model, given, **settings)
        run_legacy(low_rank, given, grid, components.config or ServerConfig())

    return app


def _check_components(components: object) -> None:
    if not isinstance(components, ServerAppComponents):
        raise TypeError(f"server_fn returned {type(components).__name__}, expected ServerAppComponents")
    for name in ("server", "client_manager"):
        if getattr(components, name) is not None:
            raise ValueError(
                f"server_fn gives a {name} of its own, {type(getattr(components, name)).__name__}: the rounds are run "
                "and the clients drawn by this package's strategy; leave it out, and give settings to the strategy"
            )


def run_legacy(low_rank: FederatedStrategy, given: legacy.Strategy, grid: Grid, config: ServerConfig) -> Result:
    """Run a strategy that `from_legacy` has made for as many rounds as a legacy config says.

    Args:
        low_rank: the strategy.
        given: the legacy one, whose ``evaluate`` is called with the whole model's parameters.
        grid: to talk to the clients through.
        config: ``round_timeout`` is an hour where it is None.
    """
    return low_rank.start(
        grid,
        low_rank.initial_arrays(),
        num_rounds=config.num_rounds,
        timeout=config.round_timeout or _TIMEOUT,
        evaluate_fn=_evaluate_fn(low_rank, given),
    )


def _evaluate_fn(low_rank: FederatedStrategy, given: legacy.Strategy) -> EvaluateFunction | None:
    if isinstance(given, legacy.FedAvg) and given.evaluate_fn is None and _is_own(given, "evaluate"):
        return None

    def evaluate_fn(server_round: int, _: ArrayRecord) -> MetricRecord | None:
        whole = ndarrays_to_parameters(_ndarrays(low_rank.merged_state_dict()))
        found = given.evaluate(server_round, whole)
        return None if found is None else MetricRecord({**_numbers(found[1]), "loss": float(found[0])})

    return evaluate_fn


def from_legacy(
    strategy: StrategyFactory, model: ModelSource, given: legacy.Strategy, **keywords: Any
) -> FederatedStrategy:
    """Build a strategy of this package that does what a legacy strategy was set to do.

    Taken over are the fractions and least numbers of clients, ``on_fit_config_fn`` and ``on_evaluate_config_fn`` (or
    what ``configure_fit`` and ``configure_evaluate`` make of them), the averaging and the aggregation of metrics, and
    ``initial_parameters``, if there are any: they become ``W_0`` and travel once to each client, which a model that is
    built from the seed everywhere need not. ``accept_failures=False`` becomes ``max_failure_fraction=0``.

    Args:
        strategy: for example ``FedLoRU``.
        model: a factory or an instance, see `FederatedStrategy`; ``initial_parameters`` are loaded into it by the order
            of its state dict.
        given: a ``flwr.server.strategy.FedAvg`` or one derived from it.
        keywords: further arguments of ``strategy``; they go before what is taken over.

    Raises:
        TypeError: if there is no telling what the legacy strategy would do.
        ValueError: if its averaging is of whole models, or its initial parameters are not the model's.
    """
    inner = LegacyStrategy(given)
    for name in ("inner", "weighted_by_key"):
        if name in keywords:
            raise ValueError(
                f"{name} cannot be given: the legacy strategy {type(given).__name__} is the inner one, and it weighs "
                "clients by their num_examples"
            )
    assert isinstance(given, legacy.FedAvg)
    taken = {
        "fraction_train": given.fraction_fit,
        "fraction_evaluate": given.fraction_evaluate,
        "min_train_nodes": given.min_fit_clients,
        "min_evaluate_nodes": given.min_evaluate_clients,
        "min_available_nodes": given.min_available_clients,
        **({} if given.accept_failures else {"max_failure_fraction": 0.0}),
    }
    initial = given.initialize_parameters(SimpleClientManager())
    if initial is not None and initial.tensors:
        model = _with_parameters(model, initial, keywords.get("seed", 0))
        log(
            INFO,
            "initial_parameters of %s are sent once to each client; without them every client builds the same model "
            "from the seed",
            type(given).__name__,
        )
    return strategy(model, **{**taken, **keywords, "inner": inner})


def _with_parameters(model: ModelSource, parameters: Parameters, seed: int) -> nn.Module:
    """An instance that has these parameters."""
    net = model if isinstance(model, nn.Module) else build_seeded(model, seed)
    mine, arrays = net.state_dict(), parameters_to_ndarrays(parameters)
    if [tuple(value.shape) for value in mine.values()] != [array.shape for array in arrays]:
        raise ValueError(
            f"initial_parameters are {len(arrays)} arrays that do not have the shapes of {type(net).__name__}'s state "
            f"dict, which has {len(mine)}: give all of them in its order, or none, to have the model built from the "
            "seed"
        )
    net.load_state_dict({name: torch.tensor(array) for name, array in zip(mine, arrays, strict=True)})
    return net


_OF_WHOLE_MODELS = (legacy.FedOpt, legacy.FedAvgM, legacy.QFedAvg)
_OF_TREES = (legacy.FedXgbBagging, legacy.FedXgbCyclic, legacy.FedXgbNnAvg)
_STATELESS = (
    legacy.FedAvg,
    legacy.FedProx,
    legacy.FedMedian,
    legacy.FedTrimmedAvg,
    legacy.Krum,
    legacy.Bulyan,
    legacy.FaultTolerantFedAvg,
)


def _is_own(given: legacy.FedAvg, *methods: str) -> bool:
    """Whether these methods of a strategy are FedAvg's own."""
    return all(getattr(type(given), name) is getattr(legacy.FedAvg, name) for name in methods)


class LegacyStrategy(Strategy):
    """A legacy strategy as an inner one: it configures and aggregates the Trainables; it does not sample.

    Args:
        strategy: a ``flwr.server.strategy.FedAvg`` or one derived from it.

    Raises:
        TypeError: if it is none.
        ValueError: if its averaging needs whole models, as that of server optimisers does.
    """

    weighted_by_key = wire.NUM_EXAMPLES

    def __init__(self, strategy: legacy.Strategy) -> None:
        name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        if isinstance(strategy, Strategy):
            raise TypeError(f"{name} is a strategy of the Message API: give it as inner=, without the legacy functions")
        if not isinstance(strategy, legacy.FedAvg):
            raise TypeError(
                f"{name} is not derived from flwr.server.strategy.FedAvg: which clients it draws and what it sends "
                "them cannot be known; write the ServerApp for the Message API, with a strategy of "
                "flwr.serverapp.strategy as inner= (differential privacy is there too)"
            )
        if isinstance(strategy, _OF_TREES):
            raise TypeError(f"{name} averages trees; there is nothing of low rank in them")
        if isinstance(strategy, _OF_WHOLE_MODELS):
            raise ValueError(
                f"{name} keeps moments of whole models, which factors that restart do not have: use FedAvg, or write "
                f"the ServerApp for the Message API with inner=flwr.serverapp.strategy.{name}(...)"
            )
        self.given = strategy
        self.is_plain_mean = _is_own(strategy, "aggregate_fit")
        self.is_stateless = type(strategy) in _STATELESS

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What ``configure_fit`` would send, to each node of the grid."""
        participants = _Participants(grid.get_node_ids())
        orders = self.given.configure_fit(server_round, _as_parameters(arrays), participants)
        return self._messages(orders, "fit", arrays, config, participants)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What ``configure_evaluate`` would send, to each node of the grid."""
        participants = _Participants(grid.get_node_ids())
        orders = self.given.configure_evaluate(server_round, _as_parameters(arrays), participants)
        return self._messages(orders, "evaluate", arrays, config, participants)

    def _messages(
        self,
        orders: Sequence[tuple[ClientProxy, FitIns]] | Sequence[tuple[ClientProxy, EvaluateIns]],
        what: str,
        arrays: ArrayRecord,
        config: ConfigRecord,
        participants: "_Participants",
    ) -> list[Message]:
        if not orders:
            return []
        name = f"configure_{what} of {type(self.given).__name__}"
        told = [ins.config for _, ins in orders]
        if len(orders) != participants.num_available() or any(one != told[0] for one in told):
            raise ValueError(
                f"{name} does not treat all participants alike; they are drawn by fraction_fit and fraction_evaluate "
                "and given one config a round"
            )
        if orders[0][1].parameters.tensors != _as_parameters(arrays).tensors:
            raise ValueError(f"{name} changes the parameters; they are factors here and go to the clients as they are")
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: ConfigRecord({**config, **told[0]})})
        kind = "train" if what == "fit" else "evaluate"
        return [Message(content, dst_node_id=int(proxy.cid), message_type=kind) for proxy, _ in orders]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What ``aggregate_fit`` makes of the replies, by the names they came under."""
        replies = list(replies)
        names = list(_arrays_of(replies[0]))
        results: list[tuple[ClientProxy, FitRes]] = [
            (_Participant(reply), FitRes(_FINE, _as_parameters(_arrays_of(reply)), *_told(reply))) for reply in replies
        ]
        parameters, metrics = self.given.aggregate_fit(server_round, results, [])
        record = _metrics(metrics, [(result.num_examples, result.metrics) for _, result in results])
        if parameters is None:
            return None, record
        averaged = parameters_to_ndarrays(parameters)
        if len(averaged) != len(names):
            raise AggregationError(
                f"aggregate_fit of {type(self.given).__name__} returned {len(averaged)} arrays, expected the "
                f"{len(names)} that it was given"
            )
        return ArrayRecord({name: Array(array) for name, array in zip(names, averaged, strict=True)}), record

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What ``aggregate_evaluate`` makes of the replies."""
        results: list[tuple[ClientProxy, EvaluateRes]] = []
        for reply in replies:
            num_examples, metrics = _told(reply)
            if "loss" not in metrics:
                raise ValueError("an evaluation reply holds no 'loss': make the ClientApp by legacy_client_app")
            loss = float(metrics.pop("loss"))
            if _OWN_LOSS in metrics:
                metrics["loss"] = metrics.pop(_OWN_LOSS)
            results.append((_Participant(reply), EvaluateRes(_FINE, loss, num_examples, metrics)))
        aggregated, metrics = self.given.aggregate_evaluate(server_round, results, [])
        record = _metrics(metrics, [(result.num_examples, result.metrics) for _, result in results])
        return record if aggregated is None else MetricRecord({**record, "loss": float(aggregated)})

    def summary(self) -> None:
        """Nothing to tell beside the outer strategy's."""


_FINE = Status(Code.OK, "")


def _arrays_of(reply: Message) -> ArrayRecord:
    return next(iter(reply.content.array_records.values()))


def _as_parameters(arrays: ArrayRecord) -> Parameters:
    return Parameters([array.data for array in arrays.values()], "numpy.ndarray")


def _told(reply: Message) -> tuple[int, dict[str, Any]]:
    """The number of examples and the other metrics of a reply."""
    metrics = dict(next(iter(reply.content.metric_records.values())))
    num_examples = metrics.pop(wire.NUM_EXAMPLES)
    assert isinstance(num_examples, int | float)
    return int(num_examples), metrics


def _metrics(aggregated: Mapping[str, object], told: list[tuple[int, dict[str, Any]]]) -> MetricRecord:
    """The metrics that the project has aggregated, or else those that all clients gave, by their weighted mean."""
    if aggregated:
        return MetricRecord({**_numbers(aggregated)})
    total = sum(weight for weight, _ in told)
    common = set.intersection(*(set(metrics) for _, metrics in told)) if told else set()
    return MetricRecord(
        {
            name: sum(weight * metrics[name] for weight, metrics in told) / total
            for name in told[0][1]
            if name in common and not isinstance(told[0][1][name], list)
        }
        if told
        else {}
    )


def _numbers(metrics: Mapping[str, object]) -> dict[str, float | int]:
    """Those metrics that are numbers; a record holds no others."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {
        name: int(value) if isinstance(value, int) else float(value)  # a truth value is a number, too
        for name, value in values.items()
        if isinstance(value, int | float)
    }


class _Participant(ClientProxy):
    """A client that has been drawn, for a legacy strategy to tell from others."""

    def __init__(self, of: Message | int) -> None:
        self.node_id = of if isinstance(of, int) else of.metadata.src_node_id
        super().__init__(str(self.node_id))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(
            "a legacy strategy here configures and aggregates; messages to clients are sent by the outer strategy"
        )

    get_properties = get_parameters = fit = evaluate = reconnect = _refuse


class _Participants(SimpleClientManager):
    """Shows a legacy strategy the drawn participants as all the clients there are."""

    def __init__(self, node_ids: Iterable[int]) -> None:
        super().__init__()
        self.clients = {str(node_id): _Participant(node_id) for node_id in node_ids}

    def wait_for(self, num_clients: int, timeout: int = 0) -> bool:
        """They are there."""
        return True

    def sample(
        self, num_clients: int, min_num_clients: int | None = None, criterion: object | None = None
    ) -> list[ClientProxy]:
        """All of them: they have been sampled already."""
        if criterion is not None:
            raise ValueError("clients are drawn by the outer strategy, which knows no criterion; leave it out")
        return list(self.clients.values())
