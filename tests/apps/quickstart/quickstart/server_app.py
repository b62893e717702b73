from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedloru_flwr.strategies import FedLoRU
from quickstart.task import Net, load_data
from quickstart.task import test as test_fn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    model = Net if context.run_config["model-from"] == "factory" else Net()
    strategy = FedLoRU(
        model,
        rank=4,
        alpha=4,
        accumulate_every=context.run_config["accumulate-every"],
        fraction_train=context.run_config["fraction-train"],
        fraction_evaluate=context.run_config["fraction-evaluate"],
        run_dir=context.run_config["run-dir"],
    )
    _, testloader = load_data(0, 1, 64)

    def central(server_round, model):
        assert not model.training
        assert type(model) is Net
        loss, accuracy = test_fn(model, testloader, "cpu")
        return {"loss": loss, "accuracy": accuracy}

    result = strategy.start(
        grid=grid,
        initial_arrays=strategy.initial_arrays(),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=strategy.central_evaluation(central),
    )
    Net().load_state_dict(strategy.merged_state_dict())
    print("evaluated rounds:", sorted(result.evaluate_metrics_clientapp))
