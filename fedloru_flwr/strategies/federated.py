"""The round loop that every strategy of the package shares.

The strategy is outermost and runs its own loop; averaging is done by an inner Flower strategy, which sees exactly the
Trainables it would see in plain Flower. Each round: draw participants, let the inner strategy configure, address and
complete its message, judge the replies, let the inner strategy aggregate the good ones in sorted order, take what it
returns as the truth, accumulate if due, evaluate, save.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypedDict

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fedloru_flwr import wire
from fedloru_flwr.clients.method import client_method
from fedloru_flwr.coding import Follow, Parcel
from fedloru_flwr.lowrank import (
    AccumulationSchedule,
    Codec,
    CodecSchedule,
    aggregation_errors,
    digest_tensors,
    stable_rank,
    weighted_mean,
)
from fedloru_flwr.lowrank.factors import rank_bound
from fedloru_flwr.models.plan import build_seeded, plan_model
from fedloru_flwr.runs import Tracker
from fedloru_flwr.strategies import control
from fedloru_flwr.strategies.books import Books, Memory, Observer, Snapshot
from fedloru_flwr.strategies.downlink import Downlink
from fedloru_flwr.strategies.exchange import Exchange, Folded, Folding, Form, Keeping, gather
from fedloru_flwr.strategies.inner import InnerStrategy, mean_metrics, plain_average
from fedloru_flwr.strategies.judging import (
    Expected,
    WorkerDiedError,
    certain_norm,
    distance,
    reject_absurd_updates,
    reject_odd_metrics,
)
from fedloru_flwr.strategies.orders import Bill, Orders
from fedloru_flwr.strategies.ranks import RankMap
from fedloru_flwr.strategies.receiving import is_in_memory
from fedloru_flwr.strategies.refusals import check_options, refuse_combinations
from fedloru_flwr.strategies.roster import Roster
from fedloru_flwr.strategies.spread import spread
from fedloru_flwr.strategies.state import (
    Outcome,
    Reinit,
    ServerState,
    initial_state,
    merged_state_dict,
    state_from_checkpoint,
    step,
)

ModelSource = Callable[[], nn.Module] | nn.Module
EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class CommonOptions(TypedDict, total=False):
    """Arguments that every strategy takes beside its own; see `FederatedStrategy`."""

    inner: Strategy | None
    num_clients: int | None
    run_dir: str | Path | None
    resume: str | Path | None
    checkpoint_every: int
    max_failure_fraction: float
    max_norm_ratio: float
    observer: Observer | None
    trackers: Sequence[Tracker]
    enrol: bool
    proximal_mu: float
    scaffold: bool
    evaluate_every: int
    evaluate_all_at_end: bool
    measure_aggregation: bool
    max_total_bytes: int
    target_accuracy: float
    uplink_codec: str
    downlink_codec: str
    error_feedback: bool | None
    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None
    evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None


@dataclass(frozen=True)
class Received:
    """One client's good reply: what it was to do, what it sent, and its weight."""

    work: wire.Work
    tensors: Mapping[str, Tensor]
    weight: float


class _Aggregate(NamedTuple):
    """What comes of a round's good replies: nothing but metrics where the inner strategy gives no arrays."""

    outcome: Outcome | None = None
    metrics: MetricRecord | None = None
    statistics: Mapping[str, Tensor] = {}
    changes: Sequence[tuple[float, Mapping[str, Tensor]]] = ()


