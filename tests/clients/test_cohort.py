"""Many clients as one computation: the same as each by itself."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from formulas import effective
from torch import nn
from torch.func import functional_call

from fedloru_flwr.clients import cohort
from fedloru_flwr.clients.cohort import obstacle, train_cohort
from fedloru_flwr.clients.task import LocalTask, Phase
from fedloru_flwr.clients.training import LocalOptimisation, batches, train_locally
from fedloru_flwr.data import Samples
from fedloru_flwr.models import NetworkFactory, plan_adapter, plan_full
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.layout import Layout, shapes

CPU = torch.device("cpu")
COUNTS = (9, 3, 17, 8, 1)  # with batches of 4: 3, 1, 5, 2 and 1 steps an epoch
CLASSES = 3


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x):
        """``(batch, length)`` to ``(batch, classes)``."""
        y = torch.tanh(self.conv(self.tokens(x).transpose(1, 2))).transpose(1, 2)
        return self.out(torch.tanh(self.fc(self.norm(y))).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, stride=2, padding="valid", bias=False),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    )


def resnet():
    return NetworkFactory("resnet10", (1, 8, 8), CLASSES, width=4)()


def cnn():
    return NetworkFactory("cnn", (1, 8, 8), CLASSES, width=4)()


MODELS = {
    "mlp": (mlp, (6,), "Linear"),
    "conv": (conv, (1, 8, 8), "Conv2d"),
    "tokens": (Tokens, (7,), "tokens,conv,fc"),
    "resnet": (resnet, (1, 8, 8), "auto"),
    "cnn": (cnn, (1, 8, 8), "conv2,conv3,fc1"),
}


def how(**more):
    usual = {
        "epochs": 3,
        "batch_size": 4,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    return LocalOptimisation(**{**usual, **more})


OPTIMISATIONS = {
    "sgd": how(),
    "momentum": how(momentum=0.9, learning_rate=0.1),
    "weight decay": how(momentum=0.5, weight_decay=0.1),
    "clipped": how(max_grad_norm=0.3, learning_rate=1.0),
    "all": how(momentum=0.9, weight_decay=0.01, max_grad_norm=0.5),
    "adamw": how(optimizer="adamw", learning_rate=0.02, momentum=0.9, weight_decay=0.1, max_grad_norm=0.5),
}


def samples(shape, count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    if shape == (7,):
        inputs = torch.randint(0, 9, (count, 7), generator=generator)
    else:
        inputs = torch.randn(count, *shape, generator=generator).to(dtype)
    return Samples(inputs, torch.randint(0, CLASSES, (count,), generator=generator))


def near(values, client):
    """Another starting point for each client."""
    generator = torch.Generator().manual_seed(1000 + client)
    return {
        key: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for key, value in values.items()
    }


def build(name, *, full=False, dtype=torch.float32):
    """The plain model and its plan."""
    make, shape, targets = MODELS[name]
    torch.manual_seed(5)
    model = make().to(dtype)
    return model, plan_full(model) if full else plan_adapter(model, 2, 3.0, targets), shape


def cohort_of(model, plan, layout=None):
    layout = layout or Layout(2, plan.scale)
    functional = FunctionalModel(model, plan.layers, layout, plan.dense_leaves)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return functional, {name: state[name] for name in functional.base_keys}


def tasks_of(values, shape, *, counts=COUNTS, phases=None, dtype=torch.float32, **more):
    phases = phases or (Phase(tuple(values), 3),)
    return [
        LocalTask(near(values, client), phases, samples(shape, count, client, dtype), seed=50 + client, **more)
        for client, count in enumerate(counts)
    ]


def assert_same(result, values, loss, tolerance, loss_tolerance=None):
    assert list(result.values) == list(values)
    for key, value in values.items():
        torch.testing.assert_close(
            result.values[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert result.loss == pytest.approx(loss, rel=loss_tolerance or tolerance)


# Networks with ReLUs are in double precision alone: rounding decides on which side of the kink an activation is.
CASES = [
    (name, optimisation, dtype)
    for name in MODELS
    for optimisation in (("all", "adamw") if name == "resnet" else OPTIMISATIONS)
    for dtype in ((torch.float64,) if name in ("cnn", "resnet") else (torch.float64, torch.float32))
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("full", [False, True], ids=["pairs", "full"])
@pytest.mark.parametrize(("name", "optimisation", "dtype"), CASES)
def test_it_is_what_each_client_does_by_itself(name, optimisation, full, dtype):
    model, plan, shape = build(name, full=full, dtype=dtype)
    functional, base = cohort_of(model, plan)
    adapted = AdaptedModel(copy.deepcopy(model), plan)
    tasks = tasks_of(adapted.read_trainables(), shape, dtype=dtype)
    one = OPTIMISATIONS[optimisation]
    if name == "cnn":
        one = replace(one, learning_rate=one.learning_rate / 10)  # else it diverges
    results = [*train_cohort(functional, base, tasks, one, CPU), *train_cohort(functional, base, tasks[:1], one, CPU)]
    for task, result in zip((*tasks, tasks[0]), results, strict=True):
        adapted.write_trainables(task.values)
        order = torch.Generator().manual_seed(task.seed)
        loss = train_locally(adapted.module, task.samples, one, order, CPU)  # which sums in float32
        assert_same(result, adapted.read_trainables(), loss, TOLERANCE[dtype], loss_tolerance=1e-5)
        assert result.mean_gradients is None
        assert result.silent == ()


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
def test_mixed_precision_is_near_and_keeps_everything_in_float32(name):
    model, plan, shape = build(name)
    functional, base = cohort_of(model, plan)
    adapted = AdaptedModel(copy.deepcopy(model), plan)
    tasks = tasks_of(adapted.read_trainables(), shape)
    exact, mixed = how(learning_rate=0.05), how(learning_rate=0.05, precision="bfloat16")
    expected = train_cohort(functional, base, tasks, exact, CPU)
    together = train_cohort(functional, base, tasks, mixed, CPU)
    alone_ = train_cohort(functional, base, tasks, mixed, CPU, max_bytes=1)
    for task, *results in zip(tasks, expected, together, alone_, strict=True):
        adapted.write_trainables(task.values)
        order = torch.Generator().manual_seed(task.seed)
        loss = train_locally(adapted.module, task.samples, mixed, order, CPU)
        by_peft = adapted.read_trainables()
        for key, value in results[0].values.items():
            moved = (value - task.values[key]).norm()
            for other in (results[1].values[key], results[2].values[key], by_peft[key]):
                assert other.dtype == torch.float32
                assert (other - value).norm() <= 0.1 * moved + 1e-6, key
        assert any(not torch.equal(results[0].values[key], results[1].values[key]) for key in task.values)
        assert [one.loss for one in results] == pytest.approx([loss] * 3, rel=0.06)


def alone(model, plan, layout, base, task, optimisation):
    """One client by itself: values, loss and mean gradients."""
    values = {key: value.clone() for key, value in task.values.items()}
    order = torch.Generator().manual_seed(task.seed)
    loss_of_first, means = None, None
    for number, phase in enumerate(task.phases):
        leaves = {key: values[key].requires_grad_() for key in phase.keys}
        if optimisation.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                leaves.values(),
                optimisation.learning_rate,
                betas=(optimisation.momentum, 0.999),
                weight_decay=optimisation.weight_decay,
            )
        else:
            optimizer = torch.optim.SGD(
                leaves.values(),
                optimisation.learning_rate,
                momentum=optimisation.momentum,
                weight_decay=optimisation.weight_decay,
            )
        raw = []
        for _ in range(phase.epochs):
            total = 0.0
            for chosen in batches(len(task.samples), optimisation.batch_size, order, no_single=False):
                outputs = functional_call(model, effective(plan, layout, values, base), (task.samples.inputs[chosen],))
                loss = nn.functional.cross_entropy(outputs, task.samples.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                total += loss.item() * len(chosen)
                raw.append({key: leaf.grad.clone() for key, leaf in leaves.items()})
                with torch.no_grad():
                    for key, leaf in leaves.items():
                        if number == 0:
                            leaf.grad += task.proximal_mu * (leaf - task.values[key])
                            leaf.grad += 0.0 if task.control is None else task.control[key]
                if optimisation.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(list(leaves.values()), optimisation.max_grad_norm)
                optimizer.step()
        if number == 0:
            loss_of_first = total / len(task.samples)
            means = {key: sum(one[key] for one in raw) / len(raw) for key in leaves}
        values = {key: value.detach() for key, value in values.items()}
    return values, loss_of_first, means


LAYOUTS = {
    "pair": Layout(3, 0.7),
    "nested": Layout(2, 1.5, nested_rank=1, nested_scale=0.6),
    "personal": Layout(2, 1.5, personal_rank=3, personal_scale=0.4),
    "loha": Layout(2, 1.5, family="loha"),
}


def zeros_of(plan, layout, model):
    """Values to start near: zero adapters, the model's dense leaves."""
    adapters = {key: torch.zeros(shape) for layer in plan.layers for key, shape in shapes(layer, layout)}
    state = model.state_dict()
    dtype = next(iter(state.values())).dtype
    return {key: value.to(dtype) for key, value in adapters.items()} | {n: state[n] for n in plan.dense_leaves}


