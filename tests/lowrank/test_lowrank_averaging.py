import math

import pytest
import torch

from fedloru_flwr.lowrank import weighted_mean

ONE = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
TWO = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[6.0]])}


def test_replies_count_by_their_weight() -> None:
    mean = weighted_mean([ONE, TWO], [1, 3])
    assert {key: value.tolist() for key, value in mean.items()} == {"a": [1.75, 3.0], "b": [[5.0]]}
    assert list(mean) == ["a", "b"]


def test_the_replies_are_not_changed_and_not_handed_back() -> None:
    mean = weighted_mean([ONE], [5])
    mean["a"] += 1
    assert ONE["a"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    # 2049 has no representation in half precision.
    low, high = torch.tensor([2048.0], dtype=dtype), torch.tensor([2064.0], dtype=dtype)
    mean = weighted_mean([{"x": low}, {"x": high}], [15, 1])["x"]
    assert mean.dtype == torch.float32
    assert mean.item() == 2049.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_of_half_precision_are_formed_in_float32(dtype: torch.dtype) -> None:
    ones = {"x": torch.ones(1, dtype=dtype)}
    assert weighted_mean([ones] * 3, [1, 1, 1])["x"].item() == pytest.approx(1.0, abs=1e-6)


def test_float64_stays() -> None:
    mean = weighted_mean([{"x": torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)}], [1])["x"]
    assert mean.item() == 1.0 + 2.0**-40


@pytest.mark.parametrize("weights", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_weights_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=f"got {len(weights)} and 2"):
        weighted_mean([ONE, TWO], weights)


def test_no_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean([], [])


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_a_weight_that_is_not_a_positive_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="weights must be positive"):
        weighted_mean([ONE, TWO], [1, bad])


@pytest.mark.parametrize(
    "odd",
    [
        {"a": ONE["a"]},
        {**ONE, "c": torch.zeros(1)},
        {"b": ONE["b"], "a": ONE["a"]},
        {"a": torch.zeros(1), "b": ONE["b"]},
        {"a": ONE["a"], "b": torch.zeros(1)},
    ],
    ids=["missing", "more", "order", "broadcastable shape", "fewer dimensions"],
)
def test_a_reply_of_other_keys_order_or_shapes_is_refused(odd: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="reply 1 differs from reply 0"):
        weighted_mean([ONE, odd], [1, 1])
