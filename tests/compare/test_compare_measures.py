"""Measures against numbers worked out by hand."""

import math

import pytest
from synthetic import record, results, rows

from fedloru_flwr.compare import measures
from fedloru_flwr.compare.judged import Comparison, winners
from fedloru_flwr.compare.measures import Stat, automatic_budgets, curve, paired_gap, score


def test_mean_and_sample_standard_deviation():
    assert Stat.of([0.8, 0.9, 1.0]) == Stat(pytest.approx(0.9), pytest.approx(0.1))
    assert Stat.of([0.5]) == Stat(0.5, None)
    assert Stat.of([0.5, None]) == Stat(0.5, None)
    assert Stat.of([None]) is None


def test_the_curve_is_the_mean_over_seeds_where_all_were_evaluated():
    line = curve([record([0.1, 0.4, None, 0.8], up=10), record([0.2, 0.6, 0.7, 0.8], up=30)], "accuracy")
    assert line.rounds == [0, 1, 3]
    assert line.up == [0, 20, 60]
    assert [stat.mean for stat in line.values] == pytest.approx([0.15, 0.5, 0.8])
    assert line.values[1].std == pytest.approx(math.sqrt(0.02))
    assert curve([], "accuracy").rounds == []


def test_a_target_is_charged_until_the_mean_curve_first_reaches_it():
    # Seed by seed the target is reached in rounds 1 and 3; the mean reaches it in round 2, and falls below it again.
    seeds = {0: record([0.1, 0.6, 0.6, 0.4], up=10), 1: record([0.1, 0.2, 0.4, 0.5], up=20, seed=1)}
    (one,) = Comparison(results({"a": seeds})).judged
    assert one.reached(0.5, "accuracy") == (2, 30.0, 0.0)
    assert one.reached(0.55, "accuracy") is None


def test_accuracy_at_a_budget_is_that_of_the_last_evaluation_within_it():
    (one,) = Comparison(results({"a": {0: record([0.1, 0.5, 0.4, 0.9], up=1_000_000)}})).judged
    assert one.at_budget(2.0, "accuracy").value.mean == 0.4  # not the best so far
    assert one.at_budget(1.999, "accuracy").value.mean == 0.5
    assert not one.at_budget(2.0, "accuracy").whole
    low = one.at_budget(0.9, "accuracy")
    assert (low.value.mean, low.untrained) == (0.1, True)
    high = one.at_budget(3.0, "accuracy")
    assert (high.value.mean, high.untrained, high.whole) == (0.9, False, True)


def test_who_wins_at_equal_bytes_may_not_be_who_wins_in_the_end():
    small = record([0.1, 0.5, 0.7, 0.75], up=1_000_000)
    large = record([0.1, 0.6, 0.8, 0.95], up=4_000_000)
    comparison = Comparison(results({"small": {0: small}, "large": {0: large}}, budgets=[1, 4, 12]))
    at = [[one.at_budget(budget, "accuracy").value.mean for one in comparison.judged] for budget in (1, 4, 12)]
    assert at == [[0.5, 0.1], [0.75, 0.6], [0.75, 0.95]]
    assert [winners(values) for values in at] == [{0}, {0}, {1}]


def test_winners_share_and_are_none_without_a_rival():
    assert winners([0.5, 0.7, 0.7, None]) == {1, 2}
    assert winners([0.5, 0.7], low=True) == {0}
    assert winners([0.5, None]) == set()


def test_final_best_bytes_and_bytes_a_client():
    seeds = {0: record([0.1, 0.9, 0.8], up=100, down=300), 1: record([0.1, 0.5, 0.6], up=200, down=300, seed=1)}
    (one,) = Comparison(results({"a": seeds})).judged
    assert one.final("accuracy") == Stat(pytest.approx(0.7), pytest.approx(math.sqrt(0.02)))
    assert one.best("accuracy").mean == pytest.approx(0.75)
    assert (one.up, one.down, one.clients) == (300.0, 600.0, 10)


def end(accuracies, up, down=0):
    return curve([record(accuracies, up=up, down=down)], "accuracy")


