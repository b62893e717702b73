"""Which runs are needed: final ones, those of grids, those that widening adds."""

import pytest
from synthetic import record

from fedloru_flwr.compare.plan import MAX_WIDENINGS, Planner
from fedloru_flwr.compare.records import Record, fingerprint
from fedloru_flwr.compare.spec import parse_spec


def spec(**content):
    return parse_spec({"seeds": [0, 1], "methods": {"a": {}}, **content}, "name", "conf.toml")


def carry_out(planner, outcome):
    """Run all that is needed until nothing is; return plan, results and how many runs there were."""
    results = {}
    while missing := {key: run for key, run in planner.plan(results).runs.items() if key not in results}:
        for key, run in missing.items():
            results[key] = outcome(run)
    return planner.plan(results), results


def scored(score, up=1_000_000):
    """Runs whose final accuracy is a function of their settings."""
    return lambda run: record([0.1, score(run.settings)], up=up)


def tried(choice):
    return [tuple(one.values.values()) for one in choice.tried]


def test_without_grids_every_method_place_and_seed_is_run_once():
    planner = Planner(spec(methods={"a": {}, "b": {"rank": 8}}, vary={"num-clients": [20, 100]}))
    plan = planner.plan({})
    runs = [(run.method, run.at["num-clients"], run.seed, run.tuning) for run in plan.runs.values()]
    assert sorted(runs) == [(m, n, s, False) for m in "ab" for n in (20, 100) for s in (0, 1)]
    assert plan.undecided == 0
    assert plan.finals["b", 1][1].settings["num-clients"] == 100


def test_methods_with_the_same_settings_share_their_runs():
    plan = Planner(spec(methods={"a": {}, "b": {"label": "again"}})).plan({})
    assert len(plan.runs) == 2
    assert plan.finals["a", 0][0].key == plan.finals["b", 0][0].key


