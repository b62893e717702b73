"""One model trained on the samples of all the round's clients at once: what the hardware needs, whoever asks.

As many steps as a client takes, each on the union of the clients' batches of that step.
"""

import time

import torch
from torch import nn

from benchmarks.networks import loss_of
from benchmarks.plain_layers import low_rank_model
from benchmarks.prepared import Prepared, trained
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
    parameters = list(trained(model).values())
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
        optimizer = torch.optim.SGD(parameters, how.learning_rate, momentum=how.momentum, fused=True)
        steps = 0
        for _ in range(how.local_epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(batch):
                x = inputs[chosen]
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                loss_of(model(x), labels[chosen]).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, how.max_grad_norm, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
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
        trainable=sum(parameter.numel() for parameter in parameters),
        form=form + (", channels last" if channels_last else ""),
    )


if __name__ == "__main__":
    main(measure)
