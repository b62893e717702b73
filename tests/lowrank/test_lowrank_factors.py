import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloru_flwr.lowrank import FactorisedLayer, concatenate, digest_tensors, fold, initial_factors, product, truncate
from fedloru_flwr.lowrank.factors import single_thread

LINEAR = FactorisedLayer("fc", "linear", (2, 3), 1)
CONV1D = FactorisedLayer("conv", "conv1d", (2, 1, 2), 1)
CONV2D = FactorisedLayer("conv", "conv2d", (1, 2, 1, 2), 2)
EMBEDDING = FactorisedLayer("tokens", "embedding", (3, 2), 1, transposed=True)
TRANSPOSED = FactorisedLayer("c_fc", "linear", (3, 2), 1, transposed=True)
# Every layer with its A, its B and the product worked out by hand.
CASES = [
    (LINEAR, [[1, 2, 3]], [[1], [2]], [[1, 2, 3], [2, 4, 6]]),
    (CONV1D, [[[1, 2]]], [[[3]], [[4]]], [[[3, 6]], [[4, 8]]]),
    (
        CONV2D,
        [[[[1, 2]], [[3, 4]]], [[[1, 0]], [[0, 1]]]],
        [[[[10]], [[1]]]],
        [[[[11, 20]], [[30, 41]]]],
    ),
    (EMBEDDING, [[1, 2, 3]], [[1], [10]], [[1, 10], [2, 20], [3, 30]]),
    (TRANSPOSED, [[1, 2, 3]], [[1], [10]], [[1, 10], [2, 20], [3, 30]]),
]
each_case = pytest.mark.parametrize(
    ("layer", "a", "b", "expected"), CASES, ids=["linear", "conv1d", "conv2d", "embedding", "transposed"]
)


def adapter_of(layer: FactorisedLayer, a: object, b: object, dtype: torch.dtype = torch.float32) -> dict:
    return {layer.a_key: torch.tensor(a, dtype=dtype), layer.b_key: torch.tensor(b, dtype=dtype)}


def random_adapter(layer: FactorisedLayer, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.a_key: torch.randn(layer.a_shape(rank), generator=generator, dtype=dtype),
        layer.b_key: torch.randn(layer.b_shape(rank), generator=generator, dtype=dtype),
    }


@each_case
def test_shapes_are_those_of_the_factors(layer: FactorisedLayer, a: object, b: object, expected: object) -> None:
    assert layer.a_shape() == torch.tensor(a).shape
    assert layer.b_shape() == torch.tensor(b).shape
    assert layer.weight_shape == torch.tensor(expected).shape
    assert layer.a_shape(5)[0] == 5
    assert layer.b_shape(5)[1] == 5


def test_a_layer_knows_its_keys_and_its_size_as_a_matrix() -> None:
    layer = FactorisedLayer("layer1.0.conv1", "conv2d", (8, 3, 5, 5), 4)
    assert (layer.weight_key, layer.a_key, layer.b_key) == (
        "layer1.0.conv1.weight",
        "layer1.0.conv1.lora_A",
        "layer1.0.conv1.lora_B",
    )
    assert (layer.out_features, layer.in_features, layer.max_rank) == (8, 75, 8)
    assert (EMBEDDING.out_features, EMBEDDING.in_features, EMBEDDING.max_rank) == (2, 3, 2)
    assert FactorisedLayer("", "linear", (2, 3), 1).weight_key == "weight"


@each_case
def test_the_product_is_b_times_a_in_the_shape_of_the_weight(
    layer: FactorisedLayer, a: object, b: object, expected: object
) -> None:
    assert product(layer, adapter_of(layer, a, b)).tolist() == expected


@each_case
def test_folding_adds_the_scaled_product_and_passes_the_rest_on(
    layer: FactorisedLayer, a: object, b: object, expected: object
) -> None:
    bias, before = torch.tensor([7.0]), torch.ones(layer.weight_shape)
    weights = {layer.weight_key: before, "other.bias": bias}
    folded = fold(weights, adapter_of(layer, a, b), [layer], 0.5)
    assert list(folded) == [layer.weight_key, "other.bias"]
    assert folded[layer.weight_key].tolist() == (torch.tensor(expected) * 0.5 + 1).tolist()
    assert folded["other.bias"] is bias
    assert torch.equal(before, torch.ones(layer.weight_shape))
    assert weights[layer.weight_key] is before


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_half_precision_is_folded_in_float32_and_returned_as_it_came(dtype: torch.dtype, largest: float) -> None:
    # largest + 1 has no representation in the dtype: formed there, the sum below would be 0.
    layer = FactorisedLayer("fc", "linear", (1, 1), 2)
    adapter = adapter_of(layer, [[largest], [1.0]], [[1.0, 1.0]], dtype)
    assert product(layer, adapter).dtype == torch.float32
    assert product(layer, adapter).item() == largest + 1
    folded = fold({"fc.weight": torch.tensor([[-largest]], dtype=dtype)}, adapter, [layer], 1.0)
    assert folded["fc.weight"].dtype == dtype
    assert folded["fc.weight"].item() == 1.0


