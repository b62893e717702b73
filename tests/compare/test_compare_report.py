"""Tables, page, joining: from runs with numbers chosen by hand."""

import base64
import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from synthetic import record, results, rows

from fedloru_flwr import atomic
from fedloru_flwr.compare import charts, report
from fedloru_flwr.compare.judged import Comparison
from fedloru_flwr.compare.page import _sections, html
from fedloru_flwr.compare.records import Record
from fedloru_flwr.compare.results import Results, Row, join
from fedloru_flwr.compare.table import NONE, as_csv, markdown, timing_csv
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.runs import OutputError


def example():
    """Two places, three methods: one exact, one with personal models and no global one, one of which a run failed."""
    axes, found = {"num-clients": [10, 100]}, []
    zero, some = [None, {"l": 0.0}, {"l": 0.0}], [None, {"l": 0.5}, {"l": 0.1}]
    for number in axes["num-clients"]:
        at = {"num-clients": number}
        plain = {s: record([0.1, 0.6, 0.9], 4_000_000, 4_000_000, errors=zero, seed=s, **as_key(at)) for s in (0, 1)}
        low = {s: record([0.1, 0.4 + s / 10, 0.7], 1_000_000, errors=some, seed=s, **as_key(at)) for s in (0, 1)}
        own = {0: record([None] * 3, 2_000_000, personal=[0, 0.5, 0.8], **as_key(at))}
        own[1] = Record.failed(own[0].settings | {"seed": 1}, "out of <chalk> | memory")
        found += [Row("fedavg", at, {}, plain), Row("low", at, {"rank": 2}, low), Row("own", at, {}, own)]
    whole = results({"fedavg": {}, "low": {}, "own": {}}, axes=axes, targets=[0.5, 0.95], budgets=[2, 8])
    whole.seeds, whole.rows, whole.labels["low"] = [0, 1], found, "Low, rank 2"
    tried = [{"values": {"rank": n}, "score": s, "widened": n > 3} for n, s in ((2, [0.7]), (3, None), (9, [0.6]))]
    whole.choices = [
        {"method": "low", "at": at, "by": "final_accuracy", "seeds": [5], "tried": tried, "values": {"rank": 2}}
        for at in ({"num-clients": 10}, {"num-clients": 100})
    ]
    settings = {"dataset": "digits", "partitioner": "shards", "num-clients": 3}
    whole.partitions = [{"settings": settings, "rows": [], "counts": [[5, 0], [0, 5], [2, 3]]}]
    return whole


def as_key(at):
    return {key.replace("-", "_"): value for key, value in at.items()}


class Page(HTMLParser):
    """Checks that what is opened is closed, and keeps tags, attributes and texts."""

    VOID = ("meta", "img", "line", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, *names):
        return [(tag, attributes) for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def page():
    return html(Comparison(example()))


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>") or page.lstrip().startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|url\(|<script|<link|//[a-z]", page)
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags


def test_the_page_is_accessible(page):
    parsed = Page(page)
    levels = [int(tag[1]) for tag, _ in parsed.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes["scope"] in ("col", "row", "rowgroup") for _, attributes in parsed.all("th"))
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    pictures = parsed.all("img")
    assert len(pictures) >= 8
    assert all(len(attributes["alt"]) > 30 for _, attributes in pictures)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in parsed.all("section")} == set(ids)


def test_the_page_says_what_was_run_and_shows_every_part(page):
    told = " ".join(text for _, text in Page(page).texts)
    for part in (
        "fedloru compare synthetic.toml",
        "0, 1 (12 runs, 10 finished)",
        "Who is ahead",
        "Accuracy and bytes",
        "Accuracy at equal uplink",
        "Personal accuracy at equal uplink",
        "Rounds and bytes to a target accuracy",
        "Accuracy over rounds and bytes",
        "Gap against the number of clients",
        "Spread over clients",
        "Aggregation error",
        "Partition of the data",
        "Tuning",
        "Time",
        "own, num-clients = 10, seed 1: out of <chalk> | memory",
    ):
        assert part in told, part


