"""The comparison as one HTML page that needs nothing beside itself."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fedloru_flwr.compare import captions, charts, drawing
from fedloru_flwr.compare.charts import Chart
from fedloru_flwr.compare.judged import Comparison
from fedloru_flwr.compare.measures import Metric
from fedloru_flwr.compare.records import FREE
from fedloru_flwr.compare.spec import describe
from fedloru_flwr.compare.table import (
    METRIC_NAMES,
    NONE,
    Cell,
    Table,
    choices_table,
    failures,
    tables,
    winners_table,
)
from fedloru_flwr.config import RunConfig
from fedloru_flwr.runs.units import format_duration


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: what is shown.
        charts: pictures.
        tables: beneath them.
    """

    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its id."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    @property
    def drawn(self) -> set[str]:
        """The methods whose looks the pictures need explained."""
        return {method for chart in self.charts for method in chart.methods}


def html(comparison: Comparison) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("fedloru_flwr.compare")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_url"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    template = environment.from_string((source / "page.html.j2").read_text(encoding="utf-8"))
    results = comparison.results
    return template.render(
        results=results,
        facts=_facts(comparison),
        failures=failures(comparison),
        winners=winners_table(comparison),
        sections=_sections(comparison),
        looks=drawing.looks(list(results.labels)),
        origins=results.origins,
        style=(source / "page.css").read_text(encoding="utf-8"),
    )


def _sections(comparison: Comparison) -> list[Section]:
    by_title = {table.title: table for table in tables(comparison)}
    main = by_title.pop("Accuracy and bytes")
    sections = [Section(main.title, tables=[main])]
    metrics: list[Metric] = [metric for metric in METRIC_NAMES if comparison.has(metric)]
    for metric in metrics:
        name = METRIC_NAMES[metric]
        equal = [
            by_title.pop(title) for title in list(by_title) if title.startswith(f"{name.capitalize()} at equal uplink")
        ]
        if equal:
            sections.append(Section(f"{name.capitalize()} at equal uplink", equal[0].caption, tables=_plain(equal)))
        target = by_title.pop(f"Rounds and bytes to a target {name}", None)
        if target:
            sections.append(Section(target.title, tables=[target]))
    for metric in metrics:
        name = METRIC_NAMES[metric]
        sections.append(
            Section(
                f"{name.capitalize()} over rounds and bytes",
                captions.CURVES,
                charts.accuracy_charts(comparison, metric),
            )
        )
    reference = comparison.results.labels[comparison.results.reference]
    sections.append(
        Section(
            "Gap against the number of clients",
            captions.GAPS.format(reference=reference),
            charts.gap_charts(comparison),
        )
    )
    sections.append(
        _with_table(by_title, "Spread over clients", charts.spread_charts(comparison), captions.SPREAD_CHARTS)
    )
    sections.append(_with_table(by_title, "Aggregation error", charts.error_charts(comparison), captions.ERROR_CHARTS))
    sections.append(_with_table(by_title, "Rank of what was learned", [], ""))
    sections.append(Section("Partition of the data", captions.PARTITIONS, charts.partition_charts(comparison)))
    answers = _answers(comparison)
    sections.append(Section(answers.title, tables=[answers] if answers.sections else []))
    tuning = choices_table(comparison)
    sections.append(Section("Tuning", tables=[tuning] if tuning else []))
    sections.append(Section("Settings of the methods", tables=[_settings(comparison)]))
    sections.append(Section("Time", tables=[_time(comparison)]))
    return [section for section in sections if section.charts or section.tables]


def _with_table(by_title: dict[str, Table], title: str, pictures: list[Chart], text: str) -> Section:
    table = by_title.get(title)
    return Section(title, text if pictures else "", pictures, [table] if table else [])


def _plain(found: Sequence[Table]) -> list[Table]:
    """Tables whose caption stands above them all."""
    return [Table(table.title, "", table.columns, table.sections) for table in found]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    results = comparison.results
    runs = [run for row in results.rows for run in row.runs.values()]
    shared = _shared([run.settings for run in runs])
    seeds = ", ".join(map(str, results.seeds))
    facts = [("Methods", f"{len(results.labels)}: {'; '.join(results.labels.values())}")]
    data = [f"{shared[key]}" for key in ("dataset", "model") if key in shared]
    if len(data) == 2:
        facts.append(("Task", f"{data[1]} on {data[0]}, {shared.get('partitioner', 'several')} partition"))
    for axis, values in results.axes.items():
        facts.append((f"Varied: {axis}", ", ".join(map(str, values))))
    facts.append(("Seeds", f"{seeds} ({len(runs)} runs, {sum(run.finished for run in runs)} finished)"))
    defaults = RunConfig().as_mapping()
    told = {key: value for key, value in shared.items() if value != defaults.get(key)}
    facts.append(("Settings of every run", describe(told) or "the defaults"))
    return facts


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not settings:
        return {}
    silent = ("seed", *FREE)
    return {
        key: value
        for key, value in settings[0].items()
        if key not in silent and all(other.get(key) == value for other in settings)
    }


def _settings(comparison: Comparison) -> Table:
    results = comparison.results
    everywhere = _shared([run.settings for row in results.rows for run in row.runs.values()])
    table = Table(
        "Settings of the methods",
        captions.SETTINGS,
        ["method", "settings"],
        prose=True,
    )
    for number, group in enumerate(comparison.groups):
        rows = []
        for one in group:
            mine = _shared([run.settings for run in one.row.runs.values()])
            own = {key: v for key, v in mine.items() if key not in everywhere and key not in one.row.at}
            rows.append([Cell(one.label), Cell(describe(own) or NONE)])
        if not table.sections or rows != table.sections[-1][1]:
            table.sections.append((describe(comparison.combinations[number]), rows))
    if len(table.sections) == 1:  # the same at every place
        table.sections = [("", table.sections[0][1])]
    return table


def _answers(comparison: Comparison) -> Table:
    """What language models said, a section for each method at each place."""
    table = Table(
        "Generated answers", captions.ANSWERS, ["prompt", "reference", "before training", "after training"], prose=True
    )
    for number, group in enumerate(comparison.groups):
        for one in group:
            said = next((run.answers for run in one.row.runs.values() if run.answers), None)
            if said is None:
                continue
            last = max(answer["round"] for answer in said)
            references = {answer["prompt"]: answer["reference"] for answer in said}
            told = {(answer["prompt"], answer["round"]): answer["generated"] for answer in said}
            rows = [
                [
                    Cell(prompt),
                    Cell(reference),
                    Cell(told.get((prompt, 0), NONE)),
                    Cell(told.get((prompt, last), NONE) if last else NONE),
                ]
                for prompt, reference in references.items()
            ]
            place = describe(comparison.combinations[number])
            table.sections.append((f"{one.label}, {place}" if place else one.label, rows))
    return table


def _time(comparison: Comparison) -> Table:
    table = Table(
        "Time",
        captions.TIME,
        ["method", "a run took"],
    )
    for number, group in enumerate(comparison.groups):
        rows = [[Cell(one.label), Cell(NONE if one.seconds is None else format_duration(one.seconds))] for one in group]
        table.sections.append((describe(comparison.combinations[number]), rows))
    return table