def test_final_runs_wait_for_the_choice_and_then_use_it():
    methods = {"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}}
    planner = Planner(spec(methods=methods, tuning={"seeds": [7], "settings": {"num-server-rounds": 3}}))
    first = planner.plan({})
    assert [run.choice["learning-rate"] for run in first.runs.values()] == [0.1, 0.2, 0.4]
    assert all(run.seed == 7 and run.tuning and run.settings["num-server-rounds"] == 3 for run in first.runs.values())
    assert (first.undecided, first.finals) == (2, {})
    plan, _ = carry_out(planner, scored(lambda settings: 1 - abs(settings["learning-rate"] - 0.2)))
    assert plan.choices[0].values == {"learning-rate": 0.2}
    finals = plan.finals["a", 0]
    assert {seed: run.settings["learning-rate"] for seed, run in finals.items()} == {0: 0.2, 1: 0.2}
    assert finals[0].settings["num-server-rounds"] == 40
    assert plan.undecided == 0


def test_runs_that_tuning_and_judging_share_are_run_once():
    planner = Planner(spec(methods={"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}}))
    _, results = carry_out(planner, scored(lambda settings: 1 - abs(settings["learning-rate"] - 0.2)))
    assert len(results) == 4  # three of seed 0, one of which is judged too, and the best with seed 1


@pytest.mark.parametrize(
    ("best", "values", "chosen"),
    [
        (0.8, [0.1, 0.2, 0.4, 0.8, 1.6], 0.8),
        (100.0, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2], 3.2),
        (0.06, [0.1, 0.2, 0.4, 0.05, 0.025], 0.05),
        (0.2, [0.1, 0.2, 0.4], 0.2),
    ],
)
def test_a_best_value_at_the_edge_widens_the_grid_until_it_is_inside(best, values, chosen):
    planner = Planner(spec(methods={"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}}))
    plan, _ = carry_out(planner, scored(lambda settings: -abs(settings["learning-rate"] - best)))
    (choice,) = plan.choices
    assert [value for (value,) in tried(choice)] == values
    assert [one.widened for one in choice.tried] == [False] * 3 + [True] * (len(values) - 3)
    assert choice.values == {"learning-rate": chosen}
    assert len(values) <= 3 + MAX_WIDENINGS


def test_widening_can_be_switched_off():
    methods = {"a": {"grid": {"learning-rate": [0.1, 0.2]}}}
    plan, _ = carry_out(Planner(spec(methods=methods, tuning={"widen": False})), scored(lambda s: s["learning-rate"]))
    assert tried(plan.choices[0]) == [(0.1,), (0.2,)]


def test_whole_numbers_stay_whole_and_impossible_values_are_not_tried():
    methods = {
        "a": {"grid": {"rank": [2, 4]}},
        "b": {"weight-decay": 0.1, "grid": {"momentum": [0.5, 0.9]}},
        "c": {"weight-decay": 0.2, "grid": {"rank": [1, 2]}},
    }

    def outcome(run):
        return record([0.1, {"a": run.settings["rank"], "b": run.settings["momentum"]}.get(run.method, 0.5)])

    plan, _ = carry_out(Planner(spec(methods=methods)), outcome)
    assert tried(plan.choices[0]) == [(2,), (4,), (8,), (16,), (32,)]
    assert tried(plan.choices[1]) == [(0.5,), (0.9,)]  # 1.62 is refused by the settings
    assert tried(plan.choices[2]) == [(1,), (2,)]  # nothing below 1; of equals the first is chosen
    assert plan.choices[2].values == {"rank": 1}


def test_texts_and_single_values_are_not_widened():
    methods = {"a": {"grid": {"optimizer": ["sgd", "adamw"], "learning-rate": [0.1]}}}
    plan, _ = carry_out(Planner(spec(methods=methods)), scored(lambda settings: settings["optimizer"] == "adamw"))
    assert tried(plan.choices[0]) == [("sgd", 0.1), ("adamw", 0.1)]
    assert plan.choices[0].values == {"optimizer": "adamw", "learning-rate": 0.1}


def test_two_axes_are_widened_along_the_lines_through_the_best():
    methods = {"a": {"grid": {"learning-rate": [0.1, 0.2], "rank": [4, 8]}}}

    def score(settings):
        return -abs(settings["learning-rate"] - 0.4) - abs(settings["rank"] - 8) / 100

    plan, _ = carry_out(Planner(spec(methods=methods)), scored(score))
    # Round 1: the best is (0.2, 8), at both edges. Round 2: the best is (0.4, 8), on a line of a single rank.
    assert tried(plan.choices[0]) == [(0.1, 4), (0.1, 8), (0.2, 4), (0.2, 8), (0.4, 8), (0.2, 16), (0.8, 8)]
    assert plan.choices[0].values == {"learning-rate": 0.4, "rank": 8}


def test_a_choice_is_made_for_each_value_of_the_axes_it_is_per():
    content = {
        "methods": {"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}},
        "vary": {"num-clients": [20, 100], "fraction-train": [0.5, 1.0]},
        "tuning": {"per": ["num-clients"], "widen": False},
    }

    def score(settings):
        # At 20 clients 0.1 is best on the mean, though 0.4 is at fraction-train = 1; at 100 clients 0.2 is.
        if settings["num-clients"] == 20:
            return {0.1: (0.9, 0.7), 0.2: (0.5, 0.5), 0.4: (0.1, 0.8)}[settings["learning-rate"]][
                settings["fraction-train"] == 1.0
            ]
        return 0.9 if settings["learning-rate"] == 0.2 else 0.1

    plan, _ = carry_out(Planner(spec(**content)), scored(score))
    assert [(choice.at, choice.values) for choice in plan.choices] == [
        ({"num-clients": 20}, {"learning-rate": 0.1}),
        ({"num-clients": 100}, {"learning-rate": 0.2}),
    ]
    assert [plan.finals["a", number][0].choice["learning-rate"] for number in range(4)] == [0.1, 0.1, 0.2, 0.2]


def test_a_choice_may_be_made_at_one_place_of_an_axis():
    content = {
        "methods": {"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}},
        "vary": {"num-clients": [20, 100], "fraction-train": [0.5, 1.0]},
        "tuning": {"settings": {"fraction-train": 0.25}, "widen": False, "seeds": [100]},
    }
    asked = []

    def score(settings):
        asked.append((settings["num-clients"], settings["fraction-train"], settings["seed"]))
        best = {20: 0.1, 100: 0.4}[settings["num-clients"]]
        return 0.9 if settings["learning-rate"] == best else 0.1

    plan, _ = carry_out(Planner(spec(**content)), scored(score))
    assert set(asked[:6]) == {(20, 0.25, 100), (100, 0.25, 100)}
    assert [(choice.at, choice.values) for choice in plan.choices] == [
        ({"num-clients": 20}, {"learning-rate": 0.1}),
        ({"num-clients": 100}, {"learning-rate": 0.4}),
    ]
    assert [plan.finals["a", number][0].settings["fraction-train"] for number in range(4)] == [0.5, 1.0, 0.5, 1.0]
    assert [plan.finals["a", number][0].choice["learning-rate"] for number in range(4)] == [0.1, 0.1, 0.4, 0.4]


def test_bytes_to_the_target_count_where_they_are_asked_for():
    content = {
        "methods": {"a": {"grid": {"rank": [2, 4, 8]}}},
        "target-accuracy": 0.5,
        "tuning": {"by": "bytes_up_to_target", "widen": False},
    }

    def outcome(run):
        # Rank 8 ends best, rank 4 reaches the target with 2 MB, rank 2 never does.
        points = {2: [0.1, 0.2, 0.3], 4: [0.1, 0.6, 0.6], 8: [0.1, 0.4, 0.9]}[run.settings["rank"]]
        return record(points, up=2_000_000)

    plan, _ = carry_out(Planner(spec(**content)), outcome)
    assert plan.choices[0].values == {"rank": 4}
    assert [one.score for one in plan.choices[0].tried] == [(-float("inf"), 0.3), (-2_000_000, 0.6), (-4_000_000, 0.9)]


def test_a_failed_candidate_is_not_chosen_and_without_any_nothing_is_judged():
    methods = {"a": {"grid": {"learning-rate": [0.1, 0.2, 0.4]}}}

    def outcome(fails):
        return lambda run: (
            Record.failed(run.settings, "no") if fails(run.settings) else record([0.1, run.settings["learning-rate"]])
        )

    plan, _ = carry_out(Planner(spec(methods=methods)), outcome(lambda settings: settings["learning-rate"] > 0.3))
    assert plan.choices[0].values == {"learning-rate": 0.2}
    assert plan.choices[0].tried[2].score is None
    plan, _ = carry_out(Planner(spec(methods=methods)), outcome(lambda settings: True))
    assert (plan.choices[0].values, plan.choices[0].decided, plan.finals) == (None, True, {})


def test_the_fingerprint_is_of_what_is_computed():
    settings = spec().resolved(spec().methods[0], {}, {}, 0)
    same = {**settings, "output-dir": "elsewhere", "run-name": "x", "timeout": 9.0}
    assert fingerprint(same) == fingerprint(settings)
    assert fingerprint({**settings, "rank": 5}) != fingerprint(settings)
    assert fingerprint({**settings, "seed": 1}) != fingerprint(settings)
