"""The rank of what a run has learned, from the files it left: nothing is measured while it runs.

Of every matrix, ``W - W_0`` at the end; of a factorised layer also after every accumulation, and what each entry of the
ledger added that no earlier one had spanned, with the rounds' aggregation error beside it. ``W_0`` is the model built
anew from the seed. The singular values of a sum of factor pairs are had from the factors, without the matrix.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedloru_flwr.export import Trained
from fedloru_flwr.lowrank import product
from fedloru_flwr.lowrank.factors import has_product
from fedloru_flwr.models.peft_files import apply_update
from fedloru_flwr.models.plan import canonical_names, plain_state
from fedloru_flwr.rank.products import MatrixRank, Scaled, ledger_ranks, matrix_rank

Row = dict[str, Any]
LEDGER = "ledger"  # the kind of a row of one entry
LEARNED = "learned"  # the kind of a row of a matrix at the end
LEADING = 16  # singular values that are written down


def write_ranks(run: str | os.PathLike[str]) -> None:
    """Write ``rank.csv`` into a run's directory.

    Args:
        run: the directory.

    Raises:
        ValueError: the run has no checkpoint, no global model, or another first model than is built now.
    """
    trained = Trained.of_run(run)
    trained.directory.write_ranks([*ledger_rows(trained), *matrix_rows(trained)])


def matrix_rows(trained: Trained) -> Iterator[Row]:
    """A row for each matrix of the model that has changed: the ranks of ``W - W_0`` at the end."""
    begun = trained.plain()
    apply_update(begun, trained.imported)
    names, before, after = canonical_names(begun), plain_state(begun), trained.merged
    parameters = {name for name, _ in begun.named_parameters()}
    for name, value in after.items():
        if name in parameters and names.get(name, name) == name and value.dim() >= 2:
            change = value.double() - before[name].double()
            if bool(change.any()):
                found = ranks_of_sum(matrix_rank(change))
                yield {"kind": LEARNED, "layer": name, "round": trained.state.server_round, **found}


def ledger_rows(trained: Trained) -> list[Row]:
    """What each accumulation of a run added in each layer, with the rounds' aggregation error beside it.

    Factors that have not been accumulated yet are the last entry, of the run's last round. Methods whose server holds
    the whole matrices have no rows.
    """
    plan, state, seed = trained.plan, trained.state, trained.seed
    if not plan.adapted or plan.form == "from-zero":
        return []
    entries: list[Scaled] = [(plan.whole(one.adapter, seed, one.draw), one.scale) for one in state.ledger.entries]
    rows = trained.directory.read_rounds()
    ends = _rounds_of_entries(rows, len(entries))
    pending = plan.whole(state.trainables, seed, state.draw)
    if any(has_product(layer, pending) and bool(product(layer, pending).any()) for layer in plan.adapted):
        entries.append((pending, plan.scale))
        ends.append(state.server_round)
    found = []
    for layer in plan.adapted:
        at = [end for (adapter, _), end in zip(entries, ends, strict=True) if has_product(layer, adapter)]
        for index, share in enumerate(ledger_ranks(layer, entries)):
            since = at[index - 1] if index else 0
            row = {"kind": LEDGER, "layer": layer.weight_key, "entry": index + 1, "round": at[index]}
            row |= {key: value for key, value in asdict(share).items() if key != "total"} | ranks_of_sum(share.total)
            found.append({**row, "aggregation_error": _mean_error(rows, layer.name, since, at[index])})
    return found


def ranks_of_sum(found: MatrixRank) -> Row:
    """The ranks of ``W - W_0`` as a row's values, ``total_stable_rank`` and so on, and the leading ``s1``, ``s2``..."""
    row = {f"total_{key}": value for key, value in asdict(found).items() if key != "singular_values"}
    return row | {f"s{index}": value for index, value in enumerate(found.singular_values[:LEADING], start=1)}


def _rounds_of_entries(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """The round of each entry: that in which the ledger's version reached it."""
    ends: list[int] = []
    for row in rows:
        ends += [row["round"]] * (row["ledger_version"] - len(ends))
    return (ends + [ends[-1] if ends else 0] * count)[:count]


def _mean_error(rows: Sequence[Mapping[str, Any]], layer: str, since: int, until: int) -> float | None:
    errors = [
        row["aggregation_error"][layer]
        for row in rows
        if since < row["round"] <= until and layer in (row.get("aggregation_error") or {})
    ]
    return sum(errors) / len(errors) if errors else None
