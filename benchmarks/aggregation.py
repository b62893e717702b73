"""The server alone: seconds and peak memory to average many replies, against `torch.add` over the same bytes.

Replies are made one at a time, when they are asked for; the time that takes is not counted.
"""

import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.rivals.report import Report, Task, main
from fedloru_flwr.lowrank import TreeMean

_TENSORS = 16  # a reply has so many, of one size
_MIB = 1 << 20
Reply = tuple[Mapping[str, Tensor], float]


class Replies:
    """Replies of random numbers, made when they are asked for, and the seconds that took."""

    def __init__(self, count: int, mebibytes: int) -> None:
        self.count = count
        size = mebibytes * _MIB // 4 // _TENSORS
        generator = torch.Generator().manual_seed(0)
        self.source = {f"layer{index}.lora_A": torch.randn(size, generator=generator) for index in range(_TENSORS)}
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Reply]:
        for number in range(self.count):
            begun = time.perf_counter()
            reply = {key: tensor * (1.0 + number / self.count) for key, tensor in self.source.items()}
            weight = float(1 + number % 7)
            self.seconds += time.perf_counter() - begun
            yield reply, weight


def aggregate(replies: Replies) -> dict[str, Tensor]:
    """The weighted mean as this package's server forms it, replies coming in order."""
    mean = TreeMean(range(replies.count))
    for place, (reply, weight) in enumerate(replies):
        mean.add(place, reply, weight)
    return mean.result()[0]


def add(replies: Replies) -> dict[str, Tensor]:
    """The sum by `torch.add`, in place, reply after reply: the least that reading all these bytes costs."""
    sums: dict[str, Tensor] = {key: torch.zeros_like(tensor) for key, tensor in replies.source.items()}
    for reply, _ in replies:
        for key, tensor in reply.items():
            torch.add(sums[key], tensor, out=sums[key])
    return sums


def peak_mebibytes() -> float:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(task: Task) -> Report:
    """Aggregate once and report the seconds, and what the peak of memory was over that before the first reply.

    Options: ``replies``, ``mebibytes``, and ``how``: ``ours`` or ``add``.
    """
    torch.set_num_threads(task.threads)
    how = {"ours": aggregate, "add": add}[task.options["how"]]
    how(Replies(2, 1))  # imports, allocator
    replies = Replies(task.options["replies"], task.options["mebibytes"])
    before = psutil.Process().memory_info().rss / _MIB
    begun = time.perf_counter()
    how(replies)
    seconds = time.perf_counter() - begun - replies.seconds
    return Report(
        rounds=[seconds],
        threads=task.threads,
        processes=1,
        clients=replies.count,
        steps=0,
        samples=0,
        trainable=sum(tensor.numel() for tensor in replies.source.values()),
        extra={"peak_mebibytes": peak_mebibytes(), "peak_over_start": peak_mebibytes() - before},
    )


if __name__ == "__main__":
    main(measure)
