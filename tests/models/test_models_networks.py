import subprocess
import sys

import pytest
import torch
from torch import nn

from fedloru_flwr.lowrank import digest_tensors
from fedloru_flwr.models import MODELS, NetworkFactory, PlanError, ResNet, build_seeded
from fedloru_flwr.models.networks import _halved, seeded_initialisation
from fedloru_flwr.models.plan import has_batch_norm

DIGESTS = {
    "cnn": "3789cb552d7ffd4addb1871b66c152fb278cb7d3c5c86ad6fec3ae8c0287ed88",
    "mlp": "bce653a4380f0aebe2acaec9798cfa5e13620563e5eb45665184101bedcb5d25",
    "resnet10": "f44c2cb353a6ba7b795353773ac2138a3874996c30a993244c74f698cec07ba0",
}


def small(name: str, seed: int = 0, norm: str = "group") -> NetworkFactory:
    return NetworkFactory(name, (1, 8, 8), 10, width=0 if name == "mlp" else 8, hidden=(16,), norm=norm, seed=seed)


@pytest.mark.parametrize(
    ("factory", "count"),
    [
        # conv1 160 + conv2 4640 + conv3 18496 + fc1 32896 + fc2 1290
        (NetworkFactory("cnn", (1, 8, 8), 10), 57482),
        (NetworkFactory("mlp", (1, 8, 8), 10), 85002),
        (NetworkFactory("mlp", (20,), 3, hidden=()), 63),
        (NetworkFactory("resnet10", (3, 8, 8), 10), 4903242),
        (NetworkFactory("resnet18", (3, 32, 32), 10), 11173962),
        (NetworkFactory("resnet18", (3, 32, 32), 10, norm="batch"), 11173962),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_networks_have_their_published_number_of_parameters(factory: NetworkFactory, count: int) -> None:
    assert sum(parameter.numel() for parameter in factory().parameters()) == count


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (3, 9, 13)])
@pytest.mark.parametrize("name", MODELS)
def test_networks_take_images_of_any_size_from_4_by_4(name: str, shape: tuple[int, int, int]) -> None:
    model = NetworkFactory(name, shape, 7, width=0 if name == "mlp" else 4)()
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_multilayer_perceptron_takes_samples_of_any_shape() -> None:
    assert NetworkFactory("mlp", (5,), 3)()(torch.zeros(2, 5)).shape == (2, 3)
    assert NetworkFactory("mlp", (2, 3, 4, 5), 3)()(torch.zeros(2, 2, 3, 4, 5)).shape == (2, 3)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_training_lowers_the_loss_and_moves_every_parameter(name: str, norm: str) -> None:
    model = small(name, norm=norm)()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(batch), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
def test_residual_networks_have_group_norm_unless_batch_norm_is_asked_for(name: str) -> None:
    group, batch = small(name)(), small(name, norm="batch")()
    assert not has_batch_norm(group)
    assert has_batch_norm(batch)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in group.modules())
    assert not any(isinstance(module, nn.GroupNorm) for module in batch.modules())


@pytest.mark.parametrize(("width", "groups"), [(64, 16), (8, 2), (6, 1), (256, 32)])
def test_group_norm_has_groups_of_at_least_four_channels(width: int, groups: int) -> None:
    assert ResNet((3, 8, 8), 10, blocks=(1,), width=width).norm1.num_groups == groups


def test_initial_weights_are_these_in_every_process() -> None:
    program = (
        "from fedloru_flwr.lowrank import digest_tensors\n"
        "from fedloru_flwr.models import NetworkFactory\n"
        "for name, width in (('cnn', 8), ('mlp', 0), ('resnet10', 8)):\n"
        "    factory = NetworkFactory(name, (1, 8, 8), 10, width=width, hidden=(16,))\n"
        "    print(name, digest_tensors(factory().state_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert dict(line.split() for line in done.stdout.splitlines()) == DIGESTS


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet10"])
def test_initial_weights_follow_the_seed_and_not_the_global_generators(name: str) -> None:
    torch.manual_seed(5)
    assert digest_tensors(small(name)().state_dict()) == DIGESTS[name]
    assert digest_tensors(small(name, seed=1)().state_dict()) != DIGESTS[name]


def test_initial_weights_are_bounded_by_fan_in_and_biases_are_zero() -> None:
    model = seeded_initialisation(nn.Sequential(nn.Conv2d(4, 50, 5), nn.Linear(100, 50), nn.GroupNorm(1, 3)), 0)
    conv, linear, norm = model
    assert 0.24 < conv.weight.abs().max().item() <= (6 / 100) ** 0.5
    assert 0.099 < linear.weight.abs().max().item() <= 0.1
    assert torch.count_nonzero(conv.bias) == torch.count_nonzero(linear.bias) == 0
    assert norm.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "resnet81"}, "model = 'resnet81' is not known.*did you mean 'resnet18'"),
        ({"name": "transformer"}, "expected one of cnn, mlp, resnet10, resnet18"),
        ({"input_shape": (64,)}, r"samples have shape \(64,\); use model = 'mlp'"),
        ({"input_shape": (1, 3, 8)}, "sides of at least 4"),
        ({"num_classes": 1}, "at least 2 classes, got 1"),
        ({"norm": "layer"}, "norm = 'layer' is not known, expected 'group' or 'batch'"),
        ({"width": -1}, "widths must be positive, got model-width = -1"),
        ({"hidden": (16, 0)}, r"hidden = \(16, 0\)"),
    ],
    ids=str,
)
def test_an_impossible_network_is_refused_with_the_reason(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NetworkFactory(**{"name": "cnn", "input_shape": (1, 8, 8), "num_classes": 10, **arguments})


def test_equal_factories_are_equal_keys() -> None:
    assert {small("cnn"): 1}[small("cnn")] == 1
    assert small("cnn") != small("cnn", seed=1)


def test_a_factory_is_built_under_the_seed_and_the_global_generators_stay_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = build_seeded(lambda: nn.Linear(4, 4), 7)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.weight, build_seeded(lambda: nn.Linear(4, 4), 7).weight)
    assert not torch.equal(one.weight, build_seeded(lambda: nn.Linear(4, 4), 8).weight)


def test_a_factory_that_returns_no_module_is_refused() -> None:
    with pytest.raises(PlanError, match=r"must return a torch.nn.Module, it returned dict"):
        build_seeded(dict, 0)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 4)])
def test_pooling_without_gradients_is_that_with_them(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        pooled = _halved(x)
    assert torch.equal(pooled, _halved(x))
    assert torch.equal(pooled, nn.functional.max_pool2d(x, 2))
