import itertools
import math
import random

import pytest
import torch

from fedloru_flwr.lowrank import (
    FactorisedLayer,
    FixedFold,
    FixedTree,
    TreeMean,
    TreeProducts,
    aggregation_errors,
    place_of,
    weighted_mean,
)

LAYERS = [
    FactorisedLayer("narrow", "linear", (9, 7), 2),
    FactorisedLayer("conv", "conv2d", (6, 3, 3, 3), 2),
    FactorisedLayer("table", "embedding", (11, 5), 2, transposed=True),
]


def drawn(place: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(place)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "double": torch.randn(7, generator=generator, dtype=torch.float64),
        "scalar": torch.randn((), generator=generator),
        "b": torch.randn(129, generator=generator),
        "empty": torch.zeros(0, 3),
    }


def folded(
    places: int, order: list[int], skipped: set[int] = frozenset(), apart: int = 1
) -> tuple[dict[str, torch.Tensor], float]:
    mean = TreeMean(range(0, places * apart, apart))
    for place in order:
        if place in skipped:
            mean.skip(place)
        else:
            mean.add(place, drawn(place), 1.0 + place % 4)
    return mean.result()


def test_a_node_is_merged_from_left_to_right_as_soon_as_both_halves_are_known() -> None:
    merged: list[str] = []

    def merge(left: str, right: str) -> str:
        merged.append(f"({left}{right})")
        return merged[-1]

    tree = FixedTree(range(5), merge)
    for place in (3, 1, 4, 2, 0):
        tree.put(place, "abcde"[place])
    assert merged == ["(cd)", "(ab)", "((ab)(cd))", "(((ab)(cd))e)"]
    assert tree.result() == "(((ab)(cd))e)"


@pytest.mark.parametrize("places", range(1, 9))
def test_every_order_of_arrival_gives_one_tree(places: int) -> None:
    results = set()
    for order in itertools.islice(itertools.permutations(range(places)), 200):
        tree = FixedTree(range(places), lambda left, right: f"({left} {right})")
        for place in order:
            tree.put(place, None if place == 1 else str(place))
        results.add(tree.result())
    assert len(results) == 1


def test_falsy_values_and_places_nobody_spoke_of_are_empty_or_not_as_they_are() -> None:
    tree = FixedTree(range(4), lambda left, right: left + right)
    tree.put(2, 0)
    assert tree.result() == 0
    assert FixedTree(range(3), max).result() is None


def test_in_order_the_tree_holds_logarithmically_many_values() -> None:
    tree, most = FixedTree(range(1000), lambda left, right: left + right), 0
    for place in range(1000):
        tree.put(place, 1)
        most = max(most, tree.held())
    assert most <= math.log2(1000) + 1
    assert tree.result() == 1000


@pytest.mark.parametrize("place", [-1, 4, 2])
def test_a_place_that_is_not_there_or_known_is_refused(place: int) -> None:
    tree = FixedTree(range(4), max)
    tree.put(2, 1)
    with pytest.raises(ValueError, match=f"place {place} of 4"):
        tree.put(place, 1)


@pytest.mark.parametrize("apart", [1, 50, 1000])
@pytest.mark.parametrize("places", [1, 2, 3, 7, 8, 33, 200])
def test_the_mean_is_the_same_bit_for_bit_in_any_order_and_that_of_all_replies_at_once(places: int, apart: int) -> None:
    skipped = {place for place in range(places) if place % 5 == 3}
    first, total = folded(places, list(range(places)), skipped, apart)
    for seed in range(5):
        order = random.Random(seed).sample(range(places), places)
        mean, weight = folded(places, order, skipped, apart)
        assert weight == total
        assert all(torch.equal(mean[key], first[key]) for key in first)
    left = [place for place in range(places) if place not in skipped]
    expected = weighted_mean([drawn(place) for place in left], [1.0 + place % 4 for place in left])
    assert list(first) == list(expected)
    for key, value in expected.items():
        assert first[key].dtype == value.dtype
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6)


def test_the_mean_is_written_out() -> None:
    mean = TreeMean(range(3))
    mean.add(0, {"x": torch.tensor([1.0, 0.0])}, 1)
    mean.add(2, {"x": torch.tensor([2.0, 4.0])}, 3)
    value, weight = mean.result()
    assert (value["x"].tolist(), weight) == ([1.75, 3.0], 4.0)


