"""The ServerApp: FedAvg over the adapters."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedloru_flwr.strategies import FedLoRU  # FedLoRU
from flowertune.models import get_model
from flowertune.task import load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Tune for the configured rounds."""
    run = context.run_config
    testloader = load_data(0, 1, 48)
    model = get_model()
    strategy = FedLoRU(  # FedLoRU, on the next line as well
        get_model, rank=2, accumulate_every=2, dense_leaves="none", fraction_train=run["fraction"], fraction_evaluate=0
    )

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(strategy.merged_state_dict())  # FedLoRU
        loss = test(model, testloader, "cpu")
        print(f"round {server_round}: loss {loss:.4f}")
        return MetricRecord({"loss": loss})

    strategy.start(
        grid=grid,
        initial_arrays=strategy.initial_arrays(),
        num_rounds=run["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
