"""Every rival of the benchmark trains the same clients in the same way: a figure of other work would mean nothing."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import workloads
from benchmarks.measuring import Measured, Rival, RivalFailedError, check_same_work
from benchmarks.plain_layers import FORMS
from benchmarks.prepared import Prepared, trained
from benchmarks.rivals import bare, central, drop_in
from benchmarks.rivals.report import Report, Task, Unavailable
from fedloru_flwr.clients.training import train_locally
from fedloru_flwr.config import RunConfig
from fedloru_flwr.data import Samples, load_client
from fedloru_flwr.models import plan_model
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.workload import data_config, local_optimisation

PLAIN_APP = Path(__file__).parents[2] / "benchmarks" / "plain_flower"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return workloads.DIGITS.prepare(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def plain_app(monkeypatch):
    monkeypatch.syspath_prepend(str(PLAIN_APP))
    from plain_flower import task

    return task


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_values(prepared):
    """Values to train from, of every key: A random, B not zero, dense leaves as built."""
    noise = torch.Generator().manual_seed(3)
    values = {}
    for name, parameter in trained(bare.Loop(prepared, "pair").model).items():
        value = parameter.detach().clone()
        values[name] = 0.1 * torch.randn(value.shape, generator=noise) if "lora" in name else value
    return values


def like(name, value):
    """PEFT's name and shape to the plain layers'."""
    plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
    return plain.replace(".base_layer", ""), value.detach().flatten(1) if plain.endswith("lora_B") else value.detach()


def by_bare_loop(prepared, form, values):
    loop = bare.Loop(prepared, form)
    names = list(trained(loop.model))
    loop.client(5, torch.cat([values[name].flatten() for name in names]))
    return {name: parameter.detach() for name, parameter in trained(loop.model).items()}


def by_plain_app(task, path, prepared, values):
    model = task.get_model(str(path))
    received = {name: values[like(name, parameter)[0]].view_as(parameter) for name, parameter in trained(model).items()}
    task.set_weights(model, received)
    task.train(model, prepared, 5)
    return dict(like(name, parameter) for name, parameter in trained(model).items())


def by_this_package(prepared, values):
    config = RunConfig.from_mapping(workloads.DIGITS.settings)
    module = prepared.factory()
    plan = plan_model(module, "factors", config.rank, config.alpha, config.target_modules, "all")
    adapted = AdaptedModel(module, plan)
    adapted.write_values({key: values[key].view_as(value) for key, value in adapted.read_values().items()})
    client, _ = load_client(data_config(config), 5)
    train_locally(adapted.module, client.train, local_optimisation(config, 1), torch.Generator(), torch.device("cpu"))
    return dict(like(key, value) for key, value in adapted.read_values().items())


def test_all_train_a_client_to_the_same_values(digits, plain_app):
    prepared = Prepared.load(digits)
    values = start_values(prepared)
    expected = by_this_package(prepared, values)
    others = [by_bare_loop(prepared, form, values) for form in FORMS]
    others.append(by_plain_app(plain_app, digits, prepared, values))
    for other in others:
        assert set(other) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)
            assert not torch.equal(value, values[name])  # it was trained


def test_the_rivals_have_the_clients_samples(digits):
    prepared, config = Prepared.load(digits), RunConfig.from_mapping(workloads.DIGITS.settings)
    for number in (0, 57, 99):
        client, _ = load_client(data_config(config), number)
        inputs, labels = prepared.client(number)
        assert torch.equal(inputs, client.train.inputs)
        assert torch.equal(labels, client.train.labels)


def test_the_digits_are_one_batch_of_eight_for_five_epochs(digits):
    prepared = Prepared.load(digits)
    assert {prepared.steps(number) for number in range(100)} == {5}
    assert {len(prepared.client(number)[1]) for number in range(100)} == {8}
    assert prepared.training.clients_per_round == 50


def test_the_bare_loops_sum_over_a_round_is_that_over_its_processes_shares(digits):
    prepared = Prepared.load(digits)
    small = dataclasses.replace(prepared.training, clients_per_round=3)
    prepared = dataclasses.replace(prepared, training=small)
    loop = bare.Loop(prepared, "pair")
    received = loop.start()
    sums, total = loop.cohort(prepared.cohort(0), received)
    parts = [loop.cohort(numbers, received) for numbers in (range(0, 1), range(1, 3))]
    assert total == sum(weight for _, weight in parts) == 24
    torch.testing.assert_close(sums, parts[0][0] + parts[1][0])


def test_the_centralised_steps_are_as_many_as_a_clients_and_see_all_samples(digits):
    report = central.measure(Task(str(digits), rounds=1, warm_up=0))
    assert (report.steps, report.samples, report.trainable) == (5, 400, 5322)


def test_the_drop_in_session_trains_what_the_bare_loop_trains(tmp_path):
    prepared = workloads.language_model(clients=4, sequences=2, length=8)
    path = tmp_path / "tiny.pt"
    prepared.save(path)
    ours = drop_in.measure(Task(str(path), rounds=1, warm_up=0))
    rival = bare.measure(Task(str(path), rounds=1, warm_up=0))
    check_same_work([Measured(Rival("a", "a", "m"), [ours]), Measured(Rival("b", "b", "m"), [rival])])


def test_the_language_models_labels_are_the_next_bytes():
    prepared = workloads.language_model(clients=4, sequences=2, length=8)
    assert torch.equal(prepared.inputs.flatten()[1:], prepared.labels.flatten()[:-1])
    assert {len(prepared.client(number)[1]) for number in range(4)} == {2}


@pytest.mark.parametrize("clients", [10, 30])
def test_clients_of_a_cohort_of_any_size_have_one_batch_of_eight(tmp_path, clients):
    workload = workloads.cohort_of(clients, tmp_path)
    prepared = workloads.from_settings(workload.name, workload.settings)
    assert {len(prepared.client(number)[1]) for number in range(clients)} == {8}
    assert prepared.inputs.shape[1:] == (1, 8, 8)
    assert prepared.training.clients_per_round == clients


def test_a_rival_that_does_other_work_is_refused():
    report = Report(rounds=[1.0], threads=1, processes=1, clients=50, steps=5, samples=400, trainable=10)
    less = dataclasses.replace(report, steps=4)
    with pytest.raises(RivalFailedError, match=r"lazy did .*'steps': 4"):
        check_same_work([Measured(Rival("a", "a", "m"), [report]), Measured(Rival("b", "lazy", "m"), [less])])


def test_a_report_survives_its_line_and_a_refusal_its_reason():
    report = Report([0.5], 1, 2, 50, 5, 400, 10, "pair", {"peak": 1.5})
    assert Report.find(f"noise\n{report.line()}\n") == report
    with pytest.raises(Unavailable, match="no such setting"):
        Report.find("UNAVAILABLE no such setting\n")


def test_prepared_samples_are_those_that_were_saved(tmp_path):
    prepared = workloads.language_model(clients=2, sequences=2, length=4)
    prepared.save(tmp_path / "one.pt")
    loaded = Prepared.load(tmp_path / "one.pt")
    assert loaded.factory == prepared.factory
    assert loaded.training == prepared.training
    assert Samples(*loaded.client(1)).inputs.tolist() == prepared.client(1)[0].tolist()