@pytest.mark.parametrize(
    ("lines", "up", "both"),
    [
        ([end([0.1, 0.9], 9), end([0.1, 0.5], 1)], {0, 1}, {0, 1}),
        ([end([0.1, 0.5], 9), end([0.1, 0.5], 1)], {1}, {1}),  # as good, with fewer bytes
        ([end([0.1, 0.9], 1), end([0.1, 0.5], 1)], {0}, {0}),  # better, with as many
        ([end([0.1, 0.5], 1), end([0.1, 0.5], 1)], {0, 1}, {0, 1}),  # equal
        ([end([0.1, 0.9], 9, 1), end([0.1, 0.5], 1, 90)], {0, 1}, {0}),
        ([end([0.1, 0.6, 0.9], 2), end([0.1, 0.5], 3)], {0}, {0}),  # the first was there in its first round
        ([end([0.1, 0.6, 0.4], 2), end([0.1, 0.5], 5)], {0}, {0}),  # and fell below it later
        ([end([0.1, 0.9], 9), curve([], "accuracy")], set(), set()),
        ([end([0.1, 0.9], 9)], set(), set()),
    ],
)
def test_on_the_front_is_what_no_other_has_been_as_good_as_with_fewer_bytes(lines, up, both):
    assert measures.front(lines, "up") == up
    assert measures.front(lines, "all") == both


def test_the_front_is_of_means_over_the_seeds():
    """The cheaper method is as good with one of its seeds, and not in the mean."""
    dear = curve([record([0.1, 0.6], up=9), record([0.1, 0.6], up=9, seed=1)], "accuracy")
    cheap = curve([record([0.1, 0.9], up=1), record([0.1, 0.1], up=3, seed=1)], "accuracy")
    assert measures.front([dear, cheap], "up") == {0, 1}


def test_failed_runs_count_in_no_mean():
    settings = record([0.1], seed=1).settings
    failed = measures.Record.of_rows(settings, rows([0.1, 0.3], 7_000_000), reason="no")
    (one,) = Comparison(results({"a": {0: record([0.1, 0.9]), 1: failed}})).judged
    assert one.final("accuracy") == Stat(0.9, None)
    assert one.up == 1_000_000


def test_gaps_are_taken_seed_by_seed():
    ours = {0: record([0.5]), 1: record([0.9], seed=1), 2: record([0.9], seed=2)}
    theirs = {0: record([0.4]), 1: record([0.6], seed=1)}
    gap = paired_gap(ours, theirs)
    assert (gap.mean, gap.std) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))


@pytest.mark.parametrize(
    ("totals", "budgets"),
    [
        ([4e6, 8e6, 100e6], [1.0, 4.0, 8.0]),
        ([4e6, 4e6, 4e6, 90e6], [1.0, 4.0, 90.0]),
        ([3.01e6, 3.01e6, 3.01e6], [0.76, 3.1]),
        ([], []),
    ],
)
def test_budgets_come_from_the_methods_totals(totals, budgets):
    assert automatic_budgets(totals) == budgets


def test_aggregation_errors_are_means_over_layers_and_seeds():
    errors = [None, {"a": 0.1, "b": 0.3}, {"a": 0.0, "b": 0.2}]
    other = [None, {"a": 0.4, "b": 0.4}, {"a": 0.1, "b": 0.1}]
    runs = [record([0.1, 0.2, 0.3], errors=errors), record([0.1, 0.2, 0.3], errors=other, seed=1)]
    assert measures.error_curve(runs) == [(1, pytest.approx(0.3)), (2, pytest.approx(0.1))]
    assert not measures.is_exact(measures.error_curve(runs))
    assert measures.is_exact([(1, 0.0), (2, 3e-8)])
    assert not measures.is_exact([])


def test_the_spread_is_that_of_the_last_evaluation_by_clients():
    runs = [record([0.1, 0.6], personal=[0, 0.7]), record([0.1, 0.8], personal=[0, 0.9], seed=1)]
    mean, std, worst = measures.spread(runs, "personal-accuracy")
    assert (mean.mean, std.mean, worst.mean) == (pytest.approx(0.8), 0.05, 0.5)
    assert measures.spread([record([0.1, 0.6])], "accuracy") is None


def test_scores():
    good, bad = record([0.1, 0.9, 0.6]), record([0.1, 0.5, 0.5], seed=1)
    assert score([[good, bad]], "final_accuracy", None) == (pytest.approx(0.55),)
    assert score([[good], [bad]], "best_accuracy", None) == (pytest.approx(0.7),)
    own = record([None, None], personal=[0, 0.8])
    assert score([[own]], "final_accuracy", None) == (0.8,)  # it has no global model
    assert score([[own]], "personal_accuracy", None) == (0.8,)
    assert score([[good]], "personal_accuracy", None) is None
    assert score([[good, measures.Record.failed({}, "no")]], "final_accuracy", None) is None
