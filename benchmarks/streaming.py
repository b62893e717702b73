"""What does it cost to aggregate many replies? Server time and peak memory, and the speed beside a plain ``torch.add``.

::

    python benchmarks/streaming.py round --replies 1000 --megabytes 1
    python benchmarks/streaming.py speed --replies 100 --megabytes 100

``round`` runs two rounds of FedAvg, each with so many clients, whose replies are made when they are pulled; it prints
the server's seconds a round (without the making of the replies) and how far the resident memory rose above what it was
before the first reply. In the first round there is no history to judge updates by, so that all are set aside until its
end; in the second they are folded as they come. ``speed`` reads replies and folds them in, and adds up the same bytes
by ``torch.add``.
"""

import argparse
import json
import logging
import math
import statistics
import time
from pathlib import Path

import torch
from flwr.app import Message, MetricRecord
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from torch import nn

from fedloru_flwr import wire
from fedloru_flwr.lowrank import TreeMean
from fedloru_flwr.strategies import FedAvg

TENSORS = 16


def side(megabytes: float) -> int:
    """The side of each of `TENSORS` square matrices that have so many MiB together."""
    return round(math.sqrt(megabytes * 2**18 / TENSORS))


def network(megabytes: float) -> nn.Module:
    size = side(megabytes)
    return nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(TENSORS)])


def memory(what: str) -> float:
    """MiB: ``VmRSS`` for what is resident now, ``VmHWM`` for the most there has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


class LazyGrid(InMemoryGrid):
    """Clients that have trained as soon as they are asked, and whose replies are made when they are pulled."""

    complete = True

    def __init__(self, clients: int) -> None:
        self.pull_interval = 0.01
        self.clients = clients
        self.seconds = 0.0
        self.before = 0.0
        self._sent: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.clients + 1))

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node_id, registered_at=f"{node_id:020d}") for node_id in self.get_node_ids()]

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{message.metadata.dst_node_id}"
            self._sent[message.metadata.message_id] = message
        self.before = self.before or memory("VmRSS")
        return list(self._sent)

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        begun = time.perf_counter()
        replies = [self._reply(self._sent.pop(message_id)) for message_id in message_ids]
        self.seconds += time.perf_counter() - begun
        return replies

    def _reply(self, message: Message) -> Message:
        node_id, order = message.metadata.dst_node_id, wire.read_order(message)
        tensors = {key: value.add_(1e-3 * (1 + node_id % 5)) for key, value in order.tensors.items()}
        metrics = MetricRecord({"train_loss": 1.0 / node_id, "num-examples": 1 + node_id % 7})
        reply = wire.make_reply(order, client=str(node_id - 1), metrics=metrics, tensors=tensors)
        keys = {"arrays_key": order.arrays_key, "config_key": order.config_key}
        return Message(wire.ReadyReply(reply, trained=True, reply_to=message, **keys).content, reply_to=message)


def two_rounds(replies: int, megabytes: float) -> dict[str, float]:
    """Server time and memory for aggregating so many replies of so many MiB."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    grid, seconds = LazyGrid(replies), []
    strategy = FedAvg(lambda: network(megabytes), num_clients=replies, fraction_evaluate=0.0)

    class Timer:
        def start_round(self, server_round: int, num_clients: int) -> None:
            self.begun, grid.seconds = time.perf_counter(), 0.0

        def end_round(self, row: dict[str, object]) -> None:
            assert row["clients_ok"] == replies
            seconds.append(time.perf_counter() - self.begun - grid.seconds)

    strategy.books.observer = Timer()
    strategy.start(grid, strategy.initial_arrays(), 2)
    first, second = seconds
    return {
        "replies": replies,
        "megabytes": megabytes,
        "first_round_seconds": first,
        "later_round_seconds": second,
        "extra_memory_mib": memory("VmHWM") - grid.before,
        "peak_memory_mib": memory("VmHWM"),
    }


def speed(replies: int, megabytes: float, repeats: int = 5, distinct: int = 4) -> dict[str, float]:
    """How fast replies are read and folded in, beside adding up the same bytes; each in turn, medians."""
    size, generator = side(megabytes), torch.Generator().manual_seed(0)
    records = [
        wire.to_record({f"layer{i}": torch.randn(size, size, generator=generator) for i in range(TENSORS)})
        for _ in range(distinct)
    ]
    tensors = [list(wire.lent_tensors(record).values()) for record in records]
    plain, streamed = [], []
    for _ in range(repeats):
        sums = [torch.zeros(size, size) for _ in range(TENSORS)]
        begun = time.perf_counter()
        for reply in range(replies):
            for total, tensor in zip(sums, tensors[reply % distinct], strict=True):
                torch.add(total, tensor, out=total)
        plain.append(time.perf_counter() - begun)
        begun, mean = time.perf_counter(), TreeMean(range(replies))
        for reply in range(replies):
            mean.add(reply, wire.lent_tensors(records[reply % distinct]), 1 + reply % 7)
        mean.result()
        streamed.append(time.perf_counter() - begun)
    added, folded = statistics.median(plain), statistics.median(streamed)
    return {
        "replies": replies,
        "megabytes": megabytes,
        "torch_add_seconds": added,
        "streamed_seconds": folded,
        "share_of_torch_add": added / folded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("round", "speed"))
    parser.add_argument("--replies", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=1.0)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measure = two_rounds if arguments.what == "round" else speed
    print(json.dumps(measure(arguments.replies, arguments.megabytes)))


if __name__ == "__main__":
    main()
