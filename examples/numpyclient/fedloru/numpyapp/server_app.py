"""The ServerApp: a legacy FedAvg."""

from flwr.common import Context
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from fedloru_flwr.legacy import legacy_server_app  # FedLoRU
from fedloru_flwr.strategies import FedLoRU  # FedLoRU
from numpyapp.task import Net, load_test_data, set_weights, test


def weighted_average(metrics):
    """Average the clients' accuracies."""
    total = sum(num_examples for num_examples, _ in metrics)
    return {"accuracy": sum(num_examples * one["accuracy"] for num_examples, one in metrics) / total}


def server_fn(context: Context):
    """Build what the server needs."""
    run = context.run_config
    net, testloader = Net(), load_test_data()

    def evaluate(server_round, parameters, config):
        set_weights(net, parameters)
        loss, accuracy = test(net, testloader, "cpu")
        print(f"round {server_round}: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return loss, {"accuracy": accuracy}

    strategy = FedAvg(
        fraction_fit=run["fraction-fit"],
        fraction_evaluate=run["fraction-evaluate"],
        min_available_clients=2,
        evaluate_fn=evaluate,
        on_fit_config_fn=lambda server_round: {"lr": run["learning-rate"] * 0.95**server_round},
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=run["num-server-rounds"]))


app = legacy_server_app(server_fn, FedLoRU, Net, rank=4, accumulate_every=2)  # FedLoRU
