"""Layers that many clients go through at once: each with tensors of its own, or with the one frozen tensor of all.

Clients' samples lie side by side, ``x (clients * batch, ...)``, the first client's first, so that whatever treats
samples alike (activations, pooling, normalisation, attention, frozen layers) needs to know nothing of clients. Where
the clients have tensors of their own, these are stacked, ``(clients, ...)``, and the functions here apply each to its
client's samples.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

_FAST_CHANNELS = 8  # oneDNN's grouped convolution is up to four times slower where a group has fewer outputs


class Stacked(nn.Module):
    """A layer with tensors that each client has for itself.

    Attributes:
        clients: how many clients' samples the input holds and the layer's own tensors are stacked for; 0 where there
            is one client, whose tensors have no axis for it.
        own: names of the parameters that clients have for themselves.
        channels_last: whether images are to lie in memory so; see `channels_last`.
    """

    clients = 0
    channels_last = False
    own: frozenset[str] = frozenset()


class StackedLinear(Stacked, nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        if not self.clients:
            return super().forward(input)
        y = linear(input, self.weight, self.clients) if "weight" in self.own else functional.linear(input, self.weight)
        return plus_bias(y, self.bias, is_own="bias" in self.own, axis=-1)


class StackedConvolution(Stacked):
    """A convolution; the plain layer's class is added to its bases."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        assert isinstance(self, nn.Conv1d | nn.Conv2d)
        y: Tensor
        if not self.clients:
            y = super().forward(input)
            return y
        if "weight" in self.own:
            y = convolution(self, input, self.weight, self.clients)
        else:
            y = self._conv_forward(input, self.weight, None)
        return plus_bias(y, self.bias, is_own="bias" in self.own, axis=1)


class StackedNorm(Stacked):
    """A group or layer normalisation; the plain layer's class is added to its bases."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        y: Tensor
        if not self.clients:
            y = super().forward(input)
            return y
        if isinstance(self, nn.GroupNorm):
            y, axis = functional.group_norm(input, self.num_groups, eps=self.eps), 1
        else:
            assert isinstance(self, nn.LayerNorm)
            y, axis = functional.layer_norm(input, self.normalized_shape, eps=self.eps), -1
        for name, parameter in self._parameters.items():  # the weight, then the bias
            if parameter is not None:
                rows = parameter if name in self.own else parameter[None]
                each = per_sample(rows, len(y), y.dim(), axis=axis)
                y = y * each if name == "weight" else y + each
        return y


class StackedEmbedding(Stacked, nn.Embedding):
    """An embedding; its padding row gets no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer."""
        return look_up(input, self.weight, self.padding_idx, self.clients if "weight" in self.own else 0)


class StackedModule(Stacked):
    """Any other module with parameters of its own, computed by `torch.func.vmap`; its class is added to its bases."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the plain module; tensors are taken to have their samples first."""
        clients = self.clients
        if not clients:
            return super().forward(*inputs, **named)
        parts = [part for part in self.modules() if isinstance(part, Stacked)]
        named_parameters = self.named_parameters(remove_duplicate=False)
        own: dict[str, Tensor] = {name: parameter for name, parameter in named_parameters if name in self.own}

        def one(own: dict[str, Tensor], inputs: Any, named: Any) -> Any:
            return functional_call(self, own, inputs, named, tie_weights=False)

        for part in parts:
            part.clients = 0
        try:
            split, dims = _split((inputs, named), clients)
            outputs = vmap(one, in_dims=(0, *dims))(own, *split)
        finally:
            for part in parts:
                part.clients = clients
        return torch.utils._pytree.tree_map(lambda y: y.flatten(0, 1), outputs)


def _split(tree: Any, clients: int) -> tuple[Any, Any]:
    """Divide every tensor's samples among the clients; what is not a tensor goes to each."""
    split = torch.utils._pytree.tree_map_only(Tensor, lambda x: _apart(x, clients), tree)
    return split, torch.utils._pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, split)


_FORMS: dict[type[nn.Module], type[Stacked]] = {
    nn.Conv1d: StackedConvolution,
    nn.Conv2d: StackedConvolution,
    nn.GroupNorm: StackedNorm,
    nn.LayerNorm: StackedNorm,
}


def stack(module: nn.Module, own: frozenset[str]) -> None:
    """Turn a module into one whose parameters ``own`` each client has for itself, its class included."""
    plain = type(module)
    if isinstance(module, StackedModule):
        pass  # it is one already, of fewer parameters
    elif plain in (nn.Linear, nn.Embedding):
        module.__class__ = StackedLinear if plain is nn.Linear else StackedEmbedding
    else:
        module.__class__ = type(plain.__name__, (_FORMS.get(plain, StackedModule), plain), {})
    module.own = own  # type: ignore[assignment]  # it is a `Stacked` now


