import pytest

from fedloru_flwr.lowrank import LEAST_APART, AccumulationSchedule, LearningRateSchedule
from fedloru_flwr.lowrank.schedules import loss_has_plateaued, rank_has_plateaued


def rates(schedule: LearningRateSchedule, num_rounds: int, accumulation: AccumulationSchedule) -> list[float]:
    return [schedule(server_round, num_rounds, accumulation) for server_round in range(1, num_rounds + 1)]


def due(schedule: AccumulationSchedule, num_rounds: int) -> list[int]:
    return [server_round for server_round in range(1, num_rounds + 1) if schedule.due(server_round)]


def test_periodic_accumulation_comes_after_every_tau_rounds() -> None:
    assert due(AccumulationSchedule.periodic(3), 10) == [3, 6, 9]
    assert due(AccumulationSchedule.periodic(1), 3) == [1, 2, 3]


def test_listed_accumulation_comes_at_exactly_these_rounds() -> None:
    assert due(AccumulationSchedule.listed([7, 2]), 10) == [2, 7]


def test_a_period_and_a_list_add_up() -> None:
    assert due(AccumulationSchedule(every=4, at=frozenset({1})), 9) == [1, 4, 8]


def test_never_is_never() -> None:
    assert due(AccumulationSchedule.never(), 50) == []


@pytest.mark.parametrize("tau", [0, -1])
def test_a_period_below_one_round_is_refused(tau: int) -> None:
    with pytest.raises(ValueError, match=f"accumulate-every must be at least 1 round, got {tau}"):
        AccumulationSchedule.periodic(tau)


@pytest.mark.parametrize("rounds", [[], [0, 5], [-1]])
def test_an_empty_list_or_a_round_before_the_first_is_refused(rounds: list[int]) -> None:
    with pytest.raises(ValueError, match="accumulate-at must list rounds of at least 1"):
        AccumulationSchedule.listed(rounds)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (AccumulationSchedule.periodic(3), [(1, 3), (1, 3), (1, 3), (4, 6), (4, 6), (4, 6), (7, 8), (7, 8)]),
        (AccumulationSchedule.listed([2, 3]), [(1, 2), (1, 2), (3, 3), (4, 8), (4, 8), (4, 8), (4, 8), (4, 8)]),
        (AccumulationSchedule.periodic(1), [(n, n) for n in range(1, 9)]),
        (AccumulationSchedule.never(), [(1, 8)] * 8),
    ],
)
def test_a_cycle_runs_from_one_accumulation_to_the_next(
    schedule: AccumulationSchedule, expected: list[tuple[int, int]]
) -> None:
    assert [schedule.cycle(server_round, 8) for server_round in range(1, 9)] == expected


def test_a_constant_rate_stays() -> None:
    assert rates(LearningRateSchedule("constant", 0.2), 3, AccumulationSchedule.periodic(1)) == [0.2, 0.2, 0.2]


def test_cosine_decays_over_the_whole_run() -> None:
    expected = [0.2, 0.17071067811865476, 0.1, 0.029289321881345254]
    assert rates(LearningRateSchedule("cosine", 0.2), 4, AccumulationSchedule.periodic(2)) == pytest.approx(expected)


def test_cosine_with_restart_begins_anew_after_each_accumulation_and_fits_a_last_short_cycle() -> None:
    schedule = LearningRateSchedule("cosine", 0.2, restart=True)
    fours = [0.2, 0.17071067811865476, 0.1, 0.029289321881345254]
    assert rates(schedule, 6, AccumulationSchedule.periodic(4)) == pytest.approx([*fours, 0.2, 0.1])


def test_restart_without_accumulation_is_no_restart() -> None:
    expected = [0.2, 0.17071067811865476, 0.1, 0.029289321881345254]
    schedule = LearningRateSchedule("cosine", 0.2, restart=True)
    assert rates(schedule, 4, AccumulationSchedule.never()) == pytest.approx(expected)


