"""The comparison's tables, for Markdown and HTML alike, and the same numbers as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from fedloru_flwr.compare import captions, measures
from fedloru_flwr.compare.judged import Comparison, Judged, winners
from fedloru_flwr.compare.measures import Metric, Stat, Way
from fedloru_flwr.compare.spec import describe

METRIC_NAMES: dict[Metric, str] = {"accuracy": "accuracy", "personal": "personal accuracy"}
WAY_NAMES: dict[Way, str] = {"up": "up", "all": "in all"}
NONE = "\u2013"


@dataclass(frozen=True)
class Cell:
    """A number as people read it; the best of its column is marked."""

    text: str
    best: bool = False


@dataclass
class Table:
    """A table.

    Attributes:
        title: what it is.
        caption: what it shows, in full.
        columns: heads; the first is of the rows' names.
        sections: rows under a head of their own; the head is empty where there is one section.
        prose: the cells are texts, not numbers.
    """

    title: str
    caption: str
    columns: list[str]
    sections: list[tuple[str, list[list[Cell]]]] = field(default_factory=list)
    prose: bool = False


def tables(comparison: Comparison) -> list[Table]:
    """All tables that have something to show."""
    metrics: list[Metric] = [metric for metric in METRIC_NAMES if comparison.has(metric)]
    found = [_main(comparison)]
    for metric in metrics:
        found += _budgets(comparison, metric)
    if comparison.results.targets or comparison.results.below_best:
        found += [_targets(comparison, metric) for metric in metrics]
    found += [_spread(comparison), _errors(comparison), _learned(comparison)]
    return [table for table in found if any(rows for _, rows in table.sections)]


def winners_table(comparison: Comparison) -> Table:
    """Who is best at what, a row for each combination."""
    metrics: list[Metric] = [metric for metric in METRIC_NAMES if comparison.has(metric)]
    given = comparison.results.budgets_mb
    names = [f"{value:g} MB up" for value in given] if given is not None else ["low", "middle", "high uplink"]
    columns = ["", "final", *(f"at {name}" for name in names)]
    columns += [f"fewest MB up to {target.name}" for target in comparison.targets(0, "accuracy")]
    table = Table("Who is ahead", "", columns, prose=True)
    rows = []
    for (number, at), metric in product(enumerate(comparison.combinations), metrics):
        group = comparison.groups[number]
        head = ", ".join(filter(None, (describe(at), METRIC_NAMES[metric] if len(metrics) > 1 else "")))
        cells = [Cell(head or "all"), _winner(group, [_mean(one.final(metric)) for one in group])]
        budgets = comparison.budgets(number)
        for budget in budgets:
            found = [one.at_budget(budget, metric) for one in group]
            cell = _winner(group, [None if at is None else at.value.mean for at in found])
            cells.append(cell if given is not None else Cell(f"{cell.text} at {budget:g} MB"))
        cells += [Cell(NONE)] * (len(names) - len(budgets))
        for target in comparison.targets(number, metric):
            reached = [one.reached(target.value, metric) for one in group]
            spent = [None if at is None else at[1] for at in reached]
            cells.append(_winner(group, spent, low=True))
        rows.append(cells)
    table.sections.append(("", rows))
    return table


def _winner(group: Sequence[Judged], values: Sequence[float | None], *, low: bool = False) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(NONE)
    top = min(known) if low else max(known)
    labels = [one.label for one, value in zip(group, values, strict=True) if value == top]
    return Cell(f"{' = '.join(labels)}: {_mb(top) + ' MB' if low else f'{top:.3f}'}")


def _main(comparison: Comparison) -> Table:
    personal = comparison.has("personal")
    columns = ["method", "final accuracy", "best accuracy", *(["final personal accuracy"] if personal else [])]
    columns += ["MB up", "MB down", "MB up a client", "MB down a client", "Pareto front", "runs"]
    table = Table(
        "Accuracy and bytes",
        f"{captions.MAIN} {captions.PERSONAL}" if personal else captions.MAIN,
        columns,
    )
    for number, group in enumerate(comparison.groups):
        finals = [one.final("accuracy") for one in group]
        bests = [one.best("accuracy") for one in group]
        personals = [one.final("personal") for one in group]
        top = [winners([_mean(stat) for stat in stats]) for stats in (finals, bests, personals)]
        fronts = {name: comparison.front(number, "accuracy", way) for way, name in WAY_NAMES.items()}
        rows = []
        for index, one in enumerate(group):
            cells = [Cell(one.label), _stat(finals[index], index in top[0]), _stat(bests[index], index in top[1])]
            if personal:
                cells.append(_stat(personals[index], index in top[2]))
            for total in (one.up, one.down):
                cells.append(Cell(_mb(total)))
            for total in (one.up, one.down):
                cells.append(Cell(_mb(None if total is None or not one.clients else total / one.clients)))
            cells.append(Cell(", ".join(name for name, those in fronts.items() if index in those) or NONE))
            cells.append(Cell(_runs(one)))
            rows.append(cells)
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table


def _budgets(comparison: Comparison, metric: Metric) -> list[Table]:
    """One table where the budgets are given, else one for each combination, which has budgets of its own."""
    name = METRIC_NAMES[metric]
    given = comparison.results.budgets_mb is not None
    caption = captions.BUDGETS if given else f"{captions.BUDGETS} {captions.AUTOMATIC_BUDGETS}"
    found: list[Table] = []
    for number, group in enumerate(comparison.groups):
        group = [one for one in group if one.curve(metric).values]
        budgets = comparison.budgets(number)
        if not budgets or not group:
            continue
        at = [[one.at_budget(budget, metric) for one in group] for budget in budgets]
        top = [winners([None if cell is None else cell.value.mean for cell in column]) for column in at]
        rows = []
        for index, one in enumerate(group):
            cells = [Cell(one.label)]
            for column, best in zip(at, top, strict=True):
                cell = column[index]
                mark = "" if cell is None else " \u2021" if cell.untrained else " \u2020" if cell.whole else ""
                shown = _stat(None if cell is None else cell.value, index in best)
                cells.append(Cell(shown.text + mark, shown.best))
            rows.append(cells)
        head = describe(comparison.combinations[number])
        if not given or not found:
            title = f"{name.capitalize()} at equal uplink"
            title += f", {head}" if head and not given else ""
            columns = ["method", *(f"{budget:g} MB up" for budget in budgets)]
            found.append(Table(title, "" if found else caption, columns))
        found[-1].sections.append((head if given else "", rows))
    return found


def _targets(comparison: Comparison, metric: Metric) -> Table:
    name, shown = METRIC_NAMES[metric], ("rounds", "MB up", "MB down", "MB in all")
    heads = [f"{what} to {target.name}" for target in comparison.targets(0, metric) for what in shown]
    table = Table(
        f"Rounds and bytes to a target {name}",
        " ".join([captions.TARGETS, *_relative_targets(comparison, metric)]),
        ["method", *heads],
    )
    for number, group in enumerate(comparison.groups):
        targets = comparison.targets(number, metric)
        group = [one for one in group if one.curve(metric).values]
        reached = [[one.reached(target.value, metric) for one in group] for target in targets]
        fewest = [
            [winners([None if at is None else at.shown[part] for at in column], low=True) for part in range(len(shown))]
            for column in reached
        ]
        rows = []
        for index, one in enumerate(group):
            cells = [Cell(one.label)]
            for target, column, best in zip(targets, reached, fewest, strict=True):
                at = column[index]
                if at is None:
                    told = NONE if target.value is None else "not reached"
                    cells += [Cell(told), *[Cell(NONE)] * (len(shown) - 1)]
                else:
                    texts = [f"{at.round:g}", *map(_mb, at.shown[1:])]
                    cells += [Cell(text, index in those) for text, those in zip(texts, best, strict=True)]
            rows.append(cells)
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table


def _relative_targets(comparison: Comparison, metric: Metric) -> list[str]:
    """What the targets that methods' results set come down to."""
    told = []
    for number, at in enumerate(comparison.combinations):
        for target in comparison.targets(number, metric)[len(comparison.results.targets) :]:
            value = "unknown" if target.value is None else f"{target.value:.4f}"
            told.append(f"{target.name} is {value}" + (f" ({describe(at)})." if at else "."))
    return told


