"""The server's state as one value, and the pure step from round to round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import Entry, Ledger, digest_tensors, fold, initial_factors
from fedloru_flwr.models.plan import AdapterPlan, canonical_names, plain_state

Reinit = Literal["reset", "keep"]


@dataclass(frozen=True)
class ServerState:
    """Everything the next round depends on; a checkpoint is just this value.

    Attributes:
        server_round: the last round done; 0 before the first.
        trainables: factors and dense leaves, in the plan's order, float32 (float64 stays).
        statistics: running statistics.
        base: the frozen parameters with all accumulated entries folded in.
        ledger: what has been accumulated.
    """

    server_round: int
    trainables: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    ledger: Ledger


def initial_state(model: nn.Module, plan: AdapterPlan, seed: int) -> ServerState:
    """The state before the first round: the plain model's own values and fresh factors."""
    values = plain_state(model)
    base = {name: values[name] for name in plan.base}
    dense = {name: _as_sent(values[name]) for name in plan.dense_leaves}
    return ServerState(
        server_round=0,
        trainables={**_fresh_factors(base, plan, seed, 0), **dense},
        statistics={name: _as_sent(values[name]) for name in plan.statistics},
        base=base,
        ledger=Ledger(digest_tensors(base)),
    )


def step(
    state: ServerState,
    server_round: int,
    mean: Mapping[str, Tensor] | None,
    statistics: Mapping[str, Tensor],
    *,
    plan: AdapterPlan,
    accumulate_now: bool,
    reinit: Reinit,
    seed: int,
) -> ServerState:
    r"""Take the round's aggregate as the truth and, if due, accumulate it: ``W <- W + s B A``.

    With ``reset`` the factors then restart with a product of zero, so that the function does not change; with ``keep``
    they carry on, and the product counts twice.

    Args:
        state: the state before.
        server_round: the round that ended.
        mean: the aggregated Trainables; None for a round without a result, which changes and accumulates nothing.
        statistics: the averaged running statistics (empty: none).
        plan: the layers and the scale.
        accumulate_now: whether the schedule says so.
        reinit: ``"reset"`` or ``"keep"``.
        seed: of the fresh factors.
    """
    if mean is None:
        return replace(state, server_round=server_round)
    trainables = {key: mean[key] for key in plan.trainable_keys}
    after = replace(
        state, server_round=server_round, trainables=trainables, statistics=dict(statistics) or state.statistics
    )
    if not (accumulate_now and plan.layers):
        return after
    adapter = {key: trainables[key] for key in plan.factor_keys}
    ledger = state.ledger.append(adapter, plan.scale)
    if reinit == "reset":
        trainables = {**trainables, **_fresh_factors(state.base, plan, seed, ledger.version)}
    return replace(after, trainables=trainables, base=fold(state.base, adapter, plan.layers, plan.scale), ledger=ledger)


def fold_all(base: Mapping[str, Tensor], entries: tuple[Entry, ...], plan: AdapterPlan) -> dict[str, Tensor]:
    """``W_0 + s sum_i B_i A_i``, folded one after the other as everybody does, hence the same bits."""
    folded = dict(base)
    for entry in entries:
        folded = fold(folded, entry.adapter, plan.layers, entry.scale)
    return folded


def state_to_checkpoint(state: ServerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as named tensors and what JSON can hold; not the base, which is ``W_0`` with the entries folded in."""
    tensors = {f"trainables/{name}": tensor for name, tensor in state.trainables.items()}
    tensors |= {f"statistics/{name}": tensor for name, tensor in state.statistics.items()}
    for index, entry in enumerate(state.ledger.entries):
        tensors |= {f"entries/{index}/{name}": tensor for name, tensor in entry.adapter.items()}
    links = [{"digest": e.digest, "previous": e.previous, "scale": e.scale} for e in state.ledger.entries]
    return tensors, {"root": state.ledger.root, "entries": links}


def state_from_checkpoint(
    server_round: int,
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    root_base: Mapping[str, Tensor],
    plan: AdapterPlan,
) -> ServerState:
    """What `state_to_checkpoint` gave, with the entries folded into ``root_base``.

    Raises:
        ValueError: if an entry does not match its digest.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    entries = tuple(
        Entry(link["digest"], link["previous"], link["scale"], part(f"entries/{index}/"))
        for index, link in enumerate(saved["entries"])
    )
    for entry in entries:
        entry.verify()
    base = fold_all(root_base, entries, plan)
    return ServerState(server_round, part("trainables/"), part("statistics/"), base, Ledger(saved["root"], entries))


def merged_state_dict(state: ServerState, model: nn.Module, plan: AdapterPlan) -> dict[str, Tensor]:
    """The whole model as a state dict of the plain model: ``W + s B A`` with dense leaves and statistics.

    Args:
        state: the state to write out.
        model: a plain instance, for names, dtypes, counters and tied weights.
        plan: made from the same model.

    Returns:
        Tensors on the CPU with the keys, shapes and dtypes of ``model.state_dict()``.
    """
    values = plain_state(model)
    learned = {**fold(state.base, state.trainables, plan.layers, plan.scale), **state.statistics}
    learned |= {name: state.trainables[name] for name in plan.dense_leaves}
    canonical = canonical_names(model)
    return {
        name: learned[source].to(value.dtype).clone() if (source := canonical.get(name, name)) in learned else value
        for name, value in values.items()
    }


def _fresh_factors(base: Mapping[str, Tensor], plan: AdapterPlan, seed: int, version: int) -> dict[str, Tensor]:
    """Factors in float32, of a float64 layer in float64."""
    factors = initial_factors(plan.layers, seed, version)
    for layer in plan.layers:
        if base[layer.weight_key].dtype == torch.float64:
            factors |= {key: factors[key].double() for key in (layer.a_key, layer.b_key)}
    return factors


def _as_sent(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize == 8 else tensor.float()