def test_the_pictures_are_pictures(page):
    for picture in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page):
        root = ElementTree.fromstring(base64.b64decode(picture))
        assert root.tag.endswith("svg")
    assert html(Comparison(example())) == page


def test_the_tables_hold_the_numbers():
    text = markdown(Comparison(example())).replace(NONE, "-")
    lines = [line for line in text.splitlines() if line.startswith("| num-clients = 10 |")]
    for which, what in (
        ("accuracy", "fedavg: 0.900 | Low, rank 2: 0.700 | fedavg: 0.900 | Low, rank 2: 2.00 MB"),
        ("personal accuracy", "own: 0.800 | own: 0.500 | own: 0.800 | own: 2.00 MB"),
    ):
        assert f"| num-clients = 10, {which} | {what} | - |" in text.splitlines()
    (fedavg,) = [line for line in lines if line.startswith("| num-clients = 10 | fedavg | **0.900 ± 0.000** |")]
    assert fedavg.endswith("| **0.900 ± 0.000** | - | 8.00 | 8.00 | 0.800 | 0.800 | up, in all | 2 |")
    assert "| num-clients = 10 | own | - | - | 0.800 | 4.00 | 0 | 0.400 | 0 | - | 1 of 2 |" in lines
    # At 2 MB up the cheap method has all its rounds, the dear one none.
    assert "| num-clients = 10 | fedavg | 0.100 ± 0.000 ‡ | **0.900 ± 0.000 †** |" in lines
    assert "| num-clients = 10 | Low, rank 2 | **0.700 ± 0.000 †** | 0.700 ± 0.000 † |" in lines
    # The mean over the seeds is 0.45 after round 1.
    assert "| num-clients = 10 | Low, rank 2 | 2 | **2.00** | **0** | **2.00** | not reached | - | - | - |" in lines
    assert "| num-clients = 10 | own | - | - | - | 0.800 | 0.050 | 0.500 |" in lines
    assert "| num-clients = 10 | fedavg | 0 | 0 | 0 |" in lines
    assert "| num-clients = 10 | Low, rank 2 | 0.3 | 0.1 | 0.5 |" in lines
    assert "| Low, rank 2, num-clients = 10 | rank = 2 | **0.7000** | chosen |" in text
    assert "| Low, rank 2, num-clients = 10 | rank = 9 | 0.6000 | widened |" in text
    assert "- own, num-clients = 10, seed 1: out of <chalk> \\| memory" in text


def test_the_csv_holds_the_numbers_in_full():
    lines = list(csv.DictReader(io.StringIO(as_csv(Comparison(example())))))
    assert [(line["method"], line["num-clients"]) for line in lines] == [
        (method, number) for number in ("10", "100") for method in ("fedavg", "low", "own")
    ]
    low = lines[1]
    assert (low["label"], low["chosen"], low["seeds"], low["failed"]) == ("Low, rank 2", "rank = 2", "2", "0")
    assert (low["final_accuracy_mean"], low["bytes_up"], low["bytes_up_per_client"]) == ("0.7", "2000000", "200000")
    assert (low["rounds_to_accuracy_0.5"], low["bytes_up_to_accuracy_0.5"]) == ("2", "2000000")
    assert (low["rounds_to_accuracy_0.95"], low["budget_1_mb"]) == ("", "2")
    assert (low["accuracy_at_budget_1_mean"], low["aggregation_error_mean"]) == ("0.7", "0.3")
    own = lines[2]
    assert (own["final_accuracy_mean"], own["final_personal_mean"]) == ("", "0.8")
    assert (own["clients_personal_accuracy_worst_decile"], own["failures"]) == ("0.5", "out of <chalk> | memory")


