"""The ServerApp: FedAvg and an evaluation on the server."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import Net, load_test_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the configured rounds."""
    run = context.run_config
    testloader = load_test_data()
    strategy = FedAvg(fraction_train=run["fraction-train"], fraction_evaluate=run["fraction-eval"])

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = test(model, testloader, "cpu")
        print(f"round {server_round}: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": run["learning-rate"]}),
        num_rounds=run["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
