"""A bare torch loop: the round's clients one after another, plain low-rank layers, no framework.

With more than one process each trains its share of the clients; the parent adds up what they send.
"""

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.networks import loss_of
from benchmarks.plain_layers import FORMS, FlatSGD, Form, low_rank_model
from benchmarks.prepared import Prepared
from benchmarks.rivals.report import Report, Task, main

Sums = tuple[Tensor, float]


class Loop:
    """Trains clients one by one on one model that stays; what is trained is written over for each client."""

    def __init__(self, prepared: Prepared, form: Form) -> None:
        self.prepared = prepared
        self.model = low_rank_model(prepared, form)
        self.sgd = FlatSGD(self.model, prepared.training)
        self.generator = torch.Generator().manual_seed(0)

    def start(self) -> Tensor:
        """A copy of what is trained, as it is now, flat."""
        return self.sgd.values.clone()

    def client(self, number: int, received: Tensor) -> int:
        """Train one client from what it received, in place; return its number of samples."""
        how = self.prepared.training
        self.sgd.restart(received)
        inputs, labels = self.prepared.client(number)
        for _ in range(how.local_epochs):
            order = torch.randperm(len(labels), generator=self.generator)
            for chosen in order.split(how.batch_size):
                self.sgd.step(loss_of(self.model(inputs[chosen]), labels[chosen]))
        return len(labels)

    def cohort(self, numbers: range, received: Tensor) -> Sums:
        """Train these clients; return the sum of what they trained, weighted by their samples, and the weights' sum."""
        sums, total = torch.zeros_like(received), 0.0
        for number in numbers:
            weight = self.client(number, received)
            sums.add_(self.sgd.values, alpha=weight)
            total += weight
        return sums, total


def faster_form(prepared: Prepared, trials: int = 5) -> Form:
    """The form of the low-rank layers in which a client's training takes less time here."""
    seconds: dict[Form, list[float]] = {form: [] for form in FORMS}
    loops = {form: Loop(prepared, form) for form in FORMS}
    for trial in range(trials + 1):
        for form, loop in loops.items():
            begun = time.perf_counter()
            loop.client(0, loop.start())
            if trial:  # the first warms up
                seconds[form].append(time.perf_counter() - begun)
    return min(FORMS, key=lambda form: statistics.median(seconds[form]))


def serve(connection: Connection, workload: str, form: Form, threads: int) -> None:
    """Train what the parent asks for, until it hangs up: in a process of its own."""
    torch.set_num_threads(threads)
    loop = Loop(Prepared.load(workload), form)
    while True:
        try:
            numbers, received = connection.recv()
        except EOFError:
            return
        sums, total = loop.cohort(numbers, torch.from_numpy(received))
        connection.send((sums.numpy(), total))


def measure(task: Task) -> Report:
    """Train rounds and time each: clients' training and the weighted mean."""
    torch.set_num_threads(task.threads)
    prepared = Prepared.load(task.workload)
    form = faster_form(prepared)
    loop = Loop(prepared, form)
    received = loop.start()
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    helpers = []
    for _ in range(task.processes - 1):
        ours, theirs = context.Pipe()
        helper = context.Process(target=serve, args=(theirs, task.workload, form, task.threads), daemon=True)
        helper.start()
        theirs.close()
        pipes.append(ours)
        helpers.append(helper)
    seconds = []
    for server_round in range(task.warm_up + task.rounds):
        begun = time.perf_counter()
        cohort = prepared.cohort(server_round)
        cuts = [
            cohort[len(cohort) * part // task.processes : len(cohort) * (part + 1) // task.processes]
            for part in range(task.processes)
        ]
        for pipe, numbers in zip(pipes, cuts[1:], strict=True):
            pipe.send((numbers, received.numpy()))
        sums, total = loop.cohort(cuts[0], received)
        for pipe in pipes:
            others, weight = pipe.recv()
            sums += torch.from_numpy(others)
            total += weight
        received = sums / total
        seconds.append(time.perf_counter() - begun)
    for pipe, helper in zip(pipes, helpers, strict=True):
        pipe.close()
        helper.join(10)
    return Report(
        rounds=seconds[task.warm_up :],
        threads=task.threads,
        processes=task.processes,
        clients=len(prepared.cohort(0)),
        steps=prepared.steps(0),
        samples=sum(len(prepared.client(number)[1]) for number in prepared.cohort(0)),
        trainable=len(received),
        form=form,
    )


if __name__ == "__main__":
    main(measure)
