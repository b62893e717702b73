r"""Low-rank layers in a few lines of torch, for the rivals that need no PEFT.

A factorised layer computes ``y = W x + b + s B A x`` either as it stands (form ``pair``) or as ``(W + s B A) x + b``
(form ``product``), whichever is faster; gradients go to ``A``, ``B`` and the dense leaves alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prepared import Prepared

Form = Literal["pair", "product"]
FORMS: tuple[Form, ...] = get_args(Form)


class _LowRank(nn.Module):
    """A layer's frozen weight, its bias, and a pair: ``A (r, in, *kernel)`` and ``B (out, r)``."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float, form: Form) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.form = scale, form
        fan_in = layer.weight[0].numel()
        self.lora_A = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]).uniform_(-1, 1) * fan_in**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "product":
            update = (self.lora_B @ self.lora_A.flatten(1)).view_as(self.weight)
            return self.apply_weight(x, torch.add(self.weight, update, alpha=self.scale), self.bias)
        return torch.add(self.apply_weight(x, self.weight, self.bias), self.up(x), alpha=self.scale)

    def up(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LowRankLinear(_LowRank):
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def up(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.lora_A), self.lora_B)


class LowRankConv2d(_LowRank):
    def __init__(self, layer: nn.Conv2d, rank: int, scale: float, form: Form) -> None:
        super().__init__(layer, rank, scale, form)
        self.how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
        if layer.groups != 1 or layer.padding_mode != "zeros" or layer.dilation != (1, 1):
            raise ValueError(f"the benchmark's plain low-rank convolution does not do what {layer} does")

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight, bias, **self.how)

    def up(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(x, self.lora_A, **self.how), self.lora_B[..., None, None])


_LAYERS: tuple[tuple[type[nn.Module], type[_LowRank]], ...] = ((nn.Linear, LowRankLinear), (nn.Conv2d, LowRankConv2d))


def low_rank_model(prepared: Prepared, form: Form = "pair") -> nn.Module:
    """The workload's model with a pair beside each of its factorised layers, everything else frozen or a dense leaf."""
    model = prepared.factory().requires_grad_(False).train()
    for name in prepared.dense_leaves:
        model.get_parameter(name).requires_grad_(True)
    for name in prepared.layers:
        owner, _, local = name.rpartition(".")
        layer = model.get_submodule(name)
        made = next((made for kind, made in _LAYERS if isinstance(layer, kind)), None)
        if made is None:
            raise ValueError(f"the benchmark has no plain low-rank layer for {name}: {type(layer).__name__}")
        setattr(model.get_submodule(owner), local, made(layer, prepared.rank, prepared.alpha / prepared.rank, form))  # type: ignore[arg-type]
    return model


def average_into(sums: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Add ``weight * values`` to ``sums``, in place."""
    torch._foreach_add_(list(sums), list(values), alpha=weight)
