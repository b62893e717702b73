import random

import numpy as np
import pytest
import torch

from fedloru_flwr.lowrank import choose, derive_seed, seed_everything, seeded, uniform

NAMES = [f"client-{number}" for number in range(10)]


def test_drawn_numbers_are_these_on_every_machine() -> None:
    assert uniform(0, "a", shape=(2, 2), bound=1.0).tolist() == [
        [-0.9908255338668823, -0.015900254249572754],
        [0.7095788717269897, 0.023172855377197266],
    ]
    assert uniform(7, "factors", 1, "fc1", shape=(3,), bound=0.5).tolist() == [
        -0.10543036460876465,
        0.21093636751174927,
        -0.003620147705078125,
    ]


def test_derived_seeds_are_these_on_every_machine() -> None:
    assert derive_seed(0, "x") == 2521716577954912382
    assert derive_seed(1, "a", 2) == 938383822073135179
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(50))


def test_labels_are_kept_apart() -> None:
    labels = [("a", "b"), ("ab",), ("b", "a"), ("a",), ()]
    assert len({derive_seed(0, *one) for one in labels}) == len(labels)
    assert derive_seed(0, 1, "a") != derive_seed(1, "a")


def test_draws_fill_the_interval_evenly_and_leave_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = uniform(0, "many", shape=(20000,), bound=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (20000,)
    assert (drawn.abs() <= 2.0).all()
    assert torch.histc(drawn, 4, -2.0, 2.0).tolist() == pytest.approx([5000] * 4, abs=300)


def test_a_draw_that_is_longer_begins_like_a_shorter_one() -> None:
    assert torch.equal(uniform(0, "a", shape=(9,), bound=1.0)[:4], uniform(0, "a", shape=(4,), bound=1.0))


def test_the_choice_is_this_one_in_any_order_of_the_items() -> None:
    for items in ("abcdefgh", "hgfedcba", "dacbhgfe"):
        assert choose(0, "round", 1, items=list(items), count=3) == ["e", "f", "g"]
    assert choose(0, "round", 2, items=list("abcdefgh"), count=3) == ["b", "g", "h"]
    assert choose(1, "round", 1, items=list("abcdefgh"), count=3) != ["e", "f", "g"]


def test_every_item_is_chosen_about_equally_often() -> None:
    counts = dict.fromkeys(NAMES, 0)
    for server_round in range(2000):
        chosen = choose(0, "participants", server_round, items=NAMES, count=3)
        assert len(set(chosen)) == 3
        for name in chosen:
            counts[name] += 1
    assert all(500 < count < 700 for count in counts.values())  # 600 expected, standard deviation 20


def test_all_or_none_can_be_chosen() -> None:
    assert choose(0, items=NAMES, count=10) == sorted(NAMES)
    assert choose(0, items=NAMES, count=0) == []


@pytest.mark.parametrize("count", [-1, 11])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {count} of 10"):
        choose(0, items=NAMES, count=count)


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_seeding_makes_all_three_generators_repeat() -> None:
    seed_everything(2**40 + 5)
    first = draw()
    seed_everything(2**40 + 5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_seeding_for_a_while_puts_every_generator_back_even_after_an_error() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with seeded(2):
        inside = draw()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError
    assert draw() == expected
    assert all(a != b for a, b in zip(inside, expected, strict=True))