def test_only_the_timing_depends_on_the_clock():
    fast, slow = example(), example()
    for row in slow.rows:
        row.runs = {seed: Record(**{**vars(run), "seconds": run.seconds + 7}) for seed, run in row.runs.items()}
    assert markdown(Comparison(fast)) == markdown(Comparison(slow))
    assert as_csv(Comparison(fast)) == as_csv(Comparison(slow))
    assert timing_csv(Comparison(fast)) != timing_csv(Comparison(slow))


def test_results_are_read_as_they_were_written(tmp_path):
    whole = example()
    whole.write(tmp_path)
    assert Results.read(tmp_path) == whole
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"results\.json cannot be read"):
        Results.read(tmp_path)


def test_twenty_methods_look_different_and_neighbours_very_much_so():
    looks = list(charts.looks([f"m{number}" for number in range(20)]).values())
    assert len({(look.colour, look.dashes) for look in looks}) == 20
    for one, next_one in itertools.pairwise(looks):
        assert one.colour != next_one.colour
        assert one.dashes != next_one.dashes


def test_gaps_are_drawn_against_the_reference():
    (chart,) = charts.gap_charts(Comparison(example()))
    assert "Gap to fedavg against the number of clients" in chart.alt
    assert "Low, rank 2 -0.200 at 10, -0.200 at 100" in chart.alt
    assert charts.gap_charts(Comparison(results({"a": {0: record([0.1, 0.5])}}))) == []


def test_comparisons_are_joined():
    one = results({"a": {0: record([0.1, 0.5])}, "b": {0: record([0.1, 0.6], rank=2)}}, targets=[0.5], budgets=[1])
    two = results(
        {
            "a": {1: record([0.1, 0.7], seed=1)},
            "b": {0: record([0.1, 0.8], rank=8)},
            "c": {0: record([0.1, 0.9], rank=9)},
        },
        targets=[0.9],
        budgets=[2],
        title="Other",
    )
    whole = join([("first", one), ("second", two)])
    assert whole.title == "Synthetic + Other"
    assert (whole.targets, whole.budgets_mb, whole.seeds) == ([0.5, 0.9], [1, 2], [0, 1])
    assert whole.labels == {"a": "a", "b": "b", "b (second)": "b (second)", "c": "c"}
    assert {row.method: sorted(row.runs) for row in whole.rows} == {"a": [0, 1], "b": [0], "b (second)": [0], "c": [0]}


def relative():
    """Whose best is 0.8 in round 1 of 20 clients and 0.6 of 50, by the mean of the seeds."""
    axes, rows_of = {"num-clients": [20, 50]}, []
    for number, top in ((20, 0.8), (50, 0.6)):
        at = {"num-clients": number}
        full = {s: record([0.1, top + s / 10, 0.4], 4_000_000, 1_000_000, seed=s, **as_key(at)) for s in (0, 1)}
        full[0].accuracy[1] -= 0.1  # one seed alone is better in another round
        full[0].accuracy[2] = 0.95 if number == 20 else 0.4
        low = {s: record([0.1, 0.5, top - 0.02, 0.9], 1_000_000, 3_000_000, seed=s, **as_key(at)) for s in (0, 1)}
        rows_of += [Row("full", at, {}, full), Row("low", at, {}, low)]
    whole = results({"full": {}, "low": {}}, axes=axes, targets=[0.5], budgets=[2])
    whole.rows, whole.labels["full"] = rows_of, "Full rank"
    whole.below_best = [{"best_of": "full", "minus": 0.03}]
    return whole


def test_a_target_below_a_methods_best_is_its_best_mean_less_that_at_each_place():
    comparison = Comparison(relative())
    values = [target.value for group in (0, 1) for target in comparison.targets(group, "accuracy")]
    assert values == pytest.approx([0.5, 0.77, 0.5, 0.57])
    assert [target.value for target in comparison.targets(0, "personal")] == [0.5, None]
    text = markdown(comparison)
    for part in (
        "Full rank's best - 0.03 is 0.7700 (num-clients = 20). Full rank's best - 0.03 is 0.5700 (num-clients = 50).",
        "| rounds to Full rank's best - 0.03 | MB up to Full rank's best - 0.03 | MB down to Full rank's best - 0.03 |",
        "fewest MB up to Full rank's best - 0.03 |",
        "| num-clients = 20 | low | **1** | **1.00** |",
        "| 2 | **2.00** | 6.00 | 8.00 |",
    ):
        assert part in text, part
    low = list(csv.DictReader(io.StringIO(as_csv(comparison))))[1]
    assert float(low["accuracy_full_best-0.03"]) == pytest.approx(0.77)
    assert [low[f"{what}_to_accuracy_full_best-0.03"] for what in ("rounds", "bytes_up", "bytes_down")] == [
        "2",
        "2000000",
        "6000000",
    ]


