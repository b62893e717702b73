"""One model trained on the samples of all the round's clients at once: what the hardware needs, whoever asks.

As many steps as a client takes, each on the union of the clients' batches of that step.
"""

import time

import torch

from benchmarks.networks import loss_of
from benchmarks.plain_layers import FlatSGD, low_rank_model
from benchmarks.prepared import Prepared
from benchmarks.rivals.report import Report, Task, main


def measure(task: Task) -> Report:
    """Train rounds and time each.

    Options: ``form`` of the low-rank layers; ``channels_last`` (images only).
    """
    torch.set_num_threads(task.threads)
    prepared = Prepared.load(task.workload)
    how = prepared.training
    form, channels_last = task.options.get("form", "product"), bool(task.options.get("channels_last"))
    model = low_rank_model(prepared, form)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    sgd = FlatSGD(model, how)
    batch = how.batch_size * len(prepared.cohort(0))
    seconds = []
    generator = torch.Generator().manual_seed(0)
    steps = samples = 0
    for server_round in range(task.warm_up + task.rounds):
        begun = time.perf_counter()
        cohort = prepared.cohort(server_round)
        # The cohort's samples lie one after the other.
        part = slice(prepared.offsets[cohort[0]], prepared.offsets[cohort[-1] + 1])
        inputs, labels = prepared.inputs[part], prepared.labels[part]
        sgd.restart()
        steps = 0
        for _ in range(how.local_epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(batch):
                x = inputs[chosen]
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                sgd.step(loss_of(model(x), labels[chosen]))
                steps += 1
        samples = len(labels)
        seconds.append(time.perf_counter() - begun)
    return Report(
        rounds=seconds[task.warm_up :],
        threads=task.threads,
        processes=1,
        clients=len(prepared.cohort(0)),
        steps=steps,
        samples=samples,
        trainable=len(sgd.values),
        form=form + (", channels last" if channels_last else ""),
    )


if __name__ == "__main__":
    main(measure)
