"""The server's state as one value, and the pure step from round to round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from fedloru_flwr.coding import Chain, Step
from fedloru_flwr.lowrank import Adapter, Codec, Entry, Ledger, derive_seed, digest_tensors, fold
from fedloru_flwr.lowrank.factors import has_product
from fedloru_flwr.lowrank.ledger import as_tensor
from fedloru_flwr.models.plan import (
    AdapterPlan,
    as_sent,
    canonical_names,
    initial_trainables,
    plain_state,
)
from fedloru_flwr.runs import Checkpoint

Reinit = Literal["reset", "keep"]


@dataclass(frozen=True)
class ServerState:
    """Everything the next round depends on; a checkpoint is just this value.

    Attributes:
        server_round: the last round done; 0 before the first.
        trainables: what the method averages, in a fixed order: factors (or products) and dense leaves, float32
            (float64 stays).
        statistics: running statistics.
        base: the frozen parameters with all accumulated entries folded in.
        ledger: what has been accumulated.
        draw: the number of times the factors have been drawn anew.
        control: SCAFFOLD's ``c`` by key; what is missing is zero.
        progress: what an accumulation waits for, after each round since the last one; see `AccumulationSchedule.due`.
    """

    server_round: int
    trainables: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    ledger: Ledger
    draw: int = 0
    control: Mapping[str, Tensor] = field(default_factory=dict)
    chain: Chain | None = None
    progress: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a round's replies.

    Attributes:
        trainables: the new ones, of the same keys.
        applied: the adapter that stands for the clients' products from now on.
        entries: adapters and their scales that go into the model at once.
        restart: draw the factors anew (of themselves, without an accumulation).
    """

    trainables: Mapping[str, Tensor]
    applied: Mapping[str, Tensor]
    entries: tuple[tuple[Adapter, float], ...] = ()
    restart: bool = False


def initial_state(model: nn.Module, plan: AdapterPlan, seed: int) -> ServerState:
    """The state before the first round: the plain model's own values and fresh factors."""
    values = plain_state(model)
    base = plan.base_of(values)
    return ServerState(
        server_round=0,
        trainables=initial_trainables(values, plan, seed),
        statistics={name: as_sent(values[name]) for name in plan.statistics},
        base=base,
        ledger=Ledger(digest_tensors(base)),
    )


def step(
    state: ServerState,
    server_round: int,
    outcome: Outcome | None,
    statistics: Mapping[str, Tensor],
    *,
    plan: AdapterPlan,
    accumulate_now: bool,
    reinit: Reinit,
    seed: int,
    codec: Codec | None = None,
    progress: tuple[float, ...] = (),
) -> ServerState:
    r"""Take the round's aggregate as the truth and, if due, accumulate it: ``W <- W + s B A``.

    With ``reset`` the factors then restart with a product of zero, so that the function does not change; with ``keep``
    they carry on, and the product counts twice. A control variate of a factor that restarts becomes zero.

    Args:
        state: the state before.
        server_round: the round that ended.
        outcome: what the method made of the replies; None for a round without a result, which changes and
            accumulates nothing.
        statistics: the averaged running statistics (empty: none).
        plan: the layers and the scale.
        accumulate_now: whether the schedule says so.
        reinit: ``"reset"`` or ``"keep"``.
        seed: of the fresh factors.
        codec: by which what is accumulated is coded, once and for everybody; None: it is not. Then an accumulation
            changes the function by what the codec leaves out.
        progress: the state's with this round's; an accumulation begins it anew.
    """
    if outcome is None:
        return replace(state, server_round=server_round)
    trainables = dict(outcome.trainables)
    after = replace(
        state, server_round=server_round, trainables=trainables, statistics=dict(statistics) or state.statistics
    )
    for adapter, scale in outcome.entries:
        after = _append(after, adapter, scale, plan, seed, codec)
    accumulates = accumulate_now and bool(plan.adapted)
    if accumulates:
        adapter = {key: trainables[key] for key in plan.factor_keys}
        after = _append(after, adapter, plan.scale, plan, seed, codec)
    after = replace(after, progress=() if accumulates else progress)
    if outcome.restart or (accumulates and reinit == "reset"):
        draw = state.draw + 1
        fresh = plan.fresh(seed, draw)
        control = {key: value for key, value in state.control.items() if key not in plan.factor_keys}
        fresh = {key: value for key, value in fresh.items() if key in trainables}
        after = replace(after, trainables={**trainables, **fresh}, draw=draw, control=control)
    return after