def test_a_target_below_the_best_of_a_method_without_runs_is_not_known():
    whole = relative()
    for row in whole.rows[::2]:
        row.runs = {seed: Record.failed(run.settings, "no") for seed, run in row.runs.items()}
    comparison = Comparison(whole)
    assert [target.value for target in comparison.targets(0, "accuracy")] == [0.5, None]
    assert "Full rank's best - 0.03 is unknown (num-clients = 20)." in markdown(comparison)
    assert html(comparison)


def test_comparisons_that_are_joined_keep_their_targets_below_a_best(tmp_path):
    one, two = relative(), relative()
    two.below_best = [{"best_of": "full", "minus": 0.03}, {"best_of": "low", "minus": 0.0}]
    one.write(tmp_path)
    joined = join([("first", Results.read(tmp_path)), ("second", two)])
    assert joined.below_best == two.below_best
    assert [target.name for target in Comparison(joined).targets(0, "accuracy")] == [
        "0.5",
        "Full rank's best - 0.03",
        "low's best",
    ]


def test_the_front_is_marked_in_table_csv_and_pictures():
    found = {
        "dear": {0: record([0.1, 0.5, 0.9], 8_000_000, 1_000_000)},
        "cheap": {0: record([0.1, 0.3, 0.6], 1_000_000, 9_000_000)},
        "passed": {0: record([0.1, 0.4, 0.5], 9_000_000, 9_000_000)},
    }
    comparison = Comparison(results(found))
    text = markdown(comparison)
    for method, marked in (("dear", "up, in all"), ("cheap", "up"), ("passed", NONE)):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} |") and "| 1 |" in line[-6:]]
        assert line.endswith(f"| {marked} | 1 |")
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [(line["front_up"], line["front_all"]) for line in lines] == [("1", "1"), ("1", "0"), ("0", "0")]
    drawn = {chart.title: chart for chart in charts.accuracy_charts(comparison, "accuracy")}
    assert drawn["Accuracy against bytes"].alt.endswith(" On the Pareto front: cheap, dear.")
    assert drawn["Accuracy against all bytes"].alt.endswith(" On the Pareto front: dear.")
    assert "front" not in drawn["Accuracy against rounds"].alt
    alone = Comparison(results({"dear": found["dear"]}))
    assert not any("front" in chart.alt for chart in charts.accuracy_charts(alone, "accuracy"))


def test_what_one_comparison_varies_is_an_axis_of_all():
    one = results({"a": {0: record([0.1, 0.5], num_clients=20)}})
    two = results({"a": {0: record([0.1, 0.7], num_clients=50)}}, axes={"num-clients": [50]}, at={"num-clients": 50})
    whole = join([("first", one), ("second", two)])
    assert whole.axes == {"num-clients": [20, 50]}
    assert [(row.method, row.at) for row in whole.rows] == [("a", {"num-clients": 20}), ("a", {"num-clients": 50})]


def write_run(path, accuracies, **settings):
    config = RunConfig.from_mapping({key.replace("_", "-"): value for key, value in settings.items()}).as_mapping()
    (path / "checkpoints").mkdir(parents=True)
    atomic.write_json(path / "manifest.json", {"config": config})
    atomic.write_lines(path / "metrics.jsonl", rows(accuracies, 1000, 2000))
    atomic.write_json(path / "summary.json", {"status": "finished", "rounds": len(accuracies) - 1})
    return path


