"""Advice from a pilot whose answer is known."""

import pytest
import torch
from torch import nn

from fedloru_flwr.rank.advice import Evidence, advise, as_markdown, evidence_of, settings
from fedloru_flwr.rank.unit import possible_layers


def path_of(rank, rounds=8, size=(16, 20), turn=0):
    """Weights that move by a fixed matrix of some rank a round; every ``turn`` rounds by another one."""
    generator = torch.Generator().manual_seed(rank)
    weights = [torch.zeros(size)]
    for server_round in range(rounds):
        if server_round == 0 or (turn and server_round % turn == 0):
            b = torch.linalg.qr(torch.randn(size[0], rank, generator=generator)).Q
            a = torch.linalg.qr(torch.randn(size[1], rank, generator=generator)).Q
        weights.append(weights[-1] + b @ a.T)
    return weights


def test_the_share_that_fits_is_that_of_the_singular_values():
    found = evidence_of("fc", path_of(4))
    assert found.shape == (16, 20)
    assert found.moved == pytest.approx(8 * 4)
    assert {every for _, every in found.held} == {1, 2, 3}
    for every in (1, 2, 3):
        assert found.held[2, every] == pytest.approx(0.5)
        assert found.held[4, every] == pytest.approx(1.0)
    turning = evidence_of("fc", path_of(2, turn=1))
    assert turning.held[2, 1] == pytest.approx(1.0)
    assert turning.held[2, 3] < 0.8


def test_what_two_halves_share_is_kept_and_their_noise_is_not_counted():
    generator = torch.Generator().manual_seed(0)
    signal = 10 * torch.outer(torch.randn(16, generator=generator), torch.randn(20, generator=generator))
    halves = [(signal + torch.randn(16, 20, generator=generator), signal + torch.randn(16, 20, generator=generator))]
    found = evidence_of("fc", path_of(1), halves)
    assert found.common[1] == pytest.approx(1.0, abs=0.02)
    assert evidence_of("fc", path_of(1), [(signal, -signal)]).common == {}


def test_the_cheapest_point_that_holds_enough_is_proposed():
    wide = evidence_of("wide", path_of(4, size=(64, 64)))
    narrow = evidence_of("narrow", path_of(8, size=(10, 12)))
    found = advise([wide, narrow], 0.5)
    assert found.rank == 4
    assert found.every == 3, "nothing turns, so that accumulating less often is cheaper"
    assert found.layers == ("wide",)
    assert found.met
    assert found.cost == pytest.approx(2 * 120 + 4 * (2 + 1 / 1.5) * 128)
    assert settings(found, 2.0) == {
        "algorithm": "fedloru",
        "rank": 4,
        "alpha": 8.0,
        "accumulate-every": 3,
        "target-modules": "wide",
    }
    text = as_markdown(found, 2.0, "From a test.")
    assert 'target-modules = "wide"' in text
    assert "| narrow | 10 x 12 |" in text
    assert "dense: factors would not halve it" in text
    assert found.dense_cost == 2 * (64 * 64 + 120)
    assert found.moved == pytest.approx(4 / (4 + 8))
    assert "A contact moves 1,605 numbers of these layers" in text
    assert "all of them dense, 8,432 (5.3 times as many)" in text
    assert "have 33 % of the movement" in text
    assert "anything of more than 3 rounds between accumulations" in text


def test_a_layer_that_never_moved_is_no_evidence():
    still = evidence_of("still", [torch.zeros(64, 64)] * 9)
    assert still.moved == 0
    found = advise([evidence_of("wide", path_of(4, size=(64, 64))), still], 0.5)
    assert found.layers == ("wide",)
    assert [one.layer for one in found.evidence] == ["wide"]
    with pytest.raises(ValueError, match="nothing moved"):
        advise([still], 0.5)


def test_every_kind_of_layer_that_factors_know_is_looked_at():
    module = nn.ModuleDict(
        {
            "words": nn.Embedding(30, 8),
            "line": nn.Conv1d(8, 6, 3),
            "image": nn.Conv2d(3, 5, 3),
            "out": nn.Linear(6, 4),
            "norm": nn.LayerNorm(4),
        }
    )
    assert {layer.name for layer in possible_layers(module)} == {"words", "line", "image", "out"}
    for layer in possible_layers(module):
        matrix = layer.as_matrix(module.get_parameter(layer.weight_key).detach())
        assert matrix.shape == (layer.out_features, layer.in_features)


def test_a_layer_that_turns_is_to_be_accumulated_more_often():
    turning = evidence_of("turning", path_of(2, rounds=12, size=(64, 64), turn=2))
    assert (
        advise([turning], 0.5).every < advise([evidence_of("still", path_of(2, rounds=12, size=(64, 64)))], 0.5).every
    )


def test_where_nothing_suits_the_reason_is_told():
    with pytest.raises(ValueError, match="no layer suits factors"):
        advise([Evidence("fc", (3, 4), 1.0, {(1, 1): 0.9}, {})], 0.5)
    with pytest.raises(ValueError, match="at least two rounds"):
        evidence_of("fc", [torch.zeros(4, 4)])
