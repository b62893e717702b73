"""The ServerApp: FedAvg over the adapters."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.models import get_model
from flowertune.task import load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Tune for the configured rounds."""
    run = context.run_config
    testloader = load_data(0, 1, 48)
    model = get_model()
    strategy = FedAvg(fraction_train=run["fraction"], fraction_evaluate=0)

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        loss = test(model, testloader, "cpu")
        print(f"round {server_round}: loss {loss:.4f}")
        return MetricRecord({"loss": loss})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=run["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