def test_runs_that_no_comparison_made_are_put_side_by_side(tmp_path):
    paths = [
        write_run(tmp_path / "a", [0.1, 0.5], rank=2),
        write_run(tmp_path / "b", [0.1, 0.7], rank=2, seed=1),
        write_run(tmp_path / "c", [0.1, 0.9], rank=8),
        write_run(tmp_path / "d", [0.1, 0.8], algorithm="fedavg"),
    ]
    outcome = report(paths)
    assert outcome.output_dir == tmp_path / "report"
    assert sorted(path.name for path in outcome.output_dir.iterdir()) == [
        "charts",
        "report.html",
        "results.json",
        "table.csv",
        "table.md",
        "timing.csv",
    ]
    found = {row.method: [run.accuracy[-1] for run in row.runs.values()] for row in outcome.results.rows}
    assert found == {"fedloru, rank = 2": [0.5, 0.7], "fedloru, rank = 8": [0.9], "fedavg": [0.8]}
    assert report([outcome.output_dir], tmp_path / "again").results.labels == outcome.results.labels


def test_what_a_language_model_said_is_shown_as_text(tmp_path):
    tuned = write_run(tmp_path / "a", [0.1, 0.5], rank=2)
    said = {"prompt": "What is 1 < 2?", "reference": "true"}
    answers = [{"round": 0, **said, "generated": "<b>cow</b>"}, {"round": 1, **said, "generated": "it is true"}]
    atomic.write_lines(tuned / "samples.jsonl", answers)
    cut = write_run(tmp_path / "b", [0.1], rank=8)
    atomic.write_lines(cut / "samples.jsonl", answers[:1])
    outcome = report([tuned, cut])
    (table,) = [
        table
        for section in _sections(Comparison(outcome.results))
        for table in section.tables
        if table.title == "Generated answers"
    ]
    assert {head: [[cell.text for cell in row] for row in found] for head, found in table.sections} == {
        "fedloru, rank = 2": [["What is 1 < 2?", "true", "<b>cow</b>", "it is true"]],
        "fedloru, rank = 8": [["What is 1 < 2?", "true", "<b>cow</b>", NONE]],
    }
    whole = (outcome.output_dir / "report.html").read_text()
    assert "&lt;b&gt;cow&lt;/b&gt;" in whole
    assert "<b>cow</b>" not in whole
    again = report([outcome.output_dir], tmp_path / "again")
    assert (again.output_dir / "report.html").read_text().count("it is true") == whole.count("it is true")
    assert (
        "Generated answers" not in (report([write_run(tmp_path / "c", [0.1])]).output_dir / "report.html").read_text()
    )


def test_pictures_stand_alone_with_a_legend():
    pictures = charts.files(Comparison(example()))
    assert "gap-to-fedavg-against-the-number-of-clients.svg" in pictures
    assert "accuracy-against-bytes-num-clients-10.svg" in pictures
    plain = {chart.title: chart.svg for chart in charts.accuracy_charts(Comparison(example()), "accuracy")}
    assert len(pictures) > len(plain) > 1
    for name, picture in pictures.items():
        assert re.fullmatch(r"[a-z0-9.-]+\.svg", name)
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert b'id="legend_1"' in picture
    assert not any(b'id="legend_1"' in svg for svg in plain.values())


def test_what_is_neither_run_nor_comparison_is_refused(tmp_path):
    run = write_run(tmp_path / "a", [0.1, 0.5])
    example().write(tmp_path)
    with pytest.raises(ConfigError, match="name comparisons or runs, not both"):
        report([tmp_path, run])
    with pytest.raises(OutputError, match="there is no run at"):
        report([tmp_path / "none"])
    with pytest.raises(ConfigError, match="name the output directory"):
        report([])
    write_run(tmp_path / "b", [0.1, 0.5])
    with pytest.raises(ConfigError, match="are runs with the same settings"):
        report([run, tmp_path / "b"])
