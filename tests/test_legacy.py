"""Legacy projects: a NumPyClient around the session's model, a legacy strategy as the inner one."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server import Server, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server import strategy as legacy
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError
from torch import nn

from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.legacy import LegacyStrategy, from_legacy, legacy_client_app, legacy_server_app
from fedloru_flwr.strategies import FedLoRU

CLIENTS = 4


@pytest.fixture(autouse=True)
def surroundings(fresh_process):
    """What every test here has."""


class Net(nn.Module):
    """Batch normalisation, so that there are statistics and counters too."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.hidden(x))))


def get_weights(net):
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, parameters):
    net.load_state_dict({k: torch.tensor(v) for k, v in zip(net.state_dict(), parameters, strict=True)}, strict=True)


def samples(client):
    generator = torch.Generator().manual_seed(client)
    return torch.randn(20 + client, 12, generator=generator), torch.randint(3, (20 + client,), generator=generator)


class Flower(NumPyClient):
    def __init__(self, net, client):
        self.net, self.data = net, samples(client)

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        self.descend(config.get("lr", 0.1))
        return get_weights(self.net), len(self.data[0]), {"train_loss": 0.5}

    def descend(self, rate):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=rate)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(self.data[0]), self.data[1]).backward()
            optimizer.step()

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        loss = nn.functional.cross_entropy(self.net(self.data[0]), self.data[1])
        return loss.item(), len(self.data[0]), {"accuracy": 0.25}


class Deployment:
    """A legacy project on both adapters, and what was seen of it."""

    def __init__(self, client=Flower, net=Net, mods=None, **keywords):
        self.client, self.net, self.mods, self.keywords = client, net, mods, keywords
        self.strategy = None

    def run(self, given=None, rounds=2, options=None, factory=FedLoRU):
        def client_fn(context, net):
            return self.client(net, context.node_config["partition-id"]).to_client()

        def server_fn(context):
            return ServerAppComponents(strategy=given, config=ServerConfig(num_rounds=rounds))

        def build(model, **arguments):
            self.strategy = factory(model, **arguments)
            return self.strategy

        keywords = {"rank": 2, "accumulate_every": 1, **self.keywords}
        server = legacy_server_app(server_fn, build, self.net, options=options, **keywords)
        client = legacy_client_app(client_fn, self.net, mods=self.mods)
        run_in_process(server, client, num_supernodes=CLIENTS)
        return self.strategy


def test_a_project_runs_as_the_message_api_would_run_it(tmp_path, rows_of, quick_books):
    """The same model as an app of `LowRankSession` with FedAvg inside."""
    given = legacy.FedAvg(min_available_clients=CLIENTS, on_fit_config_fn=lambda server_round: {"lr": 0.1})
    ours = Deployment(run_dir=tmp_path / "legacy").run(given, rounds=3).merged_state_dict()

    app, server = ClientApp(), ServerApp()

    @app.train()
    def train(msg, context):
        session = LowRankSession(Net, msg, context)
        client = Flower(session.model, context.node_config["partition-id"])
        client.descend(0.1)
        return session.reply({"train_loss": 0.5, "num-examples": len(client.data[0])})

    kept = {}

    @server.main()
    def main(grid, context):
        kept["strategy"] = strategy = FedLoRU(Net, rank=2, accumulate_every=1, min_available_nodes=CLIENTS)
        strategy.start(grid, strategy.initial_arrays(), num_rounds=3)

    run_in_process(server, app, num_supernodes=CLIENTS)
    theirs = kept["strategy"].merged_state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)  # NumPy sums in another order
    told = rows_of(tmp_path / "legacy")
    assert [(row["clients_ok"], row["clients_failed"]) for row in told] == [(CLIENTS, 0)] * 3
    assert [row["train_loss"] for row in told] == [0.5] * 3
    assert told[-1]["accuracy"] == 0.25
    assert 0 < told[-1]["loss"] < told[0]["loss"]
    assert all("base" not in row["bytes_by_purpose"] and "repeats" not in row["bytes_by_purpose"] for row in told)


