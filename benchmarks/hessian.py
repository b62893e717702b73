"""What does a stable rank cost? Seconds and peak memory for the Hessian of a network of about a million parameters.

::

    python benchmarks/hessian.py mlp
    python benchmarks/hessian.py resnet --threads 2 --points 500 --tolerance 0.02

The network has been trained for a few steps on the same samples, noisy copies of a prototype for each class (``text``:
bytes that repeat each other), so that its Hessian has outliers and a bulk as that of a real one. ``over_start`` is the
peak of memory less what the process had before; ``cpu_seconds``, of all threads together, says what a busy machine
hides. ``--layers`` measures every layer's block as well.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks import ByteLanguageModel
from fedloru_flwr.models.networks import MLP, ResNet, SmallCNN, seeded_initialisation
from fedloru_flwr.rank import module_hessian, stable_ranks
from fedloru_flwr.rank.operators import MAX_BYTES

CLASSES = 10
STEPS = 30


def network(name: str) -> nn.Module:
    """One of the networks; each has 0.9 to 1.1 million parameters."""
    if name == "mlp":
        return MLP((1, 28, 28), CLASSES, (784, 448))
    if name == "cnn":
        return SmallCNN((1, 28, 28), CLASSES, width=40)
    if name == "resnet":
        return ResNet((3, 32, 32), CLASSES, (1, 1, 1, 1), width=29)
    return ByteLanguageModel(length=32, width=128, layers=5)


def data(name: str, points: int) -> tuple[Tensor, Tensor]:
    """Samples and targets."""
    generator = torch.Generator().manual_seed(0)
    if name == "text":
        phrases = torch.randint(256, (20, 33), generator=generator)
        text = phrases[torch.randint(20, (points,), generator=generator)]
        return text[:, :-1], text[:, 1:]
    shape = (3, 32, 32) if name == "resnet" else (1, 28, 28)
    labels = torch.randint(CLASSES, (points,), generator=generator)
    prototypes = torch.randn(CLASSES, *shape, generator=generator)
    return prototypes[labels] + torch.randn(points, *shape, generator=generator), labels


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the last dimension, mean over all others."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def memory(what: str) -> float:
    """MiB: ``VmRSS`` for what is resident now, ``VmHWM`` for the most there has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main() -> None:
    """Measure one network, and print what it took as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("mlp", "cnn", "resnet", "text"))
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES)
    parser.add_argument("--layers", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = seeded_initialisation(network(asked.network), 0)
    inputs, targets = data(asked.network, asked.points)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        batch = torch.randperm(asked.points)[:50]
        optimizer.zero_grad()
        loss(model(inputs[batch]), targets[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    before = memory("VmRSS")
    begun, spent = time.perf_counter(), time.process_time()
    hessian = module_hessian(model, inputs, targets, loss=loss, max_bytes=asked.max_bytes)
    found = stable_ranks(hessian, layers=asked.layers, tolerance=asked.tolerance)
    seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    whole = found[""]
    print(
        json.dumps(
            {
                "network": asked.network,
                "parameters": whole.size,
                "points": asked.points,
                "threads": asked.threads,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(spent, 1),
                "peak_mebibytes": round(memory("VmHWM")),
                "over_start": round(memory("VmHWM") - before),
                "products": sum(one.products for one in found.values()),
                "probes": whole.probes,
                "samples_at_once": hessian.points_at_once,
                "stable_rank": round(whole.stable_rank, 3),
                "error": round(whole.stable_rank_error, 3),
                "converged": whole.converged,
            }
        )
    )


if __name__ == "__main__":
    main()