@pytest.mark.parametrize("kind", ["plain", "prox", "control", "phases", "all", "adamw"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_methods_with_more_to_train_and_correct(name, layout, kind, dtype):
    tolerance = TOLERANCE[dtype]
    model, plan, shape = build(name, dtype=dtype)
    functional, base = cohort_of(model, plan, layout)
    values = zeros_of(plan, layout, model)
    keys = tuple(values)
    optimisation = OPTIMISATIONS["adamw" if kind == "adamw" else "all"]
    phases = (Phase(keys[::2], 2), Phase(keys[1:3], 1)) if kind in ("phases", "all", "adamw") else (Phase(keys, 2),)
    tasks = tasks_of(values, shape, phases=phases, dtype=dtype)
    if kind in ("prox", "all", "adamw"):
        tasks = [replace(task, proximal_mu=0.5) for task in tasks]
    if kind in ("control", "all", "adamw"):
        zeros = {key: torch.zeros_like(values[key]) for key in phases[0].keys}
        tasks = [replace(task, control=near(zeros, 77 + client)) for client, task in enumerate(tasks)]
    results = train_cohort(functional, base, tasks, optimisation, CPU)
    by_itself = train_cohort(functional, base, tasks[:1], optimisation, CPU)  # all that it trains as one tensor
    for task, result in zip((*tasks, tasks[0]), (*results, *by_itself), strict=True):
        wanted, loss, means = alone(model, plan, layout, base, task, optimisation)
        assert_same(result, wanted, loss, tolerance)
        if task.control is None:
            assert result.mean_gradients is None
        else:
            assert result.mean_gradients is not None
            assert list(result.mean_gradients) == list(means)
            for key, mean in means.items():
                torch.testing.assert_close(result.mean_gradients[key], mean, rtol=tolerance, atol=tolerance)
        for key in set(keys) - {key for phase in phases for key in phase.keys}:
            assert torch.equal(result.values[key], task.values[key])


def small_cohort(dtype=torch.float64, **more):
    model, plan, shape = build("conv", dtype=dtype)
    functional, base = cohort_of(model, plan)
    values = zeros_of(plan, Layout(2, plan.scale), model)
    return functional, base, tasks_of(values, shape, dtype=dtype, **more)


def test_the_tasks_are_not_written_to():
    functional, base, tasks = small_cohort()
    before = copy.deepcopy((base, [task.values for task in tasks]))
    train_cohort(functional, base, tasks, how(), CPU)
    for key, value in before[0].items():
        assert torch.equal(value, base[key])
    for old, task in zip(before[1], tasks, strict=True):
        assert all(torch.equal(value, task.values[key]) for key, value in old.items())


def test_the_size_of_the_groups_does_not_matter(monkeypatch):
    functional, base, tasks = small_cohort()
    sizes = []
    original = cohort._Group.train
    monkeypatch.setattr(cohort._Group, "train", lambda self: sizes.append(len(self._tasks)) or original(self))
    whole = train_cohort(functional, base, tasks, OPTIMISATIONS["all"], CPU)
    one = cohort._bytes_of_one(functional, base, tasks[2], 4, CPU)
    halves = train_cohort(functional, base, tasks, OPTIMISATIONS["all"], CPU, max_bytes=3 * one)
    singles = train_cohort(functional, base, tasks, OPTIMISATIONS["all"], CPU, max_bytes=1)
    assert sizes == [5, 2, 3, 1, 1, 1, 1, 1]
    for results in (halves, singles):
        for result, other in zip(results, whole, strict=True):
            assert_same(result, other.values, other.loss, 1e-12)


def test_the_memory_of_one_client_counts_values_and_what_the_backward_pass_needs():
    functional, base, tasks = small_cohort()
    values = sum(value.nbytes for value in tasks[2].values.values())
    sizes = (1, 4, 7)
    small, medium, large = (cohort._bytes_of_one(functional, base, tasks[2], size, CPU) for size in sizes)
    assert small > 6 * values
    assert medium - small > 2 * 3 * tasks[2].samples.inputs[0].nbytes
    assert large - medium == pytest.approx(medium - small, rel=0.2)  # beside the values, it grows with the samples


@pytest.mark.parametrize("name", MODELS)
def test_a_second_time_gives_the_same_bits(name):
    model, plan, shape = build(name)
    functional, base = cohort_of(model, plan)
    tasks = tasks_of(zeros_of(plan, Layout(2, plan.scale), model), shape)
    runs = [train_cohort(functional, base, tasks, OPTIMISATIONS["all"], CPU) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert one.loss == other.loss
        assert all(torch.equal(value, other.values[key]) for key, value in one.values.items())


def test_global_generators_are_neither_used_nor_disturbed():
    functional, base, tasks = small_cohort()
    state = torch.get_rng_state()
    one = train_cohort(functional, base, tasks, how(), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    other = train_cohort(functional, base, tasks, how(), CPU)
    assert all(torch.equal(value, other[0].values[key]) for key, value in one[0].values.items())


def test_finished_clients_leave_the_batch(monkeypatch):
    functional, base, tasks = small_cohort(phases=(Phase(("2.lora_B",), 2),))
    seen = []
    original = functional._compute

    def compute(x, clients, **more):
        seen.append((clients or 1, len(x) // (clients or 1)))
        return original(x, clients, **more)

    train_cohort(functional, base, tasks, how(), CPU)  # with the trials of a first time
    monkeypatch.setattr(functional, "_compute", compute)
    train_cohort(functional, base, tasks, how(), CPU)
    # Steps 10, 6, 4, 2 and 2; the fifth of the largest client has one sample.
    assert seen == [(5, 4), (5, 4), (3, 4), (3, 4), (2, 4), (2, 4), (1, 4), (1, 4), (1, 4), (1, 1)]


def test_batches_are_only_as_wide_as_the_largest_client():
    functional, base, tasks = small_cohort(counts=(3, 2))
    for size in (4, 64):
        (big, small) = train_cohort(functional, base, tasks, how(batch_size=size), CPU)
        (exact, also) = train_cohort(functional, base, tasks, how(batch_size=3), CPU)
        assert_same(big, exact.values, exact.loss, 1e-12)
        assert_same(small, also.values, also.loss, 1e-12)


def test_one_clients_bad_numbers_stay_its_own():
    functional, base, tasks = small_cohort()
    optimisation = OPTIMISATIONS["all"]
    good = train_cohort(functional, base, tasks, optimisation, CPU)
    bad = replace(tasks[1], values={key: value * float("nan") for key, value in tasks[1].values.items()})
    mixed = train_cohort(functional, base, [tasks[0], bad, *tasks[2:]], optimisation, CPU)
    assert torch.isnan(mixed[1].values["2.lora_A"]).all()
    for client in (0, 2, 3, 4):
        assert_same(mixed[client], good[client].values, good[client].loss, 1e-12)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        """Passes one layer by."""
        return self.out(torch.tanh(self.used(x)))


def test_layers_without_gradient_are_told_and_left_as_they_are():
    model = Unused()
    plan = plan_adapter(model, 2, 3.0, "used,unused")
    functional, base = cohort_of(model, plan)
    values = zeros_of(plan, Layout(2, plan.scale), model)
    tasks = tasks_of(values, (6,))
    for task, result in zip(tasks, train_cohort(functional, base, tasks, OPTIMISATIONS["all"], CPU), strict=True):
        assert result.silent == ("unused",)
        assert torch.equal(result.values["unused.lora_A"], task.values["unused.lora_A"])
        assert not torch.equal(result.values["used.lora_A"], task.values["used.lora_A"])
    frozen = tasks_of(values, (6,), phases=(Phase(("out.weight",), 1), Phase(("used.lora_B",), 1)))
    assert train_cohort(functional, base, frozen, how(), CPU)[0].silent == (), "nothing of that layer is trained"


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.calls = 0

    def forward(self, x):
        """Leaves a layer out from the third call on."""
        self.calls += 1
        y = torch.tanh(self.always(x))
        return self.out(self.first(y) if self.calls <= 2 else y)


@pytest.mark.parametrize("optimisation", ["all", "adamw"])
def test_what_gets_no_gradient_any_more_is_not_stepped_any_more(optimisation):
    model = Skipping().double()
    plan = plan_full(model)
    functional, base = cohort_of(model, plan)
    adapted = AdaptedModel(copy.deepcopy(model), plan)
    (task,) = tasks_of(adapted.read_trainables(), (6,), counts=(9,), dtype=torch.float64)
    one = OPTIMISATIONS[optimisation]
    (result,) = train_cohort(functional, base, [task], one, CPU)
    adapted.write_trainables(task.values)
    adapted.module.calls = 0
    loss = train_locally(adapted.module, task.samples, one, torch.Generator().manual_seed(task.seed), CPU)
    assert_same(result, adapted.read_trainables(), loss, 1e-9, loss_tolerance=1e-5)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))

    def forward(self, x):
        """Rescales logits with numbers of another precision."""
        return self.out(x) * self.scale.to(x)


def test_a_client_alone_may_train_tensors_of_two_precisions():
    model = Scaled()
    functional, base = cohort_of(model, plan_full(model))
    values = {name: value.detach() for name, value in model.named_parameters()}
    task = LocalTask(values, (Phase(tuple(values), 2),), samples((6,), 9, 0), seed=3)
    (result,) = train_cohort(functional, base, [task], OPTIMISATIONS["all"], CPU)
    reference = copy.deepcopy(model)
    order = torch.Generator().manual_seed(3)
    loss = train_locally(reference, task.samples, replace(OPTIMISATIONS["all"], epochs=2), order, CPU)
    assert_same(result, dict(reference.named_parameters()), loss, 1e-5)


def test_no_clients_give_no_results():
    functional, base, _ = small_cohort()
    assert train_cohort(functional, base, [], how(), CPU) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda task: replace(task, values={**task.values, "2.lora_A": torch.zeros(1)}), "must agree in values"),
        (lambda task: replace(task, phases=(Phase(("2.lora_B",), 1),)), "must agree in phases"),
        (lambda task: replace(task, proximal_mu=1.0), "must agree in proximal_mu: 0.0 and 1.0"),
        (lambda task: replace(task, control={}), "must agree in control"),
        (lambda task: replace(task, samples=samples((1, 8, 8), 0, 0)), "no samples"),
    ],
)
def test_tasks_that_do_not_agree_are_refused(change, match):
    functional, base, tasks = small_cohort()
    with pytest.raises(ValueError, match=match):
        train_cohort(functional, base, [*tasks[:-1], change(tasks[-1])], how(), CPU)


def test_tensors_that_are_not_the_models_are_refused():
    functional, base, tasks = small_cohort()
    with pytest.raises(ValueError, match=r"the base lacks 0\.weight"):
        train_cohort(functional, {k: v for k, v in base.items() if k != "0.weight"}, tasks, how(), CPU)
    odd = [replace(task, values={**task.values, "more": torch.zeros(1)}) for task in tasks]
    with pytest.raises(ValueError, match="more only on one side"):
        train_cohort(functional, base, odd, how(), CPU)


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        """Counts."""
        self.calls += 1
        return super().forward(x)


class Wrapped(nn.Module):
    """A model of one function."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        """The function of a linear layer's outputs."""
        return self.function(self.fc(x))


def branch(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "1: batch normalisation"),
        (nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)), "batch normalisation"),
        (nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True)), "running statistics"),
        (nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), r"dropout draws at random \(p = 0.5\)"),
        (nn.LSTM(6, 6), "LSTM: a recurrent layer"),
        (nn.Embedding(6, 6, sparse=True), "sparse"),
        (nn.Embedding(6, 6, max_norm=1.0), "renormalised"),
        (nn.Embedding(6, 6, scale_grad_by_freq=True), "rescaled"),
        (nn.Linear(6, 6).half(), r"dtype is torch\.float16"),
        (nn.LazyLinear(6), "not initialised"),
        (Counting(), "changes buffers"),
        (Wrapped(branch), "cannot be batched: .*vmap"),
        (Wrapped(lambda x: nn.functional.dropout(x, 0.5)), "cannot be batched: .*random"),
        (Wrapped(lambda x: x - x.mean(0)), "depend on the batch"),
        (Wrapped(lambda x: torch.from_numpy(x.detach().numpy()) + x), "cannot be batched"),
    ],
)
def test_why_a_model_cannot_be_batched(module, match):
    before = copy.deepcopy(module.state_dict()) if not isinstance(module, nn.LazyLinear) else {}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    reason = obstacle(module, torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    assert reason is not None
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert re.search(match, reason), reason
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items() if before)


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_can_be_batched(name):
    model, _, shape = build(name)
    model.eval()
    assert obstacle(model) is None
    assert obstacle(model, samples(shape, 4, 0).inputs) is None
    assert not model.training


def test_dropout_that_is_off_and_attention_can_be_batched():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert obstacle(nn.Sequential(layer, nn.Dropout(0.0), nn.Flatten()), torch.randn(3, 4, 8)) is None


def test_an_active_layer_is_found_without_inputs():
    assert obstacle(nn.Sequential(mlp(), nn.Dropout(0.1))) is not None


def test_fewer_clients_fit_where_a_step_keeps_more_and_one_where_none_can_be_batched():
    x = torch.randn(16, 1, 8, 8)
    wide = NetworkFactory("resnet10", (1, 8, 8), CLASSES, width=64)()
    fits = [cohort.clients_that_fit(module, inputs, CPU) for module, inputs in ((cnn(), x), (cnn(), x[:4]), (wide, x))]
    assert fits[1] == pytest.approx(4 * fits[0], rel=0.4)
    assert fits[1] > fits[0] > 25 > fits[2] >= 1
    assert cohort.clients_that_fit(NetworkFactory("resnet10", (1, 8, 8), CLASSES, norm="batch")(), x, CPU) == 1
