"""The ServerApp: FedAvg over the adapter's tensors; each round's seconds go to standard output as a line of JSON."""

import json
import time
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain_flower.task import get_model, load, trained

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that says how long each round took: from drawing its clients to the mean of their replies."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; starts the clock."""
        self._begun = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg; stops the clock."""
        replies = list(replies)
        outcome = super().aggregate_train(server_round, replies)
        seconds, good = time.perf_counter() - self._begun, [reply for reply in replies if reply.has_content()]
        row = {
            "round": server_round,
            "seconds": seconds,
            "ended": time.time(),
            "clients": len(good),
            "samples": sum(int(reply.content["metrics"]["num-examples"]) for reply in good),
        }
        print(json.dumps(row), flush=True)
        return outcome


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the given number of rounds."""
    torch.set_num_threads(int(context.run_config["threads"]))
    path = str(context.run_config["workload"])
    how = load(path).training
    model = get_model(path)
    print(json.dumps({"trainable": sum(tensor.numel() for tensor in trained(model).values())}), flush=True)
    strategy = TimedFedAvg(
        fraction_train=how.clients_per_round / how.clients,
        fraction_evaluate=0.0,
        # Nodes are still registering when round 1 begins: FedAvg's share of those there are would be a few clients.
        min_train_nodes=how.clients_per_round,
        min_available_nodes=how.clients,
    )
    strategy.start(grid, ArrayRecord(trained(model)), num_rounds=int(context.run_config["num-server-rounds"]))