def test_the_mean_of_equal_values_is_that_value_and_large_weights_overflow_nothing() -> None:
    mean, value = TreeMean(range(7)), torch.tensor([0.1, 3e38])
    for place in range(7):
        mean.add(place, {"x": value}, 2.0**53 - place)
    assert torch.equal(mean.result()[0]["x"], value)


def test_replies_are_not_written_to_and_not_handed_back() -> None:
    values = [torch.full((4,), float(place)) for place in range(5)]
    mean = TreeMean(range(5))
    for place, value in enumerate(values):
        mean.add(place, {"x": value}, 1)
    mean.result()[0]["x"].add_(1)
    assert [value[0].item() for value in values] == [0, 1, 2, 3, 4]
    alone = TreeMean(range(1))
    alone.add(0, {"x": values[1]}, 1)
    alone.result()[0]["x"].add_(1)
    assert values[1][0].item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    mean = TreeMean(range(2))
    mean.add(0, {"x": torch.tensor([2048.0], dtype=dtype)}, 15)
    mean.add(1, {"x": torch.tensor([2064.0], dtype=dtype)}, 1)
    assert mean.result()[0]["x"].item() == 2049.0


@pytest.mark.parametrize(
    ("tensors", "weight", "told"),
    [
        ({"y": torch.zeros(2)}, 1, "keys, order or shapes"),
        ({"x": torch.zeros(1)}, 1, "keys, order or shapes"),
        ({"x": torch.zeros(2)}, 0, "positive"),
        ({"x": torch.zeros(2)}, math.nan, "positive"),
        ({"x": torch.zeros(2)}, math.inf, "positive"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tensors: dict[str, torch.Tensor], weight: float, told: str) -> None:
    mean = TreeMean(range(3))
    mean.add(0, {"x": torch.ones(2)}, 1)
    with pytest.raises(ValueError, match=told):
        mean.add(1, tensors, weight)


@pytest.mark.parametrize("places", [1, 2, 40])
def test_a_mean_that_was_handed_out_is_the_callers(places: int) -> None:
    mean = TreeMean(range(places))
    values = [torch.full((3, 4), float(place)).T for place in range(places)]
    for place, value in enumerate(values):
        mean.add(place, {"x": value}, 1)
    first = mean.result()[0]["x"]
    assert first.shape == (4, 3)
    first.add_(100)
    assert mean.result()[0]["x"].data_ptr() != first.data_ptr()
    assert [value[0, 0].item() for value in values] == list(range(places))


def test_replies_without_tensors_have_an_empty_mean() -> None:
    mean = TreeMean(range(5))
    for place in range(5):
        mean.add(place, {}, 2)
    assert mean.result() == ({}, 10)


def test_there_is_no_mean_of_nothing() -> None:
    mean = TreeMean(range(2))
    mean.skip(0)
    with pytest.raises(ValueError, match="nothing"):
        mean.result()


def pairs(place: int, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(place)
    adapter = {}
    for layer in LAYERS:
        if kind == "hadamard":
            for part, key in zip(("a", "b") * 2, layer.hadamard_keys, strict=True):
                shape = (layer.out_features, 2) if part == "a" else (2, layer.in_features)
                adapter[key] = torch.randn(shape, generator=generator)
        elif not (kind == "partly" and layer.name == "narrow" and place == 2):
            adapter[layer.a_key] = torch.randn(layer.a_shape(), generator=generator)
            adapter[layer.b_key] = torch.randn(layer.b_shape(), generator=generator)
    return adapter


@pytest.mark.parametrize("kind", ["pairs", "hadamard", "partly", "whole"])
@pytest.mark.parametrize("apart", [1, 50])
@pytest.mark.parametrize("places", [1, 2, 3, 8, 21])
def test_aggregation_errors_are_those_of_all_replies_at_once_in_any_order(kind: str, places: int, apart: int) -> None:
    adapters, weights = [pairs(place, kind) for place in range(places)], [1.0 + place for place in range(places)]
    applied = pairs(99, kind)
    if kind == "whole":
        applied = {layer.delta_key: torch.randn(layer.weight_shape) for layer in LAYERS}
    expected = aggregation_errors(LAYERS, adapters, weights, applied)
    assert len(expected) == (2 if kind == "partly" and places > 2 else 3)
    found = []
    for seed in range(3):
        products = TreeProducts(LAYERS, range(0, places * apart, apart))
        for place in random.Random(seed).sample(range(places), places):
            products.add(place, adapters[place], weights[place])
        found.append(products.errors(applied))
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(expected, rel=1e-9)


def test_where_averaging_is_exact_the_error_is_that_of_rounding() -> None:
    shared = pairs(0, "pairs")
    adapters = [
        {key: shared[key] if "lora_A" in key else value for key, value in pairs(k, "pairs").items()} for k in range(16)
    ]
    products = TreeProducts(LAYERS, range(16))
    for place, adapter in enumerate(adapters):
        products.add(place, adapter, 1.0)
    errors = products.errors(weighted_mean(adapters, [1.0] * 16))
    assert max(errors.values()) < 1e-6


def test_no_products_have_no_error() -> None:
    products = TreeProducts(LAYERS, range(2))
    products.skip(1)
    assert products.errors(pairs(0, "pairs")) == {}


def written(places: list[int], replied: set[int]) -> str | None:
    tree = FixedTree(places, lambda left, right: f"({left} {right})")
    for index, place in enumerate(places):
        tree.put(index, str(place) if place in replied else None)
    return tree.result()


def test_whoever_else_was_asked_does_not_matter() -> None:
    draw = random.Random(0)
    for _ in range(200):
        places = sorted(draw.sample(range(40), draw.randint(1, 20)))
        replied = set(draw.sample(places, draw.randint(1, len(places))))
        assert written(places, replied) == written(sorted(replied), replied)
    assert written([0, 2, 3, 7, 8], {0, 2, 3, 7, 8}) == "(((0 (2 3)) 7) 8)"


@pytest.mark.parametrize("kind", [FixedTree, FixedFold])
@pytest.mark.parametrize("places", [[2, 1], [70, 40, 2]])
def test_places_out_of_order_are_refused(kind: type, places: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        kind(places, max)


def folded_text(places: list[int], replied: set[int], order: list[int]) -> str | None:
    fold = FixedFold(places, lambda left, right: f"({left} {right})")
    for index in order:
        fold.put(index, str(places[index]) if places[index] in replied else None)
    return fold.result()


def test_a_run_is_merged_from_left_to_right_and_runs_are_merged_as_a_tree() -> None:
    places = [0, 3, 5, 7, 8, 10, 16, 30, 60]
    expected = "((((((0 3) 5) 7) (8 10)) (16 30)) 60)"
    for seed in range(20):
        order = random.Random(seed).sample(range(len(places)), len(places))
        assert folded_text(places, set(places), order) == expected


def test_whoever_else_was_asked_does_not_matter_to_a_fold() -> None:
    draw = random.Random(1)
    for _ in range(200):
        places = sorted(draw.sample(range(100), draw.randint(1, 40)))
        replied = set(draw.sample(places, draw.randint(1, len(places))))
        order = draw.sample(range(len(places)), len(places))
        alone = sorted(replied)
        assert folded_text(places, replied, order) == folded_text(alone, replied, list(range(len(alone))))


def most_held(order: list[int]) -> int:
    fold, most = FixedFold(range(len(order)), lambda left, right: left + right), 0
    for place in order:
        fold.put(place, 1)
        most = max(most, fold.held())
    assert fold.result() == len(order)
    return most


def test_a_fold_holds_few_values_in_order_and_little_more_while_clients_are_late() -> None:
    assert most_held(list(range(1000))) <= math.log2(1000 / 8) + 2
    assert most_held([*range(1, 100), 0]) <= 7 + 2 * math.log2(100)
    assert most_held(list(reversed(range(1000)))) <= 8 + math.log2(1000 / 8) + 2
    late = [*range(0, 1000, 50)]
    assert most_held([place for place in range(1000) if place not in late] + late) <= len(late) * (
        7 + 2 * math.log2(50)
    )


@pytest.mark.parametrize("place", [-1, 4, 2])
def test_a_fold_refuses_a_place_that_is_not_there_or_known(place: int) -> None:
    fold = FixedFold(range(4), max)
    fold.put(2, 1)
    with pytest.raises(ValueError, match=f"place {place} of 4"):
        fold.put(place, 1)
    assert FixedFold(range(3), max).result() is None


def test_numbers_are_their_own_places_and_other_names_come_after_them() -> None:
    assert [place_of(name) for name in ("0", "7", "41")] == [0, 7, 41]
    names = ["north", "node-3", "-1", "1.5", "\u0663", "9" * 30, ""]
    assert all(2**63 <= place_of(name) < 2**64 for name in names)
    assert len({place_of(name) for name in names}) == len(names)
