"""pfl-research (Apple's `pfl`): the same clients in its own in-process simulation, in a virtual environment of its own.

Its model is the benchmark's, with plain low-rank layers in their faster form; clients' data are tensors from the start.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import torch
from torch import Tensor, nn

from benchmarks.networks import loss_of
from benchmarks.plain_layers import low_rank_model
from benchmarks.prepared import Prepared, trained
from benchmarks.rivals.bare import faster_form
from benchmarks.rivals.report import Report, Task, main


class PflModel(nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]  # nn.Module is untyped

    def loss(self, inputs: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The value to minimise."""
        return loss_of(self.network(inputs), labels)

    def metrics(self, inputs: Tensor, labels: Tensor, **_: Any) -> dict[str, Any]:
        """Nothing is evaluated in a measured round; pfl wants an entry."""
        from pfl.metrics import Weighted

        return {"loss": Weighted(0.0, len(labels))}


def measure(task: Task) -> Report:
    """Train rounds (pfl's central iterations) and time each."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(task.threads)
    prepared = Prepared.load(task.workload)
    how = prepared.training
    form = faster_form(prepared)
    network = PflModel(low_rank_model(prepared, form))
    parameters = list(trained(network).values())
    generator = torch.Generator().manual_seed(0)
    samples_seen = [0]

    class Shuffled(Dataset):  # type: ignore[misc]  # pfl is not there when types are checked
        """A user's tensors in random batches; pfl's own `Dataset` goes through NumPy and does not shuffle."""

        def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
            order = torch.randperm(len(self), generator=generator)
            for chosen in order.split(batch_size or len(self)):
                yield tuple(data[chosen] for data in self.raw_data)

    users = [
        Shuffled(list(prepared.client(number)), user_id=str(number)) for number in range(prepared.training.clients)
    ]
    turn = iter(())

    def sample() -> int:
        """The next user: cohorts are one window after the other, as in the other rivals."""
        nonlocal turn
        user = next(turn, None)
        if user is None:
            turn = iter(prepared.cohort(len(seconds)))
            user = next(turn)
        samples_seen[0] += len(users[user])
        return user

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        """Notes when each central iteration ends."""

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            nonlocal begun
            now = time.perf_counter()
            seconds.append(now - begun)
            samples.append(samples_seen[0])
            samples_seen[0], begun = 0, now
            return False, Metrics()

    def optimizer(ignored: Any, lr: float) -> torch.optim.Optimizer:
        # pfl hands over all parameters, frozen ones too: only those that are trained are of use.
        return torch.optim.SGD(parameters, lr, momentum=how.momentum, fused=True)

    seconds: list[float] = []
    samples: list[int] = []
    model = PyTorchModel(network, optimizer, torch.optim.SGD(parameters, lr=1.0, fused=True))
    data = FederatedDataset(lambda user: users[user], sample)
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    begun = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.warm_up + task.rounds,
            evaluation_frequency=1 << 30,
            train_cohort_size=how.clients_per_round,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=how.local_epochs,
            local_learning_rate=how.learning_rate,
            local_batch_size=how.batch_size,
            local_max_grad_norm=how.max_grad_norm,
        ),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return Report(
        rounds=seconds[task.warm_up :],
        threads=task.threads,
        processes=1,
        clients=how.clients_per_round,
        steps=prepared.steps(0),
        samples=samples[-1],
        trainable=sum(parameter.numel() for parameter in parameters),
        form=form,
    )


if __name__ == "__main__":
    main(measure)
