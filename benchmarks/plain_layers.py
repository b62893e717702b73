r"""Low-rank layers in a few lines of torch, for the rivals that need no PEFT.

A factorised layer computes ``y = W x + b + s B A x`` either as it stands (form ``pair``) or as ``(W + s B A) x + b``
(form ``product``), whichever is faster; gradients go to ``A``, ``B`` and the dense leaves alone.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prepared import Prepared, Training, trained

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


class FlatSGD:
    """Clipped SGD with momentum on a model's trained parameters, which become views of one flat tensor.

    One operation where there would be one a parameter: for a small model that is a good part of a step.

    Args:
        model: its trained parameters and their gradients are put into flat memory, in order.
        how: rate, momentum and the gradient norm's limit.

    Attributes:
        values: what is trained, flat.
    """

    def __init__(self, model: nn.Module, how: Training) -> None:
        self.how = how
        parameters = list(trained(model).values())
        self.values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self._gradient, self._momentum = torch.zeros_like(self.values), torch.zeros_like(self.values)
        start = 0
        for parameter in parameters:
            part = slice(start, start + parameter.numel())
            parameter.data = self.values[part].view_as(parameter)
            parameter.grad = self._gradient[part].view_as(parameter)
            start = part.stop

    def restart(self, values: Tensor | None = None) -> None:
        """Begin without momentum, from these values if given."""
        self._momentum.zero_()
        if values is not None:
            self.values.copy_(values)

    def step(self, loss: Tensor) -> None:
        """Differentiate the loss and take a step."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((self.how.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        self._momentum.mul_(self.how.momentum).add_(self._gradient)
        self.values.add_(self._momentum, alpha=-self.how.learning_rate)
        self._gradient.zero_()
