r"""A model as a function of its tensors, with low-rank layers of our own: what many clients' training is batched over.

A factorised layer computes, from the tensors of `layout.shapes` and the frozen ``W``,

.. math:: y = W x + b + s B' A' x + s_p B_p A_p x, \quad A' = A + s_A A_d A_u, \quad B' = B + s_B B_d B_u

or, for the family ``loha``, ``y = (W + s (w1_a w1_b) * (w2_a w2_b)) x + b``.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from fedloru_flwr.lowrank import FactorisedLayer
from fedloru_flwr.models.layout import Layout, nested_keys, personal_keys, shapes, shared_keys
from fedloru_flwr.models.plan import canonical_names

_FAST_CHANNELS = 8  # oneDNN's grouped convolution is up to four times slower where a group has fewer outputs


class FunctionalModel:
    """A model that takes its tensors as arguments, for one client or for many at once.

    It is built from a copy of ``module``, by default in training mode. Not to be called from several threads at once.

    Args:
        module: the plain model; it is not changed.
        layers: its factorised layers.
        layout: what each of them holds; needed where there are layers.
        dense_leaves: parameters that each client has for itself.
        training: whether dropout drops and batch normalisation uses the batch's statistics.

    Attributes:
        keys: of a client's values, in order: adapter tensors, then dense leaves.
        base_keys: parameters that all clients share, by the plain model's names.
        buffers: of the plain model, by name; as the copy holds them.
        layers: the factorised layers.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[FactorisedLayer] = (),
        layout: Layout | None = None,
        dense_leaves: Sequence[str] = (),
        *,
        training: bool = True,
    ) -> None:
        self._module = copy.deepcopy(module).train(training).requires_grad_(False)
        self.layers = tuple(layers)
        self.buffers = dict(self._module.named_buffers())
        adapters: list[str] = []
        plain = [name for name, _ in self._module.named_parameters()]
        for layer in self.layers:
            if layout is None:
                raise ValueError("a model with factorised layers needs their layout")
            adapters += _factorise(self._module.get_submodule(layer.name), layer, layout)
        for name, part in self._module.named_modules():
            if type(part) is nn.Embedding and part.padding_idx is not None:
                part.__class__ = _OwnEmbedding
            elif type(part) is nn.Linear and f"{name}.weight" in dense_leaves:
                part.__class__ = _OwnLinear
        self.keys = (*adapters, *dense_leaves)
        self.base_keys = tuple(name for name in plain if name not in set(dense_leaves))
        self._names = canonical_names(self._module)

    def forward(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs ``(batch, classes)`` of one client.

        Args:
            values: the client's tensors, by `keys`.
            base: everything else, by the plain model's names: `base_keys`, and buffers that differ from `buffers`.
            x: ``(batch, *input_shape)``.
        """
        tensors = {name: values[key] if key in values else base[key] for name, key in self._names.items()}
        tensors |= {name: base[name] for name in self.buffers if name in base}
        return functional_call(self._module, tensors, (x,), tie_weights=False)  # type: ignore[no-any-return]

    def forward_clients(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs ``(clients, batch, classes)`` of clients whose ``values`` and ``x`` are stacked; one base."""

        def one(own: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            return self.forward(own, base, inputs)

        if len(x) == 1:
            return one({key: value[0] for key, value in values.items()}, x[0])[None]
        return vmap(one)(values, x)


def _factorise(module: nn.Module, layer: FactorisedLayer, layout: Layout) -> list[str]:
    """Turn a layer into a factorised one, its class included; return the keys of its adapter."""
    keys = []
    for key, shape in shapes(layer, layout):
        place = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        module.register_parameter(key.removeprefix(f"{layer.name}."), place)
        keys.append(key)
    plain = type(module)
    module.__class__ = type(plain.__name__, (_Factorised, plain), {"layer": layer, "layout": layout})
    return keys


class _Factorised(nn.Module):
    """A linear, convolutional or embedding layer with adapters; a plain layer's class is added to its bases."""

    layer: FactorisedLayer
    layout: Layout

    def forward(self, x: Tensor) -> Tensor:
        """As the plain layer."""
        layer, weight, bias = self.layer, self._value("weight"), self._parameters.get("bias")
        if self.layout.family == "loha":
            weight = weight + self._hadamard()
        y = _apply(self, layer, x, weight, bias, is_own=self.layout.family == "loha")
        pairs = self._pairs()
        if not pairs:
            return y
        # Pairs side by side are one pair of a higher rank.
        a = torch.cat([a for a, _ in pairs]).reshape(-1, *layer.a_shape()[1:])
        b = torch.cat([b for _, b in pairs], dim=1)
        if layer.kind in ("conv1d", "conv2d"):
            missing = -len(a) % _FAST_CHANNELS
            a = functional.pad(a, (0, 0) * (a.dim() - 1) + (0, missing))
            b = functional.pad(b, (0, missing))
            inner = _apply(self, layer, x, a, None, is_own=True)
            batch_axes = inner.dim() - a.dim() + 1  # none where the input is a single sample
            return y + (b @ inner.flatten(batch_axes + 1)).reshape(y.shape)
        inner = _apply(self, layer, x, a.T if layer.transposed else a, None, is_own=True)
        return y + _own_linear(inner, b, None)

    def _value(self, key: str) -> Tensor:
        value: Tensor | None = self._parameters[key.removeprefix(f"{self.layer.name}.")]
        assert value is not None
        return value

    def _hadamard(self) -> Tensor:
        """``s (w1_a w1_b) * (w2_a w2_b)`` in the shape of the stored weight."""
        w1_a, w1_b, w2_a, w2_b = (self._value(key) for key in shared_keys(self.layer, "loha"))
        return self.layer.as_weight(self.layout.scale * (w1_a @ w1_b) * (w2_a @ w2_b))

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Matrices ``A`` and ``B``, the scale in ``B``, whose products add up to the low-rank part of the weight."""
        layer, layout, pairs = self.layer, self.layout, []
        if layout.family == "lora":
            a, b = layer.as_matrices(*(self._value(key) for key in shared_keys(layer, "lora")))
            if layout.nested_rank:
                a_down, a_up, b_down, b_up = (self._value(key) for key in nested_keys(layer))
                a_up, b_down = layer.as_matrices(a_up, b_down)
                a = a + layout.nested_scale * (a_down @ a_up)
                b = b + layout.nested_scale * (b_down @ b_up)
            pairs.append((a, layout.scale * b))
        if layout.personal_rank:
            own_a, own_b = layer.as_matrices(*(self._value(key) for key in personal_keys(layer)))
            pairs.append((own_a, layout.personal_scale * own_b))
        return pairs


class _OwnEmbedding(nn.Embedding):
    """An embedding whose padding row gets no gradient under vmap either."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        return _look_up(input, self.weight, self.padding_idx)


class _OwnLinear(nn.Linear):
    """A linear layer with a weight for each client."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        return _own_linear(input, self.weight, self.bias)


def _apply(
    module: nn.Module, layer: FactorisedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, *, is_own: bool
) -> Tensor:
    """What the plain layer computes, with another weight (any number of outputs) in its stored form.

    Args:
        module: gives stride, padding and the like.
        layer: its kind.
        x: the input.
        weight: the weight.
        bias: the bias.
        is_own: whether each client has a weight for itself.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]  # torch's is untyped
    if isinstance(module, nn.Embedding):
        return _look_up(x, weight, module.padding_idx)
    if layer.transposed:
        return x @ weight if bias is None else x @ weight + bias
    return _own_linear(x, weight, bias) if is_own else functional.linear(x, weight, bias)


def _own_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for a weight that each client has for itself."""
    y: Tensor = _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    """``x W^T`` of ``x (batch, in)`` and ``W (out, in)``, or of stacks of both.

    torch's own gives a stacked weight's gradient transposed, which it then copies into place at great cost.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """``(batch, out)``."""
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep both for the gradients."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``G W`` and ``G^T x``, the latter with the fewer rows first: narrow products are slow."""
        x, weight = ctx.saved_tensors
        is_wide = weight.shape[-1] >= weight.shape[-2]
        to_x, to_weight = ctx.needs_input_grad
        return (
            gradient @ weight if to_x else None,
            (gradient.mT @ x if is_wide else (x.mT @ gradient).mT) if to_weight else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        """Over stacks."""
        stacks = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((x, weight), in_dims, strict=True)
        ]
        return _Product.apply(*stacks), 0  # type: ignore[no-untyped-call]  # torch's is untyped


def _look_up(x: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    y = functional.embedding(x, weight)
    return y if padding_idx is None else torch.where((x == padding_idx)[..., None], y.detach(), y)
