"""A model's frozen part alone, for training that brings layers of its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import Entry, fold
from fedloru_flwr.models.plan import AdapterPlan


class FrozenBase:
    """The base of a plain model, held and folded as `AdaptedModel` does, without PEFT and without adapters.

    Args:
        module: the plain model; it is left as it is.
        plan: made from this very model.
        seed: the run's, from which a one-sided method's ``A`` is drawn.
    """

    def __init__(self, module: nn.Module, plan: AdapterPlan, seed: int = 0) -> None:
        self.module = module
        self.plan = plan
        self._seed = seed
        parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self._base = plan.base_of(parameters)

    def read_base(self) -> dict[str, Tensor]:
        """The frozen parameters, by the plain model's names (not copied)."""
        return self._base

    def write_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Take other frozen parameters."""
        self._base = {name: tensors[name].detach().clone() for name in self.plan.base}

    @torch.no_grad()
    def fold(self, entry: Entry) -> None:
        """Fold one ledger entry into the base: ``W <- W + s B A``, in float32."""
        adapter = self.plan.whole(entry.adapter, self._seed, entry.draw)
        self._base = fold(self._base, adapter, self.plan.layers, entry.scale)

    def stack(self, entries: Sequence[Entry]) -> None:
        """Refuse to hold entries beside the base."""
        if entries:
            raise ValueError("clients that stack entries are trained one at a time")

    # Nobody else gets at this base, so that there is never anything to mend.

    def base_marks(self) -> dict[str, object]:
        """Nothing to remember."""
        return {}

    def base_written(self, marks: Mapping[str, object]) -> tuple[str, ...]:
        """Nothing is."""
        return ()

    def base_replaced(self, marks: Mapping[str, object]) -> bool:
        """It is not."""
        return False

    def restore_dtypes(self) -> bool:
        """Nothing to restore."""
        return False