def test_the_projects_functions_are_called_as_the_legacy_server_calls_them():
    seen = {"configs": [], "fit": [], "evaluated": [], "metrics": []}

    class Watching(Flower):
        def fit(self, parameters, config):
            seen["configs"].append(config)
            assert [p.shape for p in parameters] == [p.shape for p in get_weights(self.net)]
            return super().fit(parameters, config)

        def evaluate(self, parameters, config):
            assert config["batches"] == 7
            return super().evaluate(parameters, config)

    def evaluate(server_round, parameters, config):
        net = Net()
        set_weights(net, parameters)  # the whole model, under its own names
        seen["evaluated"].append(server_round)
        return np.float64(1.5), {"accuracy": 0.5, "note": "a text"}

    def average(metrics):
        seen["metrics"].append(sorted(count for count, _ in metrics))
        return {"accuracy": 0.75}

    given = legacy.FedAvg(
        fraction_fit=0.5,
        fraction_evaluate=1.0,
        on_fit_config_fn=lambda server_round: {"lr": 0.1 / server_round, "note": "hello"},
        on_evaluate_config_fn=lambda server_round: {"batches": 7},
        evaluate_fn=evaluate,
        evaluate_metrics_aggregation_fn=average,
        min_available_clients=CLIENTS,
    )
    strategy = Deployment(client=Watching).run(given)
    assert [config["lr"] for config in seen["configs"]] == [0.1] * 2 + [0.05] * 2
    assert {config["note"] for config in seen["configs"]} == {"hello"}
    assert [config["server-round"] for config in seen["configs"]] == [1, 1, 2, 2]
    assert all(not name.startswith("fedloru") for config in seen["configs"] for name in config)
    assert seen["evaluated"] == [0, 1, 2]
    assert seen["metrics"] == [[20, 21, 22, 23]] * 2
    result = strategy.books.result
    assert result.evaluate_metrics_serverapp[2] == {"loss": 1.5, "accuracy": 0.5}
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.75


def test_get_parameters_says_what_the_parameters_are():
    class Ordered(Flower):
        def get_parameters(self, config):
            return [p.detach().numpy() for p in self.net.parameters()]

        def fit(self, parameters, config):
            with torch.no_grad():
                for mine, given in zip(self.net.parameters(), parameters, strict=True):
                    mine.copy_(torch.tensor(given))
            self.descend(0.1)
            return self.get_parameters({}), len(self.data[0]), {}

    given = legacy.FedAvg(fraction_evaluate=0.0, min_available_clients=CLIENTS)
    assert Deployment(client=Ordered).run(given).state.ledger.version == 2


def test_replaced_parameters_are_as_good_as_written_ones(tmp_path, rows_of, quick_books):
    class Replacing(Flower):
        def fit(self, parameters, config):
            for (name, mine), given in zip(self.net.state_dict(keep_vars=True).items(), parameters, strict=True):
                mine.data = torch.tensor(given)
                assert name
            self.descend(0.1)
            return get_weights(self.net), len(self.data[0]), {}

    given = legacy.FedAvg(fraction_evaluate=0.0, min_available_clients=CLIENTS)
    Deployment(client=Replacing, run_dir=tmp_path).run(given)
    assert [row["clients_failed"] for row in rows_of(tmp_path)] == [0, 0]


def failures(client, tmp_path, rows_of):
    """Why every client of a round was left out."""
    given = legacy.FedAvg(fraction_evaluate=0.0, min_available_clients=CLIENTS)
    Deployment(client=client, run_dir=tmp_path, max_failure_fraction=1.0).run(given, rounds=1)
    return set(rows_of(tmp_path)[-1]["failures"].values())