def _spread(comparison: Comparison) -> Table:
    heads = [
        f"{kind}: {number}"
        for kind in ("global model", "own models")
        for number in ("mean", "std over clients", "worst decile")
    ]
    table = Table(
        "Spread over clients",
        captions.SPREAD,
        ["method", *heads],
    )
    for number, group in enumerate(comparison.groups):
        rows = []
        for one in group:
            found = [measures.spread(one.runs, metric) for metric in ("accuracy", "personal-accuracy")]
            if any(found):
                cells = [Cell(one.label)]
                for stats in found:
                    cells += [_stat(stat) for stat in stats] if stats else [Cell(NONE)] * 3
                rows.append(cells)
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table


def _errors(comparison: Comparison) -> Table:
    table = Table(
        "Aggregation error",
        captions.ERRORS,
        ["method", "mean over rounds", "last round", "largest"],
    )
    for number, group in enumerate(comparison.groups):
        rows = []
        for one in group:
            errors = [error for _, error in one.errors]
            if measures.is_exact(one.errors):
                rows.append([Cell(one.label), Cell("0"), Cell("0"), Cell("0")])
            elif errors:
                told = [sum(errors) / len(errors), errors[-1], max(errors)]
                rows.append([Cell(one.label), *(Cell(f"{value:.3g}") for value in told)])
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table