def test_step_divides_by_ten_after_each_third() -> None:
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert rates(LearningRateSchedule("step", 0.1), 6, AccumulationSchedule.never()) == pytest.approx(expected)
    thirds = rates(LearningRateSchedule("step", 1.0), 300, AccumulationSchedule.never())
    assert [thirds[n] for n in (99, 100, 199, 200, 299)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_step_with_restart_begins_anew_after_each_accumulation() -> None:
    schedule = LearningRateSchedule("step", 0.1, restart=True)
    expected = [0.1, 0.01, 0.001] * 2
    assert rates(schedule, 6, AccumulationSchedule.periodic(3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "plateaued"),
    [
        ([1.0], False),
        ([1.0, 1.0, 1.0, 1.0], False),  # nothing has been gained that could be accumulated
        ([1.0, 0.99, 0.985, 0.99], False),
        ([1.0, 0.9], False),  # nothing yet that two rounds could be compared with
        ([1.0, 0.9, 0.88, 0.9], False),  # one good round of the last two is enough
        ([1.0, 0.9, 0.89, 0.88], False),
        ([1.0, 0.9, 0.89, 0.885], True),
        ([1.0, 0.5, 0.49, 0.495], False),  # 0.49 is two percent below 0.5
        ([1.0, 0.5, 0.491, 0.495], True),
        ([1.0, 2.0, 3.0], False),
        ([2.0, 3.0, 1.0, 0.99, 0.99], True),
    ],
)
def test_the_loss_has_plateaued_after_a_gain_and_two_rounds_without_one(losses: list[float], plateaued: bool) -> None:
    for unit in (1.0, 1e-6, 1e6):
        assert loss_has_plateaued([unit * loss for loss in losses]) is plateaued


@pytest.mark.parametrize(
    ("used", "plateaued"),
    [
        ([0.3], False),
        ([0.76], True),
        ([0.75], False),
        ([0.3, 0.3], False),
        ([0.3, 0.3, 0.3], True),
        ([0.3, 0.305, 0.3], True),
        ([0.3, 0.307, 0.3], False),
        ([0.3, 0.29, 0.31], False),
        ([0.4, 0.3, 0.2], True),
        ([0.3, 0.6], False),
        ([0.3, 0.8], True),
    ],
)
def test_the_rank_has_plateaued_where_it_is_used_or_grows_no_more(used: list[float], plateaued: bool) -> None:
    assert rank_has_plateaued(used) is plateaued


def test_an_adaptive_schedule_waits_for_a_plateau_between_its_bounds() -> None:
    schedule = AccumulationSchedule.adaptive("rank", 4)
    assert schedule.accumulates
    assert [schedule.due(9, [0.9] * n) for n in range(1, 4)] == [False, True, True]
    assert LEAST_APART == 2
    falling = [1.0, 0.5, 0.2, 0.1]
    waits = AccumulationSchedule.adaptive("loss", 4)
    assert [waits.due(n, falling[:n]) for n in range(1, 5)] == [False, False, False, True]
    assert AccumulationSchedule.adaptive("loss", 9).due(4, [1.0, 0.5, 0.5, 0.5])
    assert not waits.due(4)  # nothing has been measured
    assert waits.most_often() == AccumulationSchedule.periodic(2)
    assert AccumulationSchedule.periodic(5).most_often() == AccumulationSchedule.periodic(5)


@pytest.mark.parametrize(
    ("when", "most", "told"),
    [
        ("loss", 2, "accumulate-when = 'loss' chooses between 2 rounds and accumulate-every, which must be at least 3"),
        ("rank", 1, "at least 3, got 1"),
        ("time", 9, "accumulate-when must be 'loss' or 'rank', got 'time'"),
    ],
)
def test_an_adaptive_schedule_without_a_choice_is_refused(when, most: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        AccumulationSchedule.adaptive(when, most)