def test_a_client_with_a_model_of_its_own_is_refused(tmp_path, rows_of, quick_books):
    class Stubborn(Flower):
        def __init__(self, net, client):
            super().__init__(Net(), client)

        def fit(self, parameters, config):
            self.descend(0.1)
            return get_weights(self.net), len(self.data[0]), {}

    (reason,) = failures(Stubborn, tmp_path, rows_of)
    assert "fit returned 9 arrays, the model it was given has" in reason
    assert "client_fn receives as its second argument" in reason


def test_parameters_that_fit_changes_on_their_way_out_are_refused(tmp_path, rows_of, quick_books):
    class Noisy(Flower):
        def fit(self, parameters, config):
            arrays, count, metrics = super().fit(parameters, config)
            return [arrays[0] + 1, *arrays[1:]], count, metrics

    (reason,) = failures(Noisy, tmp_path, rows_of)
    assert "1 of them other than the model's" in reason


def test_a_loop_that_trains_frozen_parameters_is_refused(tmp_path, rows_of, quick_books):
    class Greedy(Flower):
        def fit(self, parameters, config):
            set_weights(self.net, parameters)
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.add_(0.1)
            return get_weights(self.net), len(self.data[0]), {}

    (reason,) = failures(Greedy, tmp_path, rows_of)
    assert "has trained parameters that are frozen in this run: hidden.weight" in reason


def test_a_status_that_is_not_ok_is_a_failure_with_its_message(tmp_path, rows_of, quick_books):
    class Unready(Client):
        def __init__(self, net, client):
            pass

        def fit(self, ins):
            status = Status(
                Code.FIT_NOT_IMPLEMENTED if ins.config.get("x") else Code.GET_PARAMETERS_NOT_IMPLEMENTED, "no data yet"
            )
            return FitRes(status, Parameters([], ""), 0, {})

    (reason,) = failures(Unready, tmp_path, rows_of)
    assert "fit says GET_PARAMETERS_NOT_IMPLEMENTED: no data yet" in reason


def test_without_an_evaluate_method_federated_evaluation_switches_itself_off(tmp_path, rows_of, quick_books):
    class Training(NumPyClient):
        def __init__(self, net, client):
            self.inner = Flower(net, client)

        def fit(self, parameters, config):
            return self.inner.fit(parameters, config)

    strategy = Deployment(client=Training, run_dir=tmp_path).run(legacy.FedAvg(min_available_clients=CLIENTS))
    assert strategy.books.result.evaluate_metrics_clientapp == {}
    assert rows_of(tmp_path)[-1]["clients_ok"] == CLIENTS


def test_client_fn_must_take_the_model():
    with pytest.raises(TypeError, match=r"client_fn takes \(context\), expected \(context, net\).*second argument"):
        legacy_client_app(lambda context: None, Net)


def test_what_client_fn_returns_must_be_a_client(tmp_path, rows_of, quick_books):
    class Odd:
        def __init__(self, net, client):
            pass

        def to_client(self):
            return "a client"

    (reason,) = failures(Odd, tmp_path, rows_of)
    assert "client_fn returned str, expected a NumPyClient or its to_client()" in reason


def test_initial_parameters_become_the_first_model_and_travel_once(tmp_path, rows_of, quick_books):
    torch.manual_seed(5)
    mine = Net()
    given = legacy.FedAvg(
        fraction_evaluate=0.0,
        min_available_clients=CLIENTS,
        initial_parameters=ndarrays_to_parameters(get_weights(mine)),
    )
    seen = []

    def watching(model, **arguments):
        strategy = FedLoRU(model, **arguments)
        seen.append(strategy.merged_state_dict())
        return strategy

    Deployment(run_dir=tmp_path).run(given, factory=watching)
    assert all(torch.allclose(seen[0][name], value) for name, value in mine.state_dict().items())
    base = [row["bytes_by_purpose"].get("base", {"down": 0})["down"] for row in rows_of(tmp_path)]
    assert base[0] > 0
    assert base[1:] == [0]
    with pytest.raises(ValueError, match=r"initial_parameters are 1 arrays that do not have the shapes of Net's"):
        from_legacy(FedLoRU, Net, legacy.FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(3)])))


