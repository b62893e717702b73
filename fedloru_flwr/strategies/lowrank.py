"""What every factor-based method has in common: its arguments, and accumulation as a property of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

from fedloru_flwr import wire
from fedloru_flwr.lowrank import AccumulationSchedule, When
from fedloru_flwr.lowrank.forms import Family, Form
from fedloru_flwr.models.plan import PlanError, TargetModules, as_names
from fedloru_flwr.strategies.federated import CommonOptions, FederatedStrategy, ModelSource
from fedloru_flwr.strategies.ranks import RankMap
from fedloru_flwr.strategies.state import Reinit


@dataclass(frozen=True)
class Accumulation:
    """Whether a method accumulates.

    Attributes:
        every: ``tau`` where the user does not say; 0: it does not unless the user says so.
        refused: why it cannot be told to; empty if it can.
        fixed: why it can at rounds that are known before alone; empty if not.
    """

    every: int = 0
    refused: str = ""
    fixed: str = ""


class LowRankStrategy(FederatedStrategy):
    """A method whose clients train low-rank factors.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        rank: ``r``, at least 1.
        alpha: LoRA's alpha; the scale is ``s = alpha / r``, the same for every client, whatever its rank.
        accumulate_every: ``tau``, in rounds; 0 for the method's own default.
        accumulate_at: accumulate after exactly these rounds instead: numbers, or a text such as ``"50,100"``.
        accumulate_when: ``"loss"`` or ``"rank"``: accumulate as soon as the training loss, or the use of the rank, has
            plateaued, at most ``accumulate_every`` rounds apart; ``""``: at fixed rounds. See `AccumulationSchedule`.
        reinit: ``"reset"`` draws fresh factors with a product of zero, so that an accumulation does not change the
            function (exact); ``"keep"`` carries on with the old ones, whose product then counts twice (what the
            authors' published command does).
        accumulate_into: how clients hold the past: ``"merge"`` folds entries into ``W``; ``"stack"`` leaves ``W``
            untouched and keeps them as one frozen adapter, as quantised bases need. The same function.
        adapter: ``"lora"`` or ``"loha"``, the family of the factors; None for the method's own.
        ranks: which client trains at which rank, see `RankMap`; None: all at ``rank``.
        target_modules: layers to factorise, see `plan_adapter`; None chooses.
        dense_leaves: ``"all"``, ``"none"`` or names: what else is trained.
        seed: the run's seed.
        weighted_by_key: the metric that weighs a reply.
        options: the method's own numbers, for its clients; subclasses set them.
        common: see `FederatedStrategy`.

    Raises:
        ValueError: for what the method cannot do, with the reason.
    """

    form: ClassVar[Form] = "factors"
    client_method: ClassVar[str] = "plain"
    accumulation: ClassVar[Accumulation] = Accumulation()
    fixed_form: ClassVar[str] = ""
    shared_rank_from_map: ClassVar[bool] = True

    def __init__(
        self,
        model: ModelSource,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        accumulate_every: int = 0,
        accumulate_at: Sequence[int] | str | None = None,
        accumulate_when: When = "",
        reinit: Reinit = "reset",
        accumulate_into: Literal["merge", "stack"] = "merge",
        adapter: Family | None = None,
        ranks: str | Mapping[str, int] | None = None,
        target_modules: TargetModules = None,
        dense_leaves: str | Sequence[str] = "all",
        seed: int = 0,
        weighted_by_key: str = wire.NUM_EXAMPLES,
        options: tuple[tuple[str, float], ...] = (),
        **common: Unpack[CommonOptions],
    ) -> None:
        if rank < 1:
            raise PlanError(f"rank must be at least 1, got {rank}")
        rank_map = RankMap(ranks, rank, num_clients=common.get("num_clients"), seed=seed)
        settings = wire.Settings(
            method=self.client_method,
            form=self._form(adapter),
            rank=rank_map.highest if self.shared_rank_from_map else rank,
            alpha=alpha / rank * (rank_map.highest if self.shared_rank_from_map else rank),
            target_modules=as_names(target_modules),
            dense_leaves=dense_leaves if isinstance(dense_leaves, str) else ",".join(dense_leaves) or "none",
            seed=seed,
            accumulate_into=accumulate_into,
            weighted_by=weighted_by_key,
            options=options,
        )
        schedule = self._schedule(accumulate_every, accumulate_at, accumulate_when)
        if settings.form == "hadamard" and accumulate_into == "stack" and schedule.accumulates:
            raise ValueError(
                f"{type(self).__name__} cannot hold accumulated Hadamard products beside W (PEFT's LoHa layers take no "
                "second adapter of another rank): use accumulate_into='merge'"
            )
        super().__init__(model, settings=settings, schedule=schedule, reinit=reinit, ranks=rank_map, **common)

    def _form(self, adapter: Family | None) -> Form:
        if adapter not in (None, "lora", "loha"):
            raise ValueError(f"adapter = {adapter!r} is not known, expected 'lora' or 'loha'")
        if adapter == "lora" and self.form == "hadamard":
            raise ValueError(
                f"{type(self).__name__} cannot have adapter='lora': without Hadamard factors it is FedLoRA"
            )
        if adapter != "loha":
            return self.form
        if self.fixed_form:
            raise ValueError(f"{type(self).__name__} cannot have adapter='loha': {self.fixed_form}")
        return "hadamard"

    def _schedule(self, every: int, at: Sequence[int] | str | None, when: When) -> AccumulationSchedule:
        if every < 0:
            raise ValueError(f"accumulate_every must be at least 1 round (0 for the method's own), got {every}")
        if (every or at or when) and self.accumulation.refused:
            raise ValueError(f"{type(self).__name__} cannot accumulate: {self.accumulation.refused}")
        if when and self.accumulation.fixed:
            raise ValueError(f"{type(self).__name__} cannot have accumulate_when={when!r}: {self.accumulation.fixed}")
        if at and when:
            raise ValueError(f"accumulate_at and accumulate_when={when!r} exclude each other: give one of them")
        if at:
            listed = at.split(",") if isinstance(at, str) else at
            return AccumulationSchedule.listed(int(part) for part in listed)
        every = every or self.accumulation.every
        if when and not every:
            raise ValueError(
                f"{type(self).__name__} does not accumulate by itself: accumulate_when={when!r} needs "
                "accumulate_every, the most rounds between two accumulations"
            )
        if when:
            return AccumulationSchedule.adaptive(when, every)
        return AccumulationSchedule.periodic(every) if every else AccumulationSchedule.never()
