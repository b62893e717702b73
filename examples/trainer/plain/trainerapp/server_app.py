"""The ServerApp: FedAvg and an evaluation on the server."""

from tempfile import TemporaryDirectory

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from trainerapp.task import get_model, load_test_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the configured rounds."""
    run = context.run_config
    dataset = load_test_data()
    strategy = FedAvg(fraction_train=run["fraction-train"], fraction_evaluate=0.0)

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = get_model()
        model.load_state_dict(arrays.to_torch_state_dict())
        with TemporaryDirectory() as scratch:
            loss, accuracy = test(model, dataset, scratch)
        print(f"round {server_round}: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model().state_dict()),
        num_rounds=run["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
