"""A bare torch loop: the round's clients one after another, plain low-rank layers, no framework.

With more than one process each trains its share of the clients; the parent adds up what they send.
"""

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from benchmarks.networks import loss_of
from benchmarks.plain_layers import FORMS, Form, average_into, low_rank_model
from benchmarks.prepared import Prepared, trained
from benchmarks.rivals.report import Report, Task, main

Sums = tuple[list[Tensor], float]


class Loop:
    """Trains clients one by one on one model that stays; what is trained is written over for each client."""

    def __init__(self, prepared: Prepared, form: Form) -> None:
        self.prepared = prepared
        self.model = low_rank_model(prepared, form)
        self.parameters = list(trained(self.model).values())
        how = prepared.training
        self.optimizer = torch.optim.SGD(self.parameters, how.learning_rate, momentum=how.momentum, fused=True)
        self.generator = torch.Generator().manual_seed(0)

    def start(self) -> list[Tensor]:
        """A copy of what is trained, as it is now."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def client(self, number: int, received: list[Tensor]) -> int:
        """Train one client from what it received, in place; return its number of samples."""
        how = self.prepared.training
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, received)
        self.optimizer.state.clear()
        inputs, labels = self.prepared.client(number)
        for _ in range(how.local_epochs):
            order = torch.randperm(len(labels), generator=self.generator)
            for chosen in order.split(how.batch_size):
                loss = loss_of(self.model(inputs[chosen]), labels[chosen])
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, how.max_grad_norm, foreach=True)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return len(labels)

    def cohort(self, numbers: range, received: list[Tensor]) -> Sums:
        """Train these clients; return the sum of what they trained, weighted by their samples, and the weights' sum."""
        sums = [torch.zeros_like(tensor) for tensor in received]
        total = 0.0
        for number in numbers:
            weight = self.client(number, received)
            with torch.no_grad():
                average_into(sums, self.parameters, weight)
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
        sums, total = loop.cohort(numbers, [torch.from_numpy(array) for array in received])
        connection.send(([tensor.numpy() for tensor in sums], total))


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
            pipe.send((numbers, [tensor.numpy() for tensor in received]))
        sums, total = loop.cohort(cuts[0], received)
        for pipe in pipes:
            others, weight = pipe.recv()
            average_into(sums, [torch.from_numpy(array) for array in others], 1.0)
            total += weight
        received = [tensor / total for tensor in sums]
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
        trainable=sum(parameter.numel() for parameter in loop.parameters),
        form=form,
    )


if __name__ == "__main__":
    main(measure)
