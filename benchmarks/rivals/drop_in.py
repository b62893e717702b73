"""This package in an app of one's own: the drop-in session with a training loop of the user's, in one process."""

from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import nn

from benchmarks.networks import loss_of
from benchmarks.prepared import Prepared, trained
from benchmarks.rivals.report import Report, Task, main
from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.strategies import FedLoRA


class Clock:
    """An observer that keeps the rounds' rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def start_round(self, server_round: int, num_clients: int) -> None:
        """Nothing to note."""

    def end_round(self, row: dict[str, Any]) -> None:
        """Keep the row."""
        self.rows.append(row)


def client_app(prepared: Prepared) -> ClientApp:
    """A Flower ClientApp around the session."""
    app = ClientApp()
    how = prepared.training

    @app.train()
    def train(message: Message, context: Context) -> Message:
        session = LowRankSession(prepared.factory, message, context)
        inputs, labels = prepared.client(int(context.node_config["partition-id"]))
        session.model.train()
        parameters = list(trained(session.model).values())
        optimizer = torch.optim.SGD(parameters, how.learning_rate, momentum=how.momentum, fused=True)
        last = torch.zeros(())
        for _ in range(how.local_epochs):
            for chosen in torch.randperm(len(labels)).split(how.batch_size):
                loss = loss_of(session.model(inputs[chosen]), labels[chosen])
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, how.max_grad_norm, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                last = loss.detach()
        return session.reply({"train_loss": float(last), "num-examples": len(labels)})

    return app


def measure(task: Task) -> Report:
    """Train rounds and read their seconds from the strategy's rows."""
    torch.set_num_threads(task.threads)
    prepared = Prepared.load(task.workload)
    clock, server = Clock(), ServerApp()
    sent = 0

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        nonlocal sent
        strategy = FedLoRA(
            prepared.factory,
            rank=prepared.rank,
            alpha=prepared.alpha,
            target_modules=prepared.layers,
            dense_leaves=",".join(prepared.dense_leaves) or "none",
            fraction_train=prepared.training.clients_per_round / prepared.training.clients,
            fraction_evaluate=0.0,
            measure_aggregation=False,
            observer=clock,
            num_clients=prepared.training.clients,
        )
        sent = strategy.parameters_sent()
        strategy.start(grid, strategy.initial_arrays(), num_rounds=task.warm_up + task.rounds)

    run_in_process(server, client_app(prepared), num_supernodes=prepared.training.clients)
    measured = [row for row in clock.rows if row["round"] > task.warm_up]
    if any(row["clients_failed"] for row in measured):
        raise RuntimeError(f"clients failed: {measured[0]['failures']}")
    return Report(
        rounds=[row["seconds"] for row in measured],
        threads=task.threads,
        processes=1,
        clients=min(row["clients_ok"] for row in measured),
        steps=prepared.steps(0),
        samples=sum(len(prepared.client(number)[1]) for number in prepared.cohort(0)),
        trainable=sent,
        form="one client at a time, drop-in session",
    )


if __name__ == "__main__":
    main(measure)
