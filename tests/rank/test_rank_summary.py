"""Tables, intervals and pictures of measurements written by hand."""

import csv
import io
import math

import pytest

from fedloru_flwr.rank.pictures import files
from fedloru_flwr.rank.summary import ALL_ROUNDS, Interval, as_csv, claims, markdown, verdict


def hessian(seed, server_round, points, value, **more):
    common = {"training": "one", "label": "One", "seed": seed, "round": server_round, "kind": "hessian"}
    what = {"of": "sample", "points": points, "number": 0, "space": "full", "layer": "", "converged": True}
    return {**common, **what, "stable_rank": value, **more}


ROWS = [
    hessian(seed, server_round, points, value)
    for seed in (0, 1, 2)
    for server_round in (0, 5)
    for points, value in ((10, 4.0 + seed), (40, 2.0))
]


def test_an_interval_is_students():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert Interval.of([1.0]).low is None
    assert Interval.of([]) is None
    assert found.mapped(math.exp).low == pytest.approx(math.exp(found.low))


def test_a_claim_pairs_by_seed_and_counts_each_seed_once():
    found = {claim.server_round: claim for claim in claims(ROWS)}
    assert set(found) == {0, 5, ALL_ROUNDS}
    whole = found[ALL_ROUNDS]
    assert whole.points == (10, 40)
    assert (whole.larger, whole.pairs) == (6, 6)
    assert whole.ratio.count == 3
    assert whole.ratio.mean == pytest.approx((2.0 * 2.5 * 3.0) ** (1 / 3))
    assert verdict(whole).endswith("the claim holds here.")
    opposite = [
        hessian(seed, 0, points, value) for seed in range(3) for points, value in ((10, 1 + seed / 9), (40, 5.0))
    ]
    assert verdict(claims(opposite)[-1]).endswith("the opposite holds here.")
    assert "a single seed" in verdict(claims([hessian(0, 0, 10, 2.0), hessian(0, 0, 40, 1.0)])[-1])


def test_a_hessian_of_zeros_is_left_out_by_itself_and_counted():
    rows = [*(hessian(seed, 0, 40, 2.0) for seed in (0, 1)), hessian(0, 0, 10, 4.0), hessian(0, 0, 10, 0.0, number=1)]
    rows += [hessian(1, 0, 10, 4.0), hessian(0, 5, 10, 3.0), hessian(0, 5, 40, 0.0)]
    found = {claim.server_round: claim for claim in claims(rows)}
    assert [(found[at].larger, found[at].pairs, found[at].left_out) for at in (0, 5, ALL_ROUNDS)] == [
        (2, 2, 1),
        (0, 0, 1),
        (2, 2, 2),
    ]
    assert found[0].small == [4.0, 4.0], "the draw that is there stays"
    assert "in 2 of 2 pairs with n = 40 (1 of 3 left out: its Hessian is zero); ratio 2" in verdict(found[0])
    assert verdict(found[5]).endswith("(1 of 1 left out: its Hessian is zero); there is nothing to compare.")
    clients = [hessian(0, 0, 7, value, of="client", number=number) for number, value in ((3, 0.0), (4, 6.0))]
    text = markdown("Title", (0, 1), [*rows, *clients])
    assert "| One | all parameters | 0 | 10 | 4 ± 0 | 2 ± 0 | 2 [2, 2] | 2 of 2 (1 of 3 left out: its Hess" in text
    assert "| all | clients' (7) | 6 | 2 | 3 | 1 of 1 (1 of 2 left out: its Hessian is zero) |" in text


def test_clients_own_samples_are_held_against_the_servers_whole_and_each_seed_counts_once():
    clients = [
        hessian(seed, 0, points, value, of="client", number=number)
        for seed, values in ((0, (4.0, 1.0, 4.0)), (1, (4.0, 4.0, 4.0)))
        for number, (points, value) in enumerate(zip((7, 9, 11), values, strict=True))
    ]
    whole = [hessian(seed, 0, 40, 2.0) for seed in (0, 1)]
    (one, every) = claims([*clients, *whole, hessian(0, 5, 8, 3.0, of="client")])
    assert (one.of, one.points, one.server_round, every.server_round) == ("client", (9, 40), 0, ALL_ROUNDS)
    assert (every.larger, every.pairs) == (5, 6)
    logs = [math.log(2 * 0.5 * 2) / 3, math.log(2)]
    assert every.ratio.mean == pytest.approx(math.exp(sum(logs) / 2))
    half = 12.706 * abs(logs[0] - logs[1]) / 2
    assert every.ratio.high == pytest.approx(math.exp(sum(logs) / 2 + half))
    told = "One, all parameters: clients' own samples (n = 9 on average) have the larger stable rank in 5 of 6 pairs"
    assert verdict(every).startswith(told)
    assert verdict(every).endswith(": undecided.")
    assert claims(clients) == [], "nothing to hold them against"


def test_rounds_after_which_the_factors_are_fresh_are_marked_everywhere():
    rows = [{**row, "after_restart": row["round"] == 5} for row in ROWS]
    text = markdown("Title", (0, 1, 2), rows)
    assert "| One | all parameters | 0 | 10 |" in text
    assert "| One | all parameters | 5 \u2020 | 10 |" in text
    assert "\u2020: the factors are fresh, of product zero (B = 0)." in text
    assert "\u2020" not in markdown("Title", (0, 1, 2), ROWS)
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert {line["round"]: line["after_restart"] for line in lines} == {"0": "False", "5": "True"}
    (marked,), (plain,) = (list(files(of).values()) for of in (rows, ROWS))
    assert marked != plain
    assert marked.count(b"fill: #ffffff; stroke: #0072b2") == 1, "one hollow marker for each line"


def similarity(seed, rank, mean):
    common = {"training": "one", "label": "One", "seed": seed, "round": 0, "kind": "similarity", "of": "gradients"}
    return {**common, "layer": "", "rank": rank, "clients": 3, "mean": mean, "std": 0.1, "to_mean": 0.5, "share": 0.9}


def test_the_tables_hold_what_was_measured():
    rows = [*ROWS, *(similarity(seed, rank, 0.2 + 0.1 * rank) for seed in (0, 1) for rank in (0, 2))]
    text = markdown("Title", (0, 1, 2), rows, ["One, seed 9: broke"])
    assert text.startswith("# Title\n\nSeeds 0, 1, 2.\n")
    assert "- One, seed 9: broke" in text
    assert "n = 10 has the larger stable rank in 6 of 6 pairs with n = 40" in text
    assert "| One | gradients | all | 2 | 0.4 ± 0 | 0.2 [0.2, 0.2] | 0.900 |" in text
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(lines) == len(rows)
    assert lines[0]["stable_rank"] == "4"
    assert lines[0]["share"] == ""


def test_pictures_are_the_same_bytes_for_the_same_numbers():
    rows = [*ROWS, similarity(0, 0, 0.3), similarity(0, 2, 0.4)]
    found = files(rows)
    assert set(found) == {"stable-rank-one-full.svg", "similarity-one-gradients.svg"}
    assert found == files(rows)
    assert all(picture.startswith(b"<?xml") for picture in found.values())
