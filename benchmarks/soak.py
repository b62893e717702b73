"""Does a long run's memory stay bounded? 400 virtual clients and 300 rounds in one process, with random drop-outs.

::

    python benchmarks/soak.py --clients 400 --rounds 300

Prints the resident memory after rounds 30, 100 and 300, and the last over the first; ends with status 1 where that is
above 1.1. Every client of a round drops out
with a probability of one in five: half of these fail before they train, half lose their reply after it.
"""

import argparse
import gc
import logging
import os
import random
import tempfile
import time
from pathlib import Path

import psutil
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn
from torch.nn import functional

from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.strategies import FedLoRU

MARKS = (30, 100, 300)
EXAMPLES = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(x)))


class Dropped(Exception):
    """A client that does not answer this time."""


def client_app(dropout: float, seed: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        chance = random.Random(f"{seed} {partition} {message.content['config']['server-round']}").random()
        if chance < dropout / 2:
            raise Dropped("before training")
        session = LowRankSession(Net, message, context)
        generator = torch.Generator().manual_seed(partition)
        inputs = torch.randn(EXAMPLES, 32, generator=generator)
        labels = torch.randint(4, (EXAMPLES,), generator=generator)
        session.model.train()
        optimiser = torch.optim.SGD([p for p in session.model.parameters() if p.requires_grad], lr=0.05)
        loss = functional.cross_entropy(session.model(inputs), labels)
        loss.backward()
        optimiser.step()
        reply = session.reply({"train_loss": loss.item(), "num-examples": EXAMPLES})
        if chance < dropout:
            raise Dropped("after training")
        return reply

    return app


class Gauge:
    """Notes the resident memory after certain rounds."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.resident: dict[int, float] = {}
        self.ok = self.failed = 0

    def start_round(self, server_round: int, num_clients: int) -> None:
        pass

    def end_round(self, row) -> None:
        self.ok += row["clients_ok"]
        self.failed += row["clients_failed"]
        if row["round"] in MARKS:
            gc.collect()
            self.resident[row["round"]] = psutil.Process(os.getpid()).memory_info().rss / 2**20
            seconds = time.monotonic() - self.begun
            print(f"after round {row['round']}: {self.resident[row['round']]:.1f} MiB ({seconds:.0f} s)", flush=True)


def soak(clients: int, rounds: int, fraction: float, dropout: float, seed: int) -> Gauge:
    gauge, server = Gauge(), ServerApp()

    @server.main()
    def main(grid, context):
        with tempfile.TemporaryDirectory() as directory:
            strategy = FedLoRU(
                Net,
                rank=2,
                target_modules="hidden",
                accumulate_every=10,
                seed=seed,
                num_clients=clients,
                fraction_train=fraction,
                fraction_evaluate=0.0,
                run_dir=Path(directory) / "run",
                observer=gauge,
            )
            strategy.start(grid, strategy.initial_arrays(), num_rounds=rounds)

    run_in_process(server, client_app(dropout, seed), num_supernodes=clients)
    return gauge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--fraction", type=float, default=0.1, help="share of the clients that train in a round")
    parser.add_argument("--dropout", type=float, default=0.2, help="share of them whose reply is lost")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    gauge = soak(options.clients, options.rounds, options.fraction, options.dropout, options.seed)
    print(f"replies used: {gauge.ok}, lost: {gauge.failed}")
    if len(gauge.resident) > 1:
        first, *_, last = gauge.resident
        ratio = gauge.resident[last] / gauge.resident[first]
        print(f"resident memory after round {last} over that after round {first}: {ratio:.3f}")
        if ratio > 1.1:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