@pytest.mark.parametrize(
    "given",
    [
        legacy.FedMedian(fraction_evaluate=0.0),
        legacy.FedTrimmedAvg(fraction_evaluate=0.0),
        legacy.Krum(fraction_evaluate=0.0),
        legacy.FedProx(fraction_evaluate=0.0, proximal_mu=0.5),
        legacy.FaultTolerantFedAvg(fraction_evaluate=0.0),
    ],
    ids=lambda given: type(given).__name__,
)
def test_averaging_is_that_of_the_legacy_strategy(given):
    seen = []

    class Watching(Flower):
        def fit(self, parameters, config):
            seen.append(config.get("proximal_mu"))
            return super().fit(parameters, config)

    strategy = Deployment(client=Watching).run(given)
    assert strategy.state.ledger.version == 2
    assert set(seen) == {0.5 if isinstance(given, legacy.FedProx) else None}


def test_a_strategy_of_the_projects_own_averages_as_it_says():
    class Halving(legacy.FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            assert sorted(proxy.cid for proxy, _ in results) == sorted({proxy.cid for proxy, _ in results})
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            return parameters if server_round > 1 else None, metrics

    strategy = Deployment().run(Halving(fraction_evaluate=0.0))
    assert strategy.state.ledger.version == 1  # the first round had no result

    class Losing(legacy.FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            return Parameters([], ""), {}

    with pytest.raises(AggregationError, match=r"aggregate_fit of Losing returned 0 arrays, expected the \d+"):
        Deployment().run(Losing(fraction_evaluate=0.0))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (flower.FedAvg(), TypeError, "FedAvg is a strategy of the Message API"),
        (legacy.FedAvg, TypeError, "FedAvg is not derived from"),
        (
            legacy.DifferentialPrivacyClientSideFixedClipping(legacy.FedAvg(), 1.0, 1.0, 2),
            TypeError,
            "Clipping is not derived from flwr.server.strategy.FedAvg.*differential privacy is there too",
        ),
        (
            legacy.FedAdam(initial_parameters=ndarrays_to_parameters([np.zeros(3)])),
            ValueError,
            r"FedAdam keeps moments of whole models.*inner=flwr.serverapp.strategy.FedAdam",
        ),
        (legacy.FedAvgM(), ValueError, "FedAvgM keeps moments"),
        (legacy.QFedAvg(), ValueError, "QFedAvg keeps moments"),
        (legacy.FedXgbBagging(), TypeError, "FedXgbBagging averages trees"),
    ],
    ids=["message-api", "class", "wrapper", "adam", "momentum", "q", "trees"],
)
def test_a_strategy_that_cannot_be_followed_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        LegacyStrategy(given)