def _learned(comparison: Comparison) -> Table:
    """The rank of what each method has learned, a row for each of its matrices."""
    heads = ["stable rank", "effective rank", "rank of 90 %", "entries", "new", "alignment", "aggregation error"]
    table = Table("Rank of what was learned", captions.LEARNED, ["method, matrix", *heads])
    for number, group in enumerate(comparison.groups):
        rows = []
        for one in group:
            for layer, stats in measures.learned(one.runs).items():
                cells = [Cell(NONE if stat is None else _significant(stat)) for stat in stats]
                rows.append([Cell(f"{one.label}, {layer}"), *cells])
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table


def choices_table(comparison: Comparison) -> Table | None:
    """What was tried in the grids, and what was chosen; None where nothing was tuned."""
    results = comparison.results
    if not results.choices:
        return None
    one = results.choices[0]
    table = Table(
        "Tuning",
        captions.TUNING.format(
            by=one["by"].replace("_", " "),
            seeds=", ".join(map(str, one["seeds"])),
            settings=f" and {told}" if (told := describe(one.get("settings", {}))) else "",
        ),
        ["candidate", "score", ""],
    )
    for choice in results.choices:
        rows = []
        for tried in choice["tried"]:
            chosen = tried["values"] == choice["values"]
            remarks = [*(["chosen"] if chosen else []), *(["widened"] if tried["widened"] else [])]
            cells = [Cell(describe(tried["values"])), Cell(_score(tried["score"], choice["by"]), chosen)]
            rows.append([*cells, Cell(", ".join(remarks))])
        head = ", ".join(filter(None, (results.labels[choice["method"]], describe(choice["at"]))))
        table.sections.append((head, rows))
    return table


def markdown(comparison: Comparison) -> str:
    """All tables as Markdown: no wall-clock time, so the same runs give the same bytes."""
    results = comparison.results
    parts = [f"# {results.title}\n", _seeds_line(results.seeds) + "\n"]
    told = failures(comparison)
    if told:
        parts.append("## Failed\n\n" + "\n".join(f"- {_escaped(line)}" for line in told) + "\n")
    found = [winners_table(comparison), *tables(comparison), choices_table(comparison)]
    parts += [_markdown_table(table) for table in found if table is not None]
    return "\n".join(parts)


def failures(comparison: Comparison) -> list[str]:
    """A line for each row with runs that failed, and for each whose grid could not be decided."""
    results = comparison.results
    lines = []
    for row in results.rows:
        where = ", ".join(filter(None, (results.labels[row.method], describe(row.at))))
        failed = {seed: run.reason for seed, run in row.runs.items() if not run.finished}
        if failed:
            lines.append(f"{where}, seed {', '.join(map(str, failed))}: {next(iter(failed.values()))}")
        elif not row.runs and not row.missing:
            lines.append(f"{where}: no candidate of the grid could be measured")
    return lines