class FederatedStrategy(Strategy):
    """Abstract base of the package's strategies: the loop, the wire, the books.

    A method overrides what differs from averaging Trainables: `_payload` (what a client gets), `_reply_like` (what it
    sends), `_common_form` (what the inner strategy averages), `_adapter_of` (the factors a reply stands for) and
    `_settle` (what the server makes of it all). It declares in `refused` what it cannot be combined with, and why; and
    in `needs_each_reply` why `_settle` needs the replies themselves and not only their mean, where it does.

    Args:
        model: a factory (a class or a function without arguments), built under ``seed``; or an instance.
        settings: what the server and every client make the same plan from.
        schedule: after which rounds to accumulate.
        reinit: how factors restart.
        seed: of initial weights, fresh factors, participants and clients' random streams.
        inner: the Flower strategy that aggregates; FedAvg by default.
        num_clients: how many SuperNodes to wait for before round 1; None: until no more are coming.
        run_dir: a directory to write manifest, metrics, checkpoints and the model to; None: nothing is written.
        resume: None; ``"auto"`` to continue the run in ``run_dir`` if there is one; or such a directory.
        checkpoint_every: rounds between checkpoints (one is also written at accumulations and at the end).
        max_failure_fraction: a training round in which more of the participants fail stops the run.
        max_norm_ratio: an update whose norm is more than so many times the usual one is left out; 0: none is, as under
            differential privacy, which clips.
        observer: told of progress.
        trackers: told of every row of ``metrics.jsonl``, which needs a ``run_dir``; see `fedloru_flwr.runs.Tracker`.
        ranks: which client trains at which rank; None: all at the settings'.
        enrol: ask clients for their identity before round 1 by a query (the package's client app answers it); without
            it, identities come with the first replies.
        proximal_mu: FedProx's ``mu``: clients add ``mu / 2 ||w - w_0||^2`` to their loss; 0: none.
        scaffold: exchange SCAFFOLD's control variates for what is trained.
        evaluate_every: rounds between federated evaluations.
        evaluate_all_at_end: the last round's evaluation is on all clients.
        measure_aggregation: note the aggregation error of every layer and round.
        max_total_bytes: the round in which all bytes of the run, up and down, reach this number is its last one, and
            the run's status is ``stopped``; 0: no limit.
        target_accuracy: so is the round whose ``accuracy``, the central or else the clients', reaches this; 0: none.
        uplink_codec: of what clients send, see `CodecSchedule`: ``"int8"``, ``"topk:0.05+int4"``, or one that changes
            over the rounds, ``"int4, 100: int8"``.
        downlink_codec: of what the server sends and, but for ``topk``, of what it accumulates, which is coded once and
            for everybody. With ``topk`` the changes since a client's last message are sent, see `fedloru_flwr.coding`.
        error_feedback: clients keep what the uplink's codec leaves out and add it next time; None: where a codec leaves
            something out and the method can.
        fraction_train: share of the connected clients that train in a round, rounded down.
        fraction_evaluate: share of them that evaluate.
        min_train_nodes: but at least so many.
        min_evaluate_nodes: the same for evaluation.
        min_available_nodes: how many must be connected before round 1.
        weighted_by_key: the metric that weighs a reply.
        arrayrecord_key: FedAvg's, for the default inner strategy.
        configrecord_key: FedAvg's, for the default inner strategy.
        train_metrics_aggr_fn: FedAvg's, for the default inner strategy.
        evaluate_metrics_aggr_fn: FedAvg's, for the default inner strategy.

    Raises:
        ValueError: for a fraction outside [0, 1] and other settings that make no sense.
        PlanError: if the model cannot be factorised as asked.
    """

    algorithm: ClassVar[str]
    refused: ClassVar[Mapping[str, str]] = {}
    has_global_model: ClassVar[bool] = True
    has_personal_model: ClassVar[bool] = False
    needs_each_reply: ClassVar[str] = ""

    def __init__(
        self,
        model: ModelSource,
        *,
        settings: wire.Settings,
        schedule: AccumulationSchedule,
        reinit: Reinit = "reset",
        inner: Strategy | None = None,
        num_clients: int | None = None,
        run_dir: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: int = 10,
        max_failure_fraction: float = 0.5,
        max_norm_ratio: float = 100.0,
        observer: Observer | None = None,
        trackers: Sequence[Tracker] = (),
        enrol: bool = False,
        ranks: RankMap | None = None,
        proximal_mu: float = 0.0,
        scaffold: bool = False,
        evaluate_every: int = 1,
        evaluate_all_at_end: bool = False,
        measure_aggregation: bool = True,
        max_total_bytes: int = 0,
        target_accuracy: float = 0.0,
        uplink_codec: str = "float32",
        downlink_codec: str = "float32",
        error_feedback: bool | None = None,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
    ) -> None:
        check_options(
            fractions={
                "fraction_train": fraction_train,
                "fraction_evaluate": fraction_evaluate,
                "max_failure_fraction": max_failure_fraction,
            },
            periods={"checkpoint_every": checkpoint_every, "evaluate_every": evaluate_every},
            amounts={
                "proximal_mu": proximal_mu,
                "max_norm_ratio": max_norm_ratio,
                "target_accuracy": target_accuracy,
            },
            max_total_bytes=max_total_bytes,
            num_clients=num_clients,
            reinit=reinit,
            accumulate_into=settings.accumulate_into,
        )
        self._model = deepcopy(model) if isinstance(model, nn.Module) else _build_undisturbed(model, settings.seed)
        s = settings
        self.plan = plan_model(self._model, s.form, s.rank, s.alpha, s.target_modules, s.dense_leaves)
        self.settings = settings
        self.schedule = schedule
        self.reinit = reinit
        self.seed = settings.seed
        keywords = {
            "arrayrecord_key": arrayrecord_key,
            "configrecord_key": configrecord_key,
            "train_metrics_aggr_fn": train_metrics_aggr_fn,
            "evaluate_metrics_aggr_fn": evaluate_metrics_aggr_fn,
        }
        if inner is not None and (train_metrics_aggr_fn or evaluate_metrics_aggr_fn):
            raise ValueError(
                "train_metrics_aggr_fn and evaluate_metrics_aggr_fn are the inner strategy's: give them to the inner "
                "strategy itself"
            )
        self.inner = InnerStrategy(plain_average(settings.weighted_by, **keywords) if inner is None else inner)
        if inner is not None and self.inner.weighted_by != settings.weighted_by:
            raise ValueError(
                f"the inner strategy weighs replies by {self.inner.weighted_by!r}, this strategy by "
                f"{settings.weighted_by!r}: give weighted_by_key={self.inner.weighted_by!r} here too"
            )
        self.ranks = ranks or RankMap(None, settings.rank)
        self.proximal_mu = proximal_mu
        self.scaffold = scaffold
        self.target_accuracy = target_accuracy
        self.uplink = CodecSchedule.parse(uplink_codec)
        self.downlink = Downlink(CodecSchedule.parse(downlink_codec), self.plan, self.seed)
        can_feed_back = not self.uplink.is_exact and "feedback" not in self.refused
        self.feedback = can_feed_back if error_feedback is None else error_feedback
        refuse_combinations(self)
        self.num_clients = num_clients
        self.checkpoint_every = checkpoint_every
        self.evaluate_every = evaluate_every
        self._evaluate_all_at_end = evaluate_all_at_end
        self._measure_aggregation = measure_aggregation
        self._train_config: dict[str, object] = {}
        self.max_total_bytes = max_total_bytes
        self.max_failure_fraction = max_failure_fraction
        self.max_norm_ratio = max_norm_ratio
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self._at_least = {"train": min_train_nodes, "evaluate": min_evaluate_nodes}
        self._min_available = min_available_nodes
        self._enrol = enrol
        self.books = Books(run_dir, resume, observer, trackers)
        self._bill = Bill()
        self._roster = Roster()
        self._memory = Memory()
        self._silent: set[str] = set()
        self._just_accumulated = False
        self._inner_options = self.inner.options()
        self._keeps_replies = self.needs_each_reply or self.inner.needs_each_reply()
        self._errors: dict[str, float] = {}
        self.state = self._initial_state()
        self._root_base = self.state.base
        for note in self.plan.notes:
            log(INFO, "%s", note)

    # --- what a method may override --------------------------------------------------------------------------------

    @property
    def _keeps_client_state(self) -> bool:
        """Whether clients keep something of their own from round to round."""
        return self.scaffold or self.feedback or client_method(self.settings.method).keeps_state

    def _initial_state(self) -> ServerState:
        """The state before round 1."""
        return initial_state(self._model, self.plan, self.seed)

    def _half(self, server_round: int) -> wire.Half:
        """Which half of each pair is trained in a round."""
        return "both"

    def _payload(self, work: wire.Work) -> dict[str, Tensor]:
        """The arrays for a client."""
        return dict(self.state.trainables)

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        """Tensors of the keys, order, shapes and dtypes that the client's reply must have."""
        return {key: value for key, value in self.state.trainables.items() if not wire.is_frozen(key, work.half)}

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A reply as the inner strategy averages it: the keys and shapes of the state's trainables."""
        if len(tensors) == len(self.state.trainables):
            return dict(tensors)
        return {key: tensors.get(key, value) for key, value in self.state.trainables.items()}

    def _adapter_of(self, received: Received) -> Mapping[str, Tensor]:
        """The adapter that a client trained, whole."""
        return self.plan.whole(self._common_form(received.work, received.tensors), self.seed, self.state.draw)

    def _settle(self, mean: Mapping[str, Tensor], replies: Sequence[Received]) -> Outcome:
        """What the server makes of the round: the mean, and nothing but the mean."""
        half = replies[0].work.half
        trainables = {
            key: value if wire.is_frozen(key, half) else mean[key] for key, value in self.state.trainables.items()
        }
        return Outcome(trainables, applied=self.plan.whole(trainables, self.seed, self.state.draw))

    # --- what users call -------------------------------------------------------------------------------------------

    def initial_arrays(self) -> ArrayRecord:
        """The Trainables before round 1: fresh factors and the model's dense leaves."""
        return wire.to_record(self.state.trainables)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The whole model as it is now, with the keys, shapes and dtypes of the plain model's state dict."""
        return merged_state_dict(self.state, self._model, self.plan, self.seed)

    def central_evaluation(self, evaluate: Callable[[int, nn.Module], Mapping[str, Any] | None]) -> EvaluateFunction:
        """Turn a function of (round, model) into an ``evaluate_fn`` for `start`.

        The function receives the merged model as a plain instance in eval mode, and returns metrics by name
        (``accuracy`` and ``loss`` get columns of their own) or None.
        """
        plain = deepcopy(self._model)

        def evaluate_fn(server_round: int, _: ArrayRecord) -> MetricRecord | None:
            plain.load_state_dict(self.merged_state_dict())
            plain.eval()
            metrics = evaluate(server_round, plain)
            if metrics is None:
                return None
            return MetricRecord({name: _as_number(value) for name, value in metrics.items()})

        return evaluate_fn

    def parameters_sent(self) -> int:
        """How many numbers a client of full rank sends in a round (of both halves, where they alternate)."""
        return sum(tensor.numel() for tensor in self._reply_like(wire.Work()).values())

    def summary(self) -> None:
        """Log what is trained and sent."""
        trained = self.parameters_sent()
        total = sum(parameter.numel() for parameter in self._model.parameters())
        log(
            INFO, "%s: %d of %d parameters travel (%.1f %%)", type(self).__name__, trained, total, 100 * trained / total
        )
        for layer in self.plan.layers:
            log(INFO, "\tfactorised, rank %d: %s %s", layer.rank, layer.name, tuple(layer.weight_shape))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Run the federated training; the signature is that of Flower's strategies.

        Args:
            grid: to talk to the clients through.
            initial_arrays: what `initial_arrays` gives, or tensors of the same names and shapes to start from.
            num_rounds: the number of rounds (of the whole run, where it is resumed).
            timeout: seconds to wait for the clients of one phase of a round.
            train_config: settings for the clients' training, sent with every message.
            evaluate_config: the same for evaluation.
            evaluate_fn: called with (round, current Trainables) before round 1 and after every round; see
                `central_evaluation`.

        Returns:
            Flower's ``Result``; its arrays are the final Trainables. The model is `merged_state_dict`.

        Raises:
            RosterError: if the expected clients do not come, or two say they are one.
            AggregationError: if more than ``max_failure_fraction`` of a round's participants fail, or the inner
                strategy returns something else than Trainables.
            ResumeError: if a run cannot be continued with these settings.
        """
        if num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
        if self.target_accuracy and evaluate_fn is None and not self.fraction_evaluate:
            raise ValueError(
                f"target_accuracy={self.target_accuracy:g} needs an accuracy: give an evaluate_fn, or a "
                "fraction_evaluate above 0"
            )
        self._load_initial(initial_arrays)
        self.summary()
        if self._keeps_replies:
            log(INFO, "all replies of a round are kept in memory until its end: %s", self._keeps_replies)
        result = self.books.result
        result.arrays = self.initial_arrays()
        if self.state.server_round > 0:
            raise RuntimeError("this strategy has run already: build a new one, or continue its run with resume")
        self._train_config = dict(sorted((train_config or {}).items()))
        self._open_run()
        self._remember()
        try:
            self._rounds(grid, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        except BaseException as error:
            # Whatever happened in the middle of a round: what is left is the state after the last whole one.
            self._recall()
            if self.state.server_round > 0:
                self.books.checkpoint(self._whole, self._fingerprint(), is_due=False)
            self._close_run("failed" if isinstance(error, Exception) else "interrupted", error)
            raise
        self._close_run("finished" if self.state.server_round >= num_rounds else "stopped")
        return result

    def _rounds(
        self,
        grid: Grid,
        num_rounds: int,
        timeout: float,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
        evaluate_fn: EvaluateFunction | None,
    ) -> None:
        result = self.books.result
        started = time.monotonic()
        often = self.schedule.most_often()
        if often.accumulates and not any(often.due(t) for t in range(1, num_rounds + 1)):
            log(WARNING, "no accumulation falls into the %d rounds of this run", num_rounds)
        if self.state.server_round == 0 and evaluate_fn is not None and self.has_global_model:
            self._record({"round": 0}, self._central(0, evaluate_fn), num_rounds, started)
        if self._stop_reason():
            self._tell_stop()  # a run that is continued with the limit that has stopped it
            return
        self._roster.wait(grid, self.num_clients, self._min_available, timeout)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            begun = time.monotonic()
            self._meet(grid, timeout)
            exchange, metrics = self._train(grid, server_round, train_config or ConfigRecord(), timeout)
            if self._just_accumulated:
                self.books.keep_entries(self.state.ledger)
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            result.arrays = wire.to_record(self.state.trainables)
            central = self._central(server_round, evaluate_fn)
            last = server_round == num_rounds or bool(self._stop_reason(_metric(central, "accuracy")))
            evaluated, clients = self._evaluate(grid, server_round, evaluate_config or ConfigRecord(), timeout, last)
            if evaluated is not None:
                result.evaluate_metrics_clientapp[server_round] = evaluated
            row = {
                "round": server_round,
                "accuracy": _metric(evaluated, "accuracy"),
                "loss": _metric(evaluated, "loss"),
                "train_loss": _metric(metrics, "train_loss", "train-loss"),
                "clients_ok": len(exchange.good),
                "clients_failed": len(exchange.failures),
                "failures": dict(sorted(exchange.failures.items())),
            }
            if clients:
                row["clients_evaluated"] = clients.pop("asked")
                row["clients"] = clients
            if received := self._received(exchange):
                row["received"] = received
            if self._errors:
                row["aggregation_error"] = self._errors
            if lost := [client for client, kept in exchange.good.items() if kept.reply.lost_state]:
                row["states_lost"] = lost
                log(WARNING, "round %d: these have lost what they kept of their own: %s", server_round, ", ".join(lost))
            self._record(row, central, num_rounds, started, begun)
            self._remember()
            self._stop_if_too_many_failed(server_round, exchange)
            ends = server_round == num_rounds or bool(self._stop_reason())
            if server_round % self.checkpoint_every == 0 or ends or self._just_accumulated:
                self.books.checkpoint(self._whole, self._fingerprint())
            if ends and server_round < num_rounds:
                self._tell_stop()
                return

    def _stop_reason(self, accuracy: object = None) -> str:
        """Why no round follows, with what this one has sent and, where it is known, its accuracy; empty: one may."""
        spent = self.books.total_bytes + self._bill.total("up") + self._bill.total("down")
        if 0 < self.max_total_bytes <= spent:
            return f"max-total-bytes = {self.max_total_bytes}: {spent} bytes have been sent"
        accuracy = self.books.accuracy if accuracy is None else accuracy
        if isinstance(accuracy, int | float) and 0 < self.target_accuracy <= accuracy:
            return f"target-accuracy = {self.target_accuracy:g}: the accuracy is {accuracy:g}"
        return ""

    def _tell_stop(self) -> None:
        log(INFO, "stopped after round %d: %s", self.state.server_round, self._stop_reason())

    # --- Flower's hooks, which only a foreign wrapper would call --------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: this strategy is the outermost one."""
        self._refuse_wrapping()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse: this strategy is the outermost one."""
        self._refuse_wrapping()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: this strategy is the outermost one."""
        self._refuse_wrapping()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Refuse: this strategy is the outermost one."""
        self._refuse_wrapping()

    def _refuse_wrapping(self) -> NoReturn:
        name = type(self).__name__
        raise RuntimeError(
            f"{name} restarts its factors and therefore runs its own loop, outermost: it cannot be wrapped by another "
            f"strategy. Turn the two around: {name}(Net, ..., inner=Wrapper(FedAvg(), ...)).start(...)"
        )

    # --- one round -------------------------------------------------------------------------------------------------

    def _meet(self, grid: Grid, timeout: float) -> None:
        self._roster.wait(grid, min(self._min_available, self.num_clients or self._min_available), 1, timeout)
        new = self._roster.refresh(grid)
        if self._enrol and new:
            self._roster.enrol(grid, new, timeout, self._count_enrolment)

    def _count_enrolment(self, client: str, query: Message, reply: Message | None) -> None:
        """Put a client's enrolment on the bill, once a run: asking again after a resume is not the run's cost."""
        if client in self._memory.enrolled:
            return
        self._memory.enrolled.add(client)
        self._bill.message("down", "enrolment", query)
        if reply is not None:
            self._bill.message("up", "enrolment", reply)

    def _train(
        self, grid: Grid, server_round: int, config: ConfigRecord, timeout: float
    ) -> tuple[Exchange, MetricRecord | None]:
        exchange = self._exchange(grid, "train", server_round, config, timeout)
        outcome, metrics, statistics, changes = self._aggregate(server_round, exchange)
        before = self.state
        if outcome is not None and self.scaffold:
            self._memory.examples |= {client: self._weight(kept.reply) for client, kept in exchange.good.items()}
            self.state = replace(self.state, control=control.with_changes(self.state.control, changes))
        progress = self._progress(server_round, outcome, metrics)
        due = self.schedule.due(server_round, progress)
        self.state = step(
            self.state,
            server_round,
            outcome,
            statistics,
            plan=self.plan,
            accumulate_now=due,
            reinit=self.reinit,
            seed=self.seed,
            codec=self.downlink.of_entries(server_round),
            progress=progress,
        )
        if self.state.draw > before.draw:
            self.inner.restart(list(self.state.trainables), set(self.plan.factor_keys))
        self._just_accumulated = due and self.state.ledger.version > before.ledger.version
        if outcome is not None:
            self._memory.counted |= dict.fromkeys(exchange.good, server_round)
        told = {layer for kept in exchange.good.values() for layer in kept.reply.silent_layers}
        silent = told & {layer.name for layer in self.plan.layers} - self._silent
        if silent:
            self._silent |= silent
            log(WARNING, "these factorised layers got no gradient on some clients: %s", ", ".join(sorted(silent)))
        return exchange, metrics

    def _progress(self, server_round: int, outcome: Outcome | None, metrics: MetricRecord | None) -> tuple[float, ...]:
        """What the schedule waits for, after each round with a result since the last accumulation."""
        before, layers = self.state.progress, self.plan.adapted
        if not self.schedule.when or outcome is None or not layers:
            return before
        if self.schedule.when == "rank":
            whole = self.plan.whole(outcome.trainables, self.seed, self.state.draw)
            return *before, statistics.fmean(stable_rank(one, whole) / rank_bound(one, whole) for one in layers)
        loss = _metric(metrics, "train_loss", "train-loss")
        if not isinstance(loss, int | float):
            raise AggregationError(
                f"round {server_round}: accumulate_when='loss' waits for the metric train_loss of the clients' "
                f"replies, which have {', '.join(metrics or ()) or 'none'}"
            )
        return *before, float(loss)

    def _aggregate(self, server_round: int, exchange: Exchange) -> _Aggregate:
        """What comes of a round's good replies."""
        self._errors = {}
        if not exchange.good:
            return _Aggregate()
        if isinstance(exchange.keeper, Folding):
            folded = exchange.keeper.finish(exchange.good)
            arrays, metrics = self.inner.aggregate_train(server_round, [self._as_one(exchange, folded)])
            if arrays is None:
                return _Aggregate(metrics=metrics)
            work = next(iter(exchange.good.values())).work
            outcome = self._settle(self._as_trainables(arrays), [Received(work, {}, folded.weight)])
            if folded.products is not None:
                self._errors = folded.products.errors(outcome.applied)
            return _Aggregate(outcome, metrics, folded.statistics, [(folded.weight, folded.extras)])
        replies = [Received(kept.work, kept.reply.tensors, self._weight(kept.reply)) for kept in exchange.good.values()]
        arrays, metrics = self.inner.aggregate_train(server_round, self._for_inner(exchange))
        if arrays is None:
            return _Aggregate(metrics=metrics)
        outcome = self._settle(self._as_trainables(arrays), replies)
        weights = [reply.weight for reply in replies]
        if self._measures_aggregation:
            adapters = [self._adapter_of(reply) for reply in replies]
            self._errors = aggregation_errors(self.plan.layers, adapters, weights, outcome.applied)
        statistics = {}
        if self.plan.statistics:
            statistics = weighted_mean([kept.reply.statistics for kept in exchange.good.values()], weights)
        changes = [(weight, kept.reply.extras) for weight, kept in zip(weights, exchange.good.values(), strict=True)]
        return _Aggregate(outcome, metrics, statistics, changes)

    @property
    def _measures_aggregation(self) -> bool:
        # Under differential privacy nothing is told that the noise does not cover.
        return self._measure_aggregation and bool(self.plan.layers) and not self.inner.is_private()

    def _as_one(self, exchange: Exchange, folded: Folded) -> Message:
        """The good replies' mean as the one reply of one client that has all their weight."""
        key = self.settings.weighted_by
        metrics = mean_metrics([kept.reply.metrics for kept in exchange.good.values()], key)
        content = wire.clean_content(folded.common, {**metrics, key: folded.weight}, exchange.arrays_key)
        return Message(content, 0, "train")

    def _control(self, half: wire.Half) -> dict[str, Tensor]:
        """SCAFFOLD's ``c`` of what is trained in a round, as it is sent."""
        clients = self.num_clients or len(self._roster)
        return control.mean(self.state.control, self._memory.examples, clients, self._reply_like(wire.Work(half=half)))

    def _evaluate(
        self, grid: Grid, server_round: int, config: ConfigRecord, timeout: float, last: bool
    ) -> tuple[MetricRecord | None, dict[str, Any]]:
        """Federated evaluation: the aggregated metrics; and how they spread over how many clients."""
        off = self.fraction_evaluate == 0.0 and not (last and self.has_personal_model)
        if off or self._memory.evaluation_off or not (last or server_round % self.evaluate_every == 0):
            return None, {}
        everybody = last and self._evaluate_all_at_end
        exchange = self._exchange(grid, "evaluate", server_round, config, timeout, everybody=everybody)
        reasons = list(exchange.failures.values())
        if reasons and not exchange.good and all("No evaluate function registered" in reason for reason in reasons):
            log(WARNING, "the client app has no evaluate function: federated evaluation is off (fraction_evaluate=0)")
            self._memory.evaluation_off = True
            return None, {"asked": len(exchange.drawn)}
        for client, reason in exchange.failures.items():
            log(WARNING, "evaluation on client %s failed: %s", client, reason)
        replies = self._for_inner(exchange)
        metrics = self.inner.aggregate_evaluate(server_round, replies) if replies else None
        counted = {self.settings.weighted_by}
        spreads = spread([kept.reply.metrics for kept in exchange.good.values()], without=counted)
        return metrics, {"asked": len(exchange.drawn), **spreads}

    def _received(self, exchange: Exchange) -> dict[str, dict[str, float]]:
        """How the model that clients received does on their held-out samples, where they say so with their training."""
        told = [
            {
                name.removeprefix(wire.RECEIVED): value
                for name, value in kept.reply.metrics.items()
                if name.startswith(wire.RECEIVED)
            }
            for kept in exchange.good.values()
        ]
        return spread(told)

    def _assign(self, client: str, half: wire.Half, codec: Codec | None) -> wire.Work:
        """What a client is to do, and the codec of its reply to training."""
        work = wire.Work(draw=self.state.draw, half=half, proximal_mu=self.proximal_mu, scaffold=self.scaffold)
        if not self.ranks.uniform or 0 < self._roster.budget(client) < self.settings.rank:
            work = replace(work, rank=self.ranks.of(client, self._roster.budget(client)))
        if self._keeps_client_state:
            counted = self._memory.counted.get(client, 0)
            # Whoever has not said yet that it is this client forgets nothing.
            safe = self.books.keep_from(client, counted) if self._roster.is_confirmed(client) else 0
            work = replace(work, run=self._memory.token, counted=counted, keep_from=safe)
        if codec is not None and (codec != Codec() or self.feedback):  # what was left out before still has to go
            work = replace(work, uplink=str(codec), feedback=self.feedback)
        return work

    def _arrays(
        self, phase: str, server_round: int, client: str, work: wire.Work
    ) -> tuple[object, Callable[[], tuple[ArrayRecord, Parcel | Follow | None]]]:
        """What tells a client's arrays from another's, and a function that makes them."""
        chain = self.state.chain
        if chain is not None and phase == "train" and self.downlink.is_sparse(server_round):
            follow = Follow.to_end_of(chain, self._memory.followed.get(client, chain.root))
            return follow.start, lambda: (wire.to_record(follow.arrays(chain)), follow)

        def make() -> tuple[ArrayRecord, Parcel | Follow | None]:
            payload = self._payload(work)
            parcel = self.downlink.parcel(server_round, work, payload)
            return wire.to_record(parcel.arrays() if parcel else payload), parcel

        return (work.rank, work.half), make

    def _known(self, work: wire.Work) -> dict[str, Tensor]:
        """What of a client's reply is known before it trains, exactly."""
        return self.plan.with_fresh(self._payload(work), self.seed, work.draw, work.rank or None)

    def _exchange(
        self,
        grid: Grid,
        phase: str,
        server_round: int,
        config: ConfigRecord,
        timeout: float,
        *,
        everybody: bool = False,
    ) -> Exchange:
        """Send a phase's orders to drawn clients, serve those without the base, and judge what comes back."""
        exchange = Exchange(phase)
        fraction = self.fraction_train if phase == "train" else self.fraction_evaluate
        fraction = 1.0 if everybody else fraction
        drawn = self._roster.draw(self.seed, phase, server_round, fraction, self._at_least[phase])
        node_of = dict(drawn)
        arrays = wire.to_record(self.state.trainables)
        template = self.inner.configure(phase, server_round, arrays, config, grid, list(node_of.values()))
        if template is None:
            return exchange
        exchange.drawn = list(node_of)
        if phase == "train" and node_of and not self._keeps_replies:
            exchange.keeper = self._folding(node_of)
        exchange.arrays_key = next(iter(template.array_records))
        if phase == "train":
            self.books.start_round(server_round, len(drawn))
        deadline = time.monotonic() + timeout
        half = self._half(server_round) if phase == "train" else "both"
        if "ranks" in self.refused:
            for client in list(node_of):
                if 0 < (budget := self._roster.budget(client)) < self.settings.rank:
                    told = f"it can train rank {budget} at most, this method needs rank {self.settings.rank}"
                    exchange.failures[client] = told
                    exchange.keeper.skip(client)
                    del node_of[client]
        codec = self.uplink.at(server_round) if phase == "train" else None
        exchange.work = {client: self._assign(client, half, codec) for client in node_of}
        if phase == "train":
            self.state = self.downlink.advanced(self.state, server_round)
        records: dict[object, tuple[ArrayRecord, Parcel | Follow | None]] = {}

        def assign(client: str) -> tuple[wire.Work, ArrayRecord, Parcel | Follow | None]:
            work = exchange.work[client]
            key, make = self._arrays(phase, server_round, client, work)
            if key not in records:
                records[key] = make()
            return work, *records[key]

        def lost(client: str) -> None:
            self._memory.followed[client] = ""

        trains = phase == "train"
        variates = self._control(half) if trains and self.scaffold else {}
        extras = wire.extras_to_bytes(variates)
        orders = Orders(template, phase, self.state, self.settings, self._memory.held, self._bill, assign, lost, extras)
        expected: dict[tuple[int, str], Expected] = {}
        lineage, said_round = self.state.ledger.lineage, wire.template_round(template)

        def expect(work: wire.Work) -> Expected:
            if (work.rank, work.half) not in expected:
                like = self._reply_like(work) if trains else None
                key = self.settings.weighted_by
                coded = Codec.parse(work.uplink) if work.uplink else None
                known = self._known(work) if coded else {}
                expected[work.rank, work.half] = Expected(
                    lineage, like, self.state.statistics, variates, key, said_round, coded, known
                )
            return expected[work.rank, work.half]

        pending, answered, again = node_of, dict[str, str](), False
        while pending:
            # A client that has gone by another name, and so not on from its own state, is asked once more.
            replies = self._alive(grid, orders.deliver(grid, pending, deadline, repeat=again))
            is_current = self._is_current if not again else lambda client, work: True
            came, pending = gather(exchange, pending, replies, expect, self._roster, is_current, timeout)
            exchange.work |= {client: self._assign(client, half, codec) for client in pending}
            answered, again = answered | came, True
        exchange.good = dict(sorted(exchange.good.items()))
        for client in answered:
            self._memory.held.pop(client, None)  # the name it went by until now
        self._memory.held |= dict.fromkeys(answered.values(), lineage)
        if self.state.chain is not None and trains and self.downlink.is_sparse(server_round):
            for client in answered:
                self._memory.followed.pop(client, None)
            self._memory.followed |= dict.fromkeys(answered.values(), self.state.chain.digest)
        exchange.refuse(reject_odd_metrics({client: kept.reply.metrics for client, kept in exchange.good.items()}))
        if trains:
            self._compare_updates(exchange)
        return exchange

    def _folding(self, node_of: Mapping[str, int]) -> Folding:
        """What folds a round's replies into their mean as they come."""

        def adapter(work: wire.Work, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self._adapter_of(Received(work, tensors, 1.0))

        form = Form(self._common_form, self._update_norm, adapter if self._measures_aggregation else None, self._weight)
        sure = self._roster.is_sure(node_of.values())
        certain = certain_norm(self._memory.norms, self.max_norm_ratio) if sure else -1.0
        return Folding(node_of, form, certain, self.plan.layers)

    def _alive(self, grid: Grid, replies: Iterator[tuple[str, Message]]) -> Iterator[tuple[str, Message]]:
        """The replies as they come.

        Raises:
            WorkerDiedError: in a simulation.
        """
        in_simulation = getattr(grid, "simulated", is_in_memory(grid))
        for client, reply in replies:
            if in_simulation and wire.worker_died(reply):
                raise WorkerDiedError(
                    f"round {self.state.server_round + 1}: a worker of the simulation has died, most likely for want "
                    "of memory; lower the number of workers (--num-actors), batch-size or rank, and continue with "
                    "--resume"
                )
            yield client, reply

    def _is_current(self, client: str, work: wire.Work) -> bool:
        """Whether work that was given goes on from this client's own state."""
        return not work.run or work.counted == self._memory.counted.get(client, 0)

    def _compare_updates(self, exchange: Exchange) -> None:
        """Leave out the good replies whose updates are absurdly large."""
        if isinstance(exchange.keeper, Keeping):
            for kept in exchange.good.values():
                kept.common = self._common_form(kept.work, kept.reply.tensors)
                kept.norm = self._update_norm(kept.work, kept.common, kept.reply.tensors)
        norms = {client: kept.norm for client, kept in exchange.good.items()}
        # Under differential privacy updates are clipped, and noise may throw the model, and then them, far off.
        ratio = 0.0 if self.inner.is_private() else self.max_norm_ratio
        refused = reject_absurd_updates(norms, self._memory.norms, ratio)
        if self.inner.clips_updates():
            told = "its update is zero, and Flower's clipping divides by its norm"
            refused |= {client: told for client, norm in norms.items() if norm == 0}
        exchange.refuse(refused)
        norms = {client: kept.norm for client, kept in exchange.good.items()}
        if norms and not self.inner.is_private():
            self._memory.norms = [*self._memory.norms, statistics.median(norms.values())][-_NORMS_KEPT:]

    def _update_norm(self, work: wire.Work, common: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> float:
        """``||x_k - x||`` over everything a client has trained."""
        return distance(common, self.state.trainables)

    def _for_inner(self, exchange: Exchange) -> list[Message]:
        """The good replies as plain Flower would have them."""
        messages = []
        for kept in exchange.good.values():
            assert kept.message is not None
            tensors = kept.common if exchange.phase == "train" else None
            kept.message.content = wire.clean_content(tensors, kept.reply.metrics, exchange.arrays_key)
            messages.append(kept.message)
        return messages

    def _as_trainables(self, arrays: ArrayRecord) -> dict[str, Tensor]:
        """What the inner strategy returned, in the dtypes that are sent (some compute in float64)."""
        got, mine = wire.to_tensors(arrays), self.state.trainables
        wrong = [
            name
            for name in mine
            if name not in got or got[name].shape != mine[name].shape or not bool(got[name].isfinite().all())
        ]
        if wrong:
            raise AggregationError(
                f"the inner strategy {type(self.inner.strategy).__name__} did not return Trainables: missing, of "
                f"another shape, or not finite: {', '.join(wrong[:5])}"
            )
        return {name: got[name].to(tensor.dtype) for name, tensor in mine.items()}

    def _weight(self, reply: wire.Reply) -> float:
        weight = reply.metrics[self.settings.weighted_by]
        assert isinstance(weight, int | float)
        return float(weight)

    def _stop_if_too_many_failed(self, server_round: int, exchange: Exchange) -> None:
        for client, reason in exchange.failures.items():
            log(WARNING, "round %d: client %s was left out: %s", server_round, client, reason)
        failed, asked = len(exchange.failures), len(exchange.drawn)
        if asked and failed / asked > self.max_failure_fraction:
            reasons = "; ".join(f"client {client}: {reason}" for client, reason in list(exchange.failures.items())[:3])
            raise AggregationError(
                f"round {server_round}: {failed} of {asked} clients failed, more than max-failure-fraction = "
                f"{self.max_failure_fraction} allows. First reasons: {reasons}"
            )

    # --- books -----------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Note the state after a whole round."""
        self._memory.nodes, self._memory.budgets = self._roster.known()
        moments = self.inner.read_state(list(self.state.trainables))
        self._whole = Snapshot(self.state, self._memory.copy(), moments)

    def _recall(self) -> None:
        """Go back to the state after the last whole round."""
        self.state, self._memory, moments = self._whole
        self.inner.write_state(moments, list(self.state.trainables))

    def _central(self, server_round: int, evaluate_fn: EvaluateFunction | None) -> MetricRecord | None:
        """What the server's own evaluation says."""
        if evaluate_fn is None or not self.has_global_model:
            return None
        return evaluate_fn(server_round, wire.to_record(self.state.trainables))

    def _record(
        self,
        row: dict[str, Any],
        central: MetricRecord | None,
        num_rounds: int,
        started: float,
        begun: float | None = None,
    ) -> None:
        """Close the round's books and tell everybody."""
        for name in ("accuracy", "loss"):
            row[name] = row.get(name) if central is None else central.get(name, row.get(name))
        if central is not None:
            self.books.result.evaluate_metrics_serverapp[row["round"]] = central
            others = {name: value for name, value in central.items() if name not in ("accuracy", "loss")}
            if others:
                row["metrics"] = others
        bill, self._bill = self._bill, Bill()
        ledger = self.state.ledger
        row |= {
            "bytes_up": bill.total("up"),
            "bytes_down": bill.total("down"),
            "bytes_by_purpose": bill.by_purpose(),
            "ledger_version": ledger.version,
            "accumulated_rank": self._accumulated_rank(),
            "seconds": round(time.monotonic() - (begun or started), 3),
        }
        self.books.end_round(row, num_rounds, started)

    def _accumulated_rank(self) -> int:
        """The largest rank an accumulated update can have: the sum of its entries' ranks, at most the layer's."""
        entries = [entry.adapter for entry in self.state.ledger.entries]
        return max(
            (min(sum(rank_bound(layer, one) for one in entries), layer.max_rank) for layer in self.plan.layers),
            default=0,
        )

    def _load_initial(self, arrays: ArrayRecord) -> None:
        given = wire.to_tensors(arrays)
        mine = self.state.trainables
        wrong = [name for name in {**mine, **given} if name not in given or name not in mine]
        wrong += [name for name in mine if name in given and given[name].shape != mine[name].shape]
        if wrong:
            raise ValueError(
                f"initial_arrays must hold the Trainables, as initial_arrays() gives them; wrong or missing: "
                f"{', '.join(wrong[:5])}"
            )
        if self.state.server_round == 0:
            trainables = {name: given[name].to(mine[name].dtype) for name in mine}
            self.state = replace(self.state, trainables=trainables)

    def _fingerprint(self) -> dict[str, Any]:
        """The settings that a continued run must share."""
        return {
            "strategy": type(self).__name__,
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "form": self.settings.form,
            "options": [list(option) for option in self.settings.options],
            "ranks": self.ranks.describe(),
            "proximal_mu": self.proximal_mu,
            "scaffold": self.scaffold,
            "uplink_codec": str(self.uplink),
            "downlink_codec": str(self.downlink),
            "error_feedback": self.feedback,
            "layers": [layer.name for layer in self.plan.layers],
            "dense_leaves": list(self.plan.dense_leaves),
            "seed": self.seed,
            "reinit": self.reinit,
            "accumulate_into": self.settings.accumulate_into,
            "accumulate_every": self.schedule.every,
            "accumulate_at": sorted(self.schedule.at),
            "accumulate_when": self.schedule.when,
            "num_clients": self.num_clients,
            "fraction_train": self.fraction_train,
            "min_train_nodes": self._at_least["train"],
            "weighted_by": self.settings.weighted_by,
            "inner": [type(layer).__name__ for layer in self.inner.layers()],
            "inner_options": self._inner_options,
            "train_config": {name: str(value) for name, value in self._train_config.items()},
        }

    def _open_run(self) -> None:
        """Open the run's books and, where it is continued, take up what they say."""
        settings, root = self._fingerprint(), self.state.ledger.root
        found = self.books.open(settings, root, self.inner.keeps_unknown_state())
        if found is not None:
            self.state = state_from_checkpoint(found.checkpoint, self._root_base, self.plan, self.seed)
            self._memory = found.memory
            self._roster.restore(found.memory.nodes, found.memory.budgets)
            self.inner.write_state(found.moments, list(self.state.trainables))
            self.books.result.arrays = self.initial_arrays()
        self.books.begin(settings, self.seed, root, found)

    def _full_bytes(self) -> tuple[int, int]:
        """What plain FedAvg would send down and up with one client a round: the whole state dict."""
        arrays = wire.to_record(self._model.state_dict())
        down = wire.content_bytes(RecordDict({wire.ARRAYS: arrays, wire.CONFIG: ConfigRecord({wire.SERVER_ROUND: 1})}))
        metrics = MetricRecord({"train_loss": 0.5, self.settings.weighted_by: 1})
        return down, wire.content_bytes(RecordDict({wire.ARRAYS: arrays, wire.METRICS: metrics}))

    def _close_run(self, status: str, error: BaseException | None = None) -> None:
        facts = {
            "algorithm": self.algorithm,
            "trainable_parameters": self.parameters_sent(),
            "model_parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "status": status,
        }
        if status == "stopped":
            facts["stopped_because"] = self._stop_reason()
        if error is not None:
            facts["error"] = f"{type(error).__name__}: {error}"
        self.books.close(self.state, self.merged_state_dict(), self._full_bytes(), facts)


_REBUILT_PARAMETERS = 50_000_000
_NORMS_KEPT = 100


def _build_undisturbed(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model twice, until two builds agree.

    A simulation imports the user's apps in another thread of this process, and what they draw at import comes out of
    the same global generators. Large models are built once: a client whose weights then differ is sent the server's.
    """
    built = build_seeded(model, seed)
    for _ in range(5):
        if sum(parameter.numel() for parameter in built.parameters()) > _REBUILT_PARAMETERS:
            break
        before, built = built, build_seeded(model, seed)
        if digest_tensors(before.state_dict()) == digest_tensors(built.state_dict()):
            break
    return built


def _metric(metrics: MetricRecord | None, *names: str) -> object:
    """The first of these that there is, if it is one number."""
    found = next((metrics[name] for name in names if metrics is not None and name in metrics), None)
    return None if isinstance(found, list) else found


def _as_number(value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else float(value)
