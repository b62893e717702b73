"""The ServerApp: a legacy FedAvg."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from numpyapp.task import Net, get_weights, load_test_data, set_weights, test


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
        initial_parameters=ndarrays_to_parameters(get_weights(net)),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=run["num-server-rounds"]))


app = ServerApp(server_fn=server_fn)