def as_csv(comparison: Comparison) -> str:
    """One line a row, with the numbers in full."""
    budgets = max((len(comparison.budgets(number)) for number in range(len(comparison.groups))), default=0)
    lines = []
    for number, group in enumerate(comparison.groups):
        fronts = {way: comparison.front(number, "accuracy", way) for way in WAY_NAMES}
        for index, one in enumerate(group):
            line: dict[str, object] = {"method": one.row.method, "label": one.label, **one.row.at}
            line["chosen"] = describe(one.row.choice)
            line["seeds"] = len(one.runs)
            line["failed"] = len(one.row.runs) - len(one.runs)
            for metric in METRIC_NAMES:
                for name, stat in (("final", one.final(metric)), ("best", one.best(metric))):
                    line[f"{name}_{metric}_mean"] = _mean(stat)
                    line[f"{name}_{metric}_std"] = stat.std if stat else None
            line["bytes_up"], line["bytes_down"] = one.up, one.down
            for way, total in (("up", one.up), ("down", one.down)):
                line[f"bytes_{way}_per_client"] = total / one.clients if total is not None and one.clients else None
            line |= {f"front_{name}": int(index in those) for name, those in fronts.items()}
            for metric in METRIC_NAMES:
                for target in comparison.targets(number, metric):
                    if target.name != target.key:
                        line[f"{metric}_{target.key}"] = target.value
                    reached = one.reached(target.value, metric) or (None, None, None)
                    for name, value in zip(("rounds", "bytes_up", "bytes_down"), reached, strict=True):
                        line[f"{name}_to_{metric}_{target.key}"] = value
            limits = comparison.budgets(number)
            for place in range(budgets):
                limit = limits[place] if place < len(limits) else None
                line[f"budget_{place + 1}_mb"] = limit
                for metric in METRIC_NAMES:
                    at = None if limit is None else one.at_budget(limit, metric)
                    line[f"{metric}_at_budget_{place + 1}_mean"] = at.value.mean if at else None
                    line[f"{metric}_at_budget_{place + 1}_std"] = at.value.std if at else None
            for kind in ("accuracy", "personal-accuracy"):
                stats = measures.spread(one.runs, kind) or (None, None, None)
                for name, stat in zip(("mean", "std", "worst_decile"), stats, strict=True):
                    line[f"clients_{kind.replace('-', '_')}_{name}"] = _mean(stat)
            errors = [error for _, error in one.errors]
            line["aggregation_error_mean"] = sum(errors) / len(errors) if errors else None
            line["failures"] = "; ".join(run.reason for run in one.row.runs.values() if not run.finished)
            lines.append({key: _number(value) for key, value in line.items()})
    return _csv(lines)


def timing_csv(comparison: Comparison) -> str:
    """Seconds of each run, which differ from machine to machine."""
    return _csv(
        [
            {"method": row.method, **row.at, "seed": seed, "seconds": run.seconds}
            for row in comparison.results.rows
            for seed, run in row.runs.items()
        ]
    )


def _csv(lines: Sequence[dict[str, object]]) -> str:
    buffer = io.StringIO()
    if lines:
        writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return buffer.getvalue()


def _number(value: object) -> object:
    return f"{value:.8g}" if isinstance(value, float) else "" if value is None else value


def _markdown_table(table: Table) -> str:
    headed = any(head for head, _ in table.sections)
    columns = [*([""] if headed else []), *table.columns]
    lines = [f"## {table.title}\n", *([f"{table.caption}\n"] if table.caption else [])]
    lines.append("| " + " | ".join(columns) + " |")
    texts = len(columns) if table.prose else 1 + headed
    lines.append("|" + "---|" * texts + "---:|" * (len(columns) - texts))
    for head, rows in table.sections:
        for cells in rows:
            shown = [f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text) for cell in cells]
            lines.append("| " + " | ".join([*([_escaped(head)] if headed else []), *shown]) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")


def _seeds_line(seeds: Sequence[int]) -> str:
    return f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."


def _mean(stat: Stat | None) -> float | None:
    return stat.mean if stat else None


def _stat(stat: Stat | None, best: bool = False) -> Cell:
    if stat is None:
        return Cell(NONE)
    return Cell(f"{stat.mean:.3f}" + (f" \u00b1 {stat.std:.3f}" if stat.std is not None else ""), best)


def _significant(stat: Stat) -> str:
    """With three digits, wherever the point is."""
    return f"{stat.mean:.3g}" + (f" \u00b1 {stat.std:.2g}" if stat.std is not None else "")


def _mb(num_bytes: float | None) -> str:
    """Megabytes with three digits."""
    if num_bytes is None:
        return NONE
    value = num_bytes / 1e6
    if not 0.001 <= value < 999.5:
        return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:.6f}"
    return f"{value:#.3g}".rstrip(".")


def _runs(one: Judged) -> str:
    there, asked = len(one.runs), len(one.row.runs) + len(one.row.missing)
    return str(there) if there == asked else f"{there} of {asked}"


def _score(score: Sequence[float | None] | None, by: str) -> str:
    if score is None or score[-1] is None:
        return "failed"
    if by != "bytes_up_to_target":
        return f"{score[-1]:.4f}"
    return f"not reached, {score[-1]:.4f} at the end" if score[0] is None else f"{_mb(-score[0])} MB"