def _apart(x: Tensor, clients: int) -> Tensor:
    """``(clients * batch, ...)`` as ``(clients, batch, ...)``."""
    return x.reshape(clients, len(x) // clients, *x.shape[1:])


def per_sample(own: Tensor, samples: int, dim: int, *, axis: int) -> Tensor:
    """Give each of ``samples`` samples its client's row of ``own (clients, ...)``, to be broadcast.

    Args:
        own: stacked over clients; or of one row, for all.
        samples: how many there are.
        dim: of the tensor that it is for.
        axis: of that tensor where the rows' first axis belongs (1), or where their last does (-1).
    """
    rows = own.dim() - 1
    gap = dim - 1 - rows
    shape = (len(own), 1, *own.shape[1:], *(1,) * gap) if axis == 1 else (len(own), 1, *(1,) * gap, *own.shape[1:])
    each = own.reshape(shape)
    return each.expand(-1, samples // len(own), *each.shape[2:]).reshape(samples, *each.shape[2:])


def plus_bias(y: Tensor, bias: Tensor | None, *, is_own: bool, axis: int) -> Tensor:
    """Add a bias, the clients' own ``(clients, out)`` or the one of all; for ``axis`` see `per_sample`."""
    return y if bias is None else y + per_sample(bias if is_own else bias[None], len(y), y.dim(), axis=axis)


def channels_last(x: Tensor) -> Tensor:
    """Images ``(batch, channels, height, width)`` with their channels side by side in memory; others as they are.

    On a CPU pooling takes a tenth of the time, and convolutions with what is around them three quarters.
    """
    if x.dim() != 4:
        return x
    if x.shape[1] == 1:  # torch would take either order for the other
        return x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def linear(x: Tensor, weight: Tensor, clients: int) -> Tensor:
    """``x W^T`` of ``x (clients * batch, ..., in)`` and stacked ``W (clients, out, in)``."""
    rows = x.reshape(clients, -1, x.shape[-1])
    # Autocast has no say within a function's backward pass, so there torch's own is used.
    is_mixed = torch.is_autocast_enabled(x.device.type)
    y: Tensor = rows @ weight.mT if is_mixed else _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], weight.shape[1])


def convolution(module: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor, clients: int) -> Tensor:
    """What ``module`` computes without bias, with stacked weights ``(clients, out, in, *kernel)`` of any ``out``."""
    outputs = weight.shape[1]
    if module.groups == 1:
        missing = -outputs % _FAST_CHANNELS
        weight = functional.pad(weight, (0, 0) * (weight.dim() - 2) + (0, missing))
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    beside = _apart(x, clients).transpose(0, 1).flatten(1, 2)
    compute = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
    y = compute(beside, weight.flatten(0, 1), None, module.stride, padding, module.dilation, clients * module.groups)
    there = y.view(len(y), clients, -1, *y.shape[2:])[:, :, :outputs].transpose(0, 1)
    if not (isinstance(module, Stacked) and module.channels_last):
        return there.flatten(0, 1)
    return there.movedim(2, -1).flatten(0, 1).movedim(-1, 1)


def pointwise(x: Tensor, weight: Tensor, clients: int) -> Tensor:
    """A convolution of kernel 1 over ``x (clients * batch, in, ...)`` with stacked ``W (clients, out, in)``."""
    return linear(x.movedim(1, -1), weight, clients).movedim(-1, 1)


def look_up(x: Tensor, weight: Tensor, padding_idx: int | None, clients: int = 0) -> Tensor:
    """Rows of ``weight (entries, width)``, or of the client's own of ``(clients, entries, width)``.

    Raises:
        IndexError: on the CPU, as torch does, if there is no such row; another device does not tell.
    """
    if clients:
        if x.device.type == "cpu" and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < weight.shape[1]:
            raise IndexError(
                f"index out of range: {int(x.min())} to {int(x.max())} in a table of {weight.shape[1]} rows"
            )
        first = torch.arange(0, clients * weight.shape[1], weight.shape[1], device=x.device)
        rows = x + per_sample(first, len(x), x.dim(), axis=1)
        y = functional.embedding(rows, weight.flatten(0, 1))
    else:
        y = functional.embedding(x, weight)
    return y if padding_idx is None else torch.where((x == padding_idx)[..., None], y.detach(), y)


class _Product(torch.autograd.Function):
    """``x W^T`` of stacked ``x (clients, rows, in)`` and ``W (clients, out, in)``.

    torch's own gives a stacked weight's gradient transposed, which it then copies into place at great cost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``(clients, rows, out)``."""
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

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