def test_float64_is_folded_in_float64() -> None:
    layer = FactorisedLayer("fc", "linear", (1, 1), 1)
    adapter = adapter_of(layer, [[2.0**-40]], [[1.0]], torch.float64)
    folded = fold({"fc.weight": torch.ones(1, 1, dtype=torch.float64)}, adapter, [layer], 1.0)
    assert folded["fc.weight"].item() == 1.0 + 2.0**-40


def test_folding_keeps_no_gradient() -> None:
    adapter = {key: value.requires_grad_() for key, value in adapter_of(LINEAR, [[1.0, 2, 3]], [[1.0], [2]]).items()}
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    assert not fold({"fc.weight": weight}, adapter, [LINEAR], 1.0)["fc.weight"].requires_grad


def test_products_are_formed_on_one_thread_and_the_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    matmul = torch.Tensor.__matmul__
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(
            torch.Tensor, "__matmul__", lambda a, b: (seen.append(torch.get_num_threads()), matmul(a, b))[1]
        )
        adapter = adapter_of(LINEAR, [[1, 2, 3]], [[1], [2]])
        product(LINEAR, adapter)
        concatenate([(adapter, 1.0)] * 3, [LINEAR])
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), single_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_concatenating_stacks_the_factors_and_puts_the_scales_into_b() -> None:
    layer = FactorisedLayer("fc", "linear", (3, 4), 1)
    first = adapter_of(layer, [[1, 0, 0, 2]], [[1], [0], [1]])
    second = adapter_of(layer, [[0, 1, 0, 0]], [[0], [2], [0]])
    joined = concatenate([(first, 0.5), (second, 3.0)], [layer])
    assert joined["fc.lora_A"].tolist() == [[1, 0, 0, 2], [0, 1, 0, 0]]
    assert joined["fc.lora_B"].tolist() == [[0.5, 0], [0, 6], [0.5, 0]]


def test_a_wide_layer_collapses_to_b_identity_when_the_ranks_add_up_beyond_its_own() -> None:
    wide = FactorisedLayer("fc", "linear", (2, 3), 1)
    joined = concatenate([(adapter_of(wide, [[1, 2, 3]], [[1], [1]]), 2.0)] * 3, [wide])
    assert joined["fc.lora_A"].tolist() == [[6, 12, 18], [6, 12, 18]]
    assert joined["fc.lora_B"].tolist() == [[1, 0], [0, 1]]


def test_a_tall_layer_collapses_to_a_identity_when_the_ranks_add_up_beyond_its_own() -> None:
    tall = FactorisedLayer("fc", "linear", (3, 2), 1)
    joined = concatenate([(adapter_of(tall, [[1, 2]], [[1], [1], [1]]), 2.0)] * 3, [tall])
    assert joined["fc.lora_A"].tolist() == [[1, 0], [0, 1]]
    assert joined["fc.lora_B"].tolist() == [[6, 12], [6, 12], [6, 12]]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "layer",
    [
        FactorisedLayer("x", "linear", (4, 7), 2),
        FactorisedLayer("x", "linear", (7, 4), 2),
        FactorisedLayer("x", "linear", (4, 7), 2, transposed=True),
        FactorisedLayer("x", "embedding", (9, 4), 2, transposed=True),
        FactorisedLayer("x", "conv1d", (5, 2, 3), 2),
        FactorisedLayer("x", "conv2d", (4, 2, 3, 3), 2),
        FactorisedLayer("x", "conv2d", (20, 2, 3, 3), 2),
    ],
    ids=lambda layer: f"{layer.kind}{layer.weight_shape}",
)
def test_concatenating_is_exact_within_and_beyond_the_layers_rank(layer: FactorisedLayer, count: int) -> None:
    adapters = [(random_adapter(layer, 2, seed), 0.5 + seed) for seed in range(count)]
    joined = concatenate(adapters, [layer])
    expected = sum(scale * product(layer, adapter) for adapter, scale in adapters)
    torch.testing.assert_close(product(layer, joined), expected, rtol=0, atol=1e-12)
    rank = min(2 * count, layer.max_rank)
    assert joined[layer.a_key].shape == layer.a_shape(rank)
    assert joined[layer.b_key].shape == layer.b_shape(rank)


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 6),
    features=st.integers(1, 6),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    transposed=st.booleans(),
)
def test_concatenating_adapters_of_any_ranks_is_exact(
    out: int, features: int, ranks: list[int], transposed: bool
) -> None:
    shape = (features, out) if transposed else (out, features)
    layer = FactorisedLayer("x", "linear", shape, 1, transposed)
    adapters = [(random_adapter(layer, rank, rank + index), 1.0 + index) for index, rank in enumerate(ranks)]
    joined = concatenate(adapters, [layer])
    expected = sum(scale * product(layer, adapter) for adapter, scale in adapters)
    torch.testing.assert_close(product(layer, joined), expected, rtol=0, atol=1e-11)


