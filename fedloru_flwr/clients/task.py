"""What a client's local training is, as a value: tensors in, tensors out, however it is carried out."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedloru_flwr.data import Samples


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimiser of its own.

    Attributes:
        keys: what is trained; everything else is frozen meanwhile.
        epochs: passes over the samples.
    """

    keys: tuple[str, ...]
    epochs: int


@dataclass(frozen=True)
class LocalTask:
    """One client's training in one round.

    Attributes:
        values: every adapter tensor and dense leaf of the client's model by key, as training begins.
        phases: what is trained, one after the other.
        samples: what it is trained on.
        seed: of the order of the samples (one generator for all phases).
        proximal_mu: FedProx's ``mu``: in the first phase the gradient of a trained ``w`` gains ``mu (w - w_0)``,
            ``w_0`` being its value in ``values``.
        control: SCAFFOLD's ``c - c_k`` by key, added to the gradients of the first phase; None: no SCAFFOLD.
    """

    values: Mapping[str, Tensor]
    phases: tuple[Phase, ...]
    samples: Samples
    seed: int
    proximal_mu: float = 0.0
    control: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class LocalResult:
    """What came of a `LocalTask`.

    Attributes:
        values: as the task's, after training, on the CPU.
        loss: mean training loss of the last epoch of the first phase.
        mean_gradients: with SCAFFOLD, the mean over the first phase's steps of each trained tensor's gradient, as
            the loss gives it: before corrections and clipping. Else None.
        silent: factorised layers that got no gradient, although others did.
    """

    values: dict[str, Tensor]
    loss: float
    mean_gradients: dict[str, Tensor] | None = None
    silent: tuple[str, ...] = ()