def test_participants_that_are_not_treated_alike_are_refused():
    class Favouring(legacy.FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            orders = super().configure_fit(server_round, parameters, client_manager)
            return orders[:1]

    with pytest.raises(ValueError, match="configure_fit of Favouring does not treat all participants alike"):
        Deployment().run(Favouring())

    class Changing(legacy.FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            return super().configure_fit(server_round, Parameters([b"x"], ""), client_manager)

    with pytest.raises(ValueError, match="configure_fit of Changing changes the parameters"):
        Deployment().run(Changing())

    class Choosing(legacy.FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            return [(one, None) for one in client_manager.sample(1, criterion=object())]

    with pytest.raises(ValueError, match="knows no criterion"):
        Deployment().run(Choosing())

    class Calling(legacy.FedAvg):
        def configure_fit(self, server_round, parameters, client_manager):
            next(iter(client_manager.all().values())).get_properties(None, None, None)

    with pytest.raises(RuntimeError, match="messages to clients are sent by the outer strategy"):
        Deployment().run(Calling())


def context(**run_config):
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


@pytest.mark.parametrize(
    ("components", "error", "match"),
    [
        ("nothing", TypeError, "server_fn returned str, expected ServerAppComponents"),
        (ServerAppComponents(server=Server(client_manager=SimpleClientManager())), ValueError, "a server of its own"),
        (ServerAppComponents(client_manager=SimpleClientManager()), ValueError, "a client_manager of its own, Simple"),
    ],
)
def test_what_server_fn_gives_must_be_what_is_used(components, error, match):
    app = legacy_server_app(lambda context: components, FedLoRU, Net)
    with pytest.raises(error, match=match):
        app(None, context())


def test_settings_are_taken_over_and_may_be_given_otherwise():
    given = legacy.FedAvg(
        fraction_fit=0.5, fraction_evaluate=0.25, min_fit_clients=3, min_available_clients=5, accept_failures=False
    )
    strategy = from_legacy(FedLoRU, Net, given, rank=3, fraction_train=0.75)
    assert (strategy.fraction_train, strategy.fraction_evaluate) == (0.75, 0.25)
    assert strategy._at_least == {"train": 3, "evaluate": 2}
    assert (strategy._min_available, strategy.max_failure_fraction, strategy.settings.rank) == (5, 0.0, 3)
    for name in ("inner", "weighted_by_key"):
        with pytest.raises(ValueError, match=f"{name} cannot be given: the legacy strategy FedAvg is the inner one"):
            from_legacy(FedLoRU, Net, given, **{name: None})


def test_options_may_depend_on_the_context():
    options = lambda context: {"rank": 1 + len(context.run_config)}  # noqa: E731
    given = legacy.FedAvg(fraction_evaluate=0.0)
    assert Deployment().run(given, options=options).settings.rank == 1


def test_a_run_of_a_stateless_legacy_strategy_is_continued(tmp_path, quick_books):
    given = {"fraction_evaluate": 0.0, "min_available_clients": CLIENTS}
    Deployment(run_dir=tmp_path / "a").run(legacy.FedAvg(**given), rounds=3)
    Deployment(run_dir=tmp_path / "b").run(legacy.FedAvg(**given), rounds=2)
    Deployment(run_dir=tmp_path / "b", resume="auto").run(legacy.FedAvg(**given), rounds=3)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]


def test_an_evaluation_may_have_nothing_to_say(tmp_path, rows_of, quick_books):
    given = legacy.FedAvg(fraction_evaluate=0.0, evaluate_fn=lambda server_round, parameters, config: None)
    Deployment(run_dir=tmp_path).run(given, rounds=1)
    assert [(row["round"], row["accuracy"], row["loss"]) for row in rows_of(tmp_path)] == [
        (0, None, None),
        (1, None, None),
    ]


def test_fedavg_is_the_default():
    assert Deployment().run(None, rounds=1).state.ledger.version == 1


class CallsItLoss(Flower):
    def evaluate(self, parameters, config):
        """A loss of its own beside the one that it returns, and a truth value."""
        return 2.0, len(self.data[0]), {"loss": 7.0, "is_fine": True}


def test_a_metric_that_the_project_calls_loss_is_not_the_loss():
    seen = []

    def aggregated(found):
        seen.append([metrics for _, metrics in found])
        return {"loss": 9.0, "all_fine": True}

    deployment = Deployment(CallsItLoss)
    strategy = deployment.run(legacy.FedAvg(evaluate_metrics_aggregation_fn=aggregated))
    assert seen[0] == [{"loss": 7.0, "is_fine": 1}] * CLIENTS
    found = strategy.books.result.evaluate_metrics_clientapp
    assert len(found) == 2
    for metrics in found.values():
        assert dict(metrics) == {"loss": 2.0, "all_fine": 1}