def test_concatenating_half_precision_gives_float32() -> None:
    layer = FactorisedLayer("fc", "linear", (3, 4), 1)
    adapter = adapter_of(layer, [[1, 0, 0, 0]], [[2049], [0], [0]], torch.bfloat16)
    assert {tensor.dtype for tensor in concatenate([(adapter, 1.0)], [layer]).values()} == {torch.float32}


def test_concatenating_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to concatenate"):
        concatenate([], [LINEAR])


def test_truncating_keeps_the_largest_singular_values_and_reports_the_rest() -> None:
    layer = FactorisedLayer("fc", "linear", (3, 3), 1)
    weight = torch.diag(torch.tensor([12.0, 4.0, 3.0]))
    a, b, error = truncate(layer, weight, 1)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([12.0, 0.0, 0.0])))
    assert error == pytest.approx(5.0)
    assert a.norm().item() == pytest.approx(math.sqrt(12))
    assert b.norm().item() == pytest.approx(math.sqrt(12))


@pytest.mark.parametrize(("layer", "rank"), list(itertools.product([case[0] for case in CASES], [1, None])))
def test_truncating_is_exact_at_full_rank_and_else_errs_by_what_it_says(
    layer: FactorisedLayer, rank: int | None
) -> None:
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rank = layer.max_rank if rank is None else rank
    a, b, error = truncate(layer, weight, rank)
    assert (a.shape, b.shape) == (layer.a_shape(rank), layer.b_shape(rank))
    left_out = (weight - product(layer, {layer.a_key: a, layer.b_key: b})).norm().item()
    assert left_out == pytest.approx(error, abs=1e-12)
    assert (error < 1e-12) == (rank == layer.max_rank)


@pytest.mark.parametrize("rank", [0, -1, 3])
def test_truncating_to_an_impossible_rank_is_refused_with_the_layer_and_its_limits(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 2 for layer 'fc', got {rank}"):
        truncate(LINEAR, torch.zeros(2, 3), rank)


@pytest.mark.parametrize("layer", [case[0] for case in CASES], ids=lambda layer: layer.kind)
def test_fresh_factors_have_a_zero_product_and_one_side_that_is_not_zero(layer: FactorisedLayer) -> None:
    fresh = initial_factors([layer], seed=0, version=0)
    assert list(fresh) == [layer.a_key, layer.b_key]
    assert (fresh[layer.a_key].shape, fresh[layer.b_key].shape) == (layer.a_shape(), layer.b_shape())
    zero, drawn = (layer.b_key, layer.a_key) if layer.kind != "embedding" else (layer.a_key, layer.b_key)
    assert torch.count_nonzero(fresh[zero]) == 0
    assert torch.count_nonzero(fresh[drawn]) == fresh[drawn].numel()
    assert torch.count_nonzero(product(layer, fresh)) == 0


def test_fresh_factors_are_as_wide_as_stated() -> None:
    conv = FactorisedLayer("c", "conv2d", (8, 4, 5, 5), 400)
    tokens = FactorisedLayer("e", "embedding", (8, 200), 200, transposed=True)
    fresh = initial_factors([conv, tokens], seed=0, version=0)
    assert 0.099 < fresh["c.lora_A"].abs().max().item() <= 0.1  # 1 / sqrt(4 * 5 * 5)
    assert 1.73 < fresh["e.lora_B"].abs().max().item() <= math.sqrt(3.0)
    assert fresh["e.lora_B"].var().item() == pytest.approx(1.0, abs=0.02)


def test_fresh_factors_follow_seed_version_and_layer_and_nothing_else() -> None:
    one, other = FactorisedLayer("one", "linear", (4, 4), 2), FactorisedLayer("other", "linear", (4, 4), 2)
    drawn = initial_factors([one, other], 0, 0)
    assert torch.equal(drawn["one.lora_A"], initial_factors([other, one], 0, 0)["one.lora_A"])
    assert not torch.equal(drawn["one.lora_A"], drawn["other.lora_A"])
    assert not torch.equal(drawn["one.lora_A"], initial_factors([one], 0, 1)["one.lora_A"])
    assert not torch.equal(drawn["one.lora_A"], initial_factors([one], 1, 0)["one.lora_A"])


def test_fresh_factors_are_the_same_in_another_process() -> None:
    program = (
        "from fedloru_flwr.lowrank import FactorisedLayer, digest_tensors, initial_factors\n"
        "layers = [FactorisedLayer('fc', 'linear', (5, 7), 3), "
        "FactorisedLayer('e', 'embedding', (9, 5), 3, transposed=True)]\n"
        "print(digest_tensors(initial_factors(layers, 11, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    layers = [
        FactorisedLayer("fc", "linear", (5, 7), 3),
        FactorisedLayer("e", "embedding", (9, 5), 3, transposed=True),
    ]
    digest = digest_tensors(initial_factors(layers, 11, 2))
    assert done.stdout.strip() == digest
    assert digest == "2b54309b0ec9b19f0d012995e8118849857831282474f303fb2ba8aa692868ff"