def _append(
    state: ServerState, adapter: Adapter, scale: float, plan: AdapterPlan, seed: int, codec: Codec | None
) -> ServerState:
    """The state with one entry more, folded in."""
    ledger, draw = state.ledger, state.draw if plan.one_sided else 0
    if codec is None:
        ledger = ledger.append(adapter, scale, draw)
    else:
        own = derive_seed(seed, "entry", ledger.version)
        ledger = ledger.extended(Entry.coded_after(ledger.lineage, adapter, scale, draw, codec, own))
    return replace(state, ledger=ledger, base=fold_all(state.base, ledger.entries[-1:], plan, seed))


def fold_all(base: Mapping[str, Tensor], entries: tuple[Entry, ...], plan: AdapterPlan, seed: int) -> dict[str, Tensor]:
    """``W_0 + s sum_i B_i A_i``, folded one after the other as everybody does, hence the same bits."""
    folded = dict(base)
    for entry in entries:
        folded = fold(folded, plan.whole(entry.adapter, seed, entry.draw), plan.layers, entry.scale)
    return folded


def state_to_checkpoint(
    state: ServerState,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A state as named tensors, what JSON can hold, and the ledger's entries by digest.

    Not the base, which is ``W_0`` with the entries folded in.
    """
    tensors = {f"trainables/{name}": tensor for name, tensor in state.trainables.items()}
    tensors |= {f"statistics/{name}": tensor for name, tensor in state.statistics.items()}
    tensors |= {f"control/{name}": tensor for name, tensor in state.control.items()}
    entries = {entry.digest: entry.tensors() for entry in state.ledger.entries}
    links = [entry.link() for entry in state.ledger.entries]
    saved = {"root": state.ledger.root, "entries": links, "draw": state.draw, "order": list(state.trainables)}
    saved["progress"] = list(state.progress)
    if state.chain is not None:
        tensors |= {f"chain/{name}": tensor for name, tensor in state.chain.y.items()}
        tensors |= {f"steps/{i}": as_tensor(step.data) for i, (_, step) in enumerate(state.chain.steps)}
        told = [[before, step.draw, step.codec] for before, step in state.chain.steps]
        saved["chain"] = [state.chain.root, state.chain.digest, state.chain.draw, told]
    return tensors, saved, entries


def state_from_checkpoint(
    checkpoint: Checkpoint, root_base: Mapping[str, Tensor], plan: AdapterPlan, seed: int
) -> ServerState:
    """What `state_to_checkpoint` gave, with the entries folded into ``root_base``.

    Raises:
        ValueError: if an entry does not match its digest.
    """

    server_round, tensors, saved, adapters = checkpoint

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    entries = tuple(Entry.linked(link, adapters[link["digest"]]) for link in saved["entries"])
    base = fold_all(root_base, entries, plan, seed)
    trainables = part("trainables/")
    return ServerState(
        server_round,
        {name: trainables[name] for name in saved["order"]},
        part("statistics/"),
        base,
        Ledger(saved["root"], entries),
        saved["draw"],
        part("control/"),
        _chain(saved["chain"], saved["order"], part) if saved.get("chain") else None,
        tuple(saved["progress"]),
    )


def _chain(saved: Sequence[Any], order: Sequence[str], part: Callable[[str], Mapping[str, Tensor]]) -> Chain:
    root, digest, draw, told = saved
    y, data = part("chain/"), part("steps/")
    steps = tuple(
        (before, Step(number, codec, data[str(i)].numpy().tobytes())) for i, (before, number, codec) in enumerate(told)
    )
    return Chain(root, digest, {name: y[name] for name in order}, draw, steps)


def merged_state_dict(state: ServerState, model: nn.Module, plan: AdapterPlan, seed: int) -> dict[str, Tensor]:
    """The whole model as a state dict of the plain model: ``W + s B A`` with dense leaves and statistics.

    Layers for which the state has no factors (of one's own are on the clients) are ``W``.

    Args:
        state: the state to write out.
        model: a plain instance, for names, dtypes, counters and tied weights.
        plan: made from the same model.
        seed: the run's.

    Returns:
        Tensors on the CPU with the keys, shapes and dtypes of ``model.state_dict()``.
    """
    values = plain_state(model)
    adapter = plan.whole(state.trainables, seed, state.draw)
    layers = [layer for layer in plan.adapted if has_product(layer, adapter)]
    learned = {**fold(state.base, adapter, layers, plan.scale), **state.statistics}
    learned |= {name: state.trainables[name] for name in plan.dense_leaves}
    canonical = canonical_names(model)
    return {
        name: learned[source].to(value.dtype).clone() if (source := canonical.get(name, name)) in learned else value
        for name, value in values.items()
    }
