r"""A model as a function of its tensors, with low-rank layers of our own: what many clients' training is batched over.

A factorised layer computes, from the tensors of `layout.shapes` and the frozen ``W``,

.. math:: y = W x + b + s B' A' x + s_p B_p A_p x, \quad A' = A + s_A A_d A_u, \quad B' = B + s_B B_d B_u

or, for the family ``loha``, ``y = (W + s (w1_a w1_b) * (w2_a w2_b)) x + b``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.lowrank import FactorisedLayer
from fedloru_flwr.models import stacked
from fedloru_flwr.models.layout import Layout, nested_keys, personal_keys, shapes, shared_keys
from fedloru_flwr.models.plan import canonical_names


class FunctionalModel:
    """A model that takes its tensors as arguments, for one client or for many at once.

    It is built from a copy of ``module``, by default in training mode. Not to be called from several threads at once.

    Args:
        module: the plain model; it is not changed.
        layers: its factorised layers.
        layout: what each of them holds; needed where there are layers.
        dense_leaves: parameters that each client has for itself.
        side_by_side: whether clients' samples may go through the model side by side; else it is left to `torch.func`.
        training: whether dropout drops and batch normalisation uses the batch's statistics.

    Attributes:
        keys: of a client's values, in order: adapter tensors, then dense leaves.
        base_keys: parameters that all clients share, by the plain model's names.
        buffers: of the plain model, by name; as the copy holds them.
        layers: the factorised layers.
        step_bytes: about the memory of one client's training step, by shape and device, as whoever trains found it.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[FactorisedLayer] = (),
        layout: Layout | None = None,
        dense_leaves: Sequence[str] = (),
        *,
        side_by_side: bool = True,
        training: bool = True,
    ) -> None:
        self._module = copy.deepcopy(module).train(training).requires_grad_(False)
        self.layers = tuple(layers)
        self.buffers = dict(self._module.named_buffers())
        adapters: list[str] = []
        plain = [name for name, _ in self._module.named_parameters()]
        own = {name for name, key in canonical_names(self._module).items() if key in set(dense_leaves)}
        for layer in self.layers:
            if layout is None:
                raise ValueError("a model with factorised layers needs their layout")
            adapters += _factorise(self._module.get_submodule(layer.name), layer, layout)
        self.keys = (*adapters, *dense_leaves)
        self.base_keys = tuple(name for name in plain if name not in set(dense_leaves))
        self.step_bytes: dict[object, int] = {}
        self._names = canonical_names(self._module)
        self._own = frozenset(own.union(adapters))
        self._is_tried = not side_by_side
        self._channels_last: bool | None = None
        _stack_parts(self._module, self._own)
        self._parts = self._stacked_parts()
        self._form: tuple[int, bool] | None = None  # what the parts have been told: clients, channels last
        if not side_by_side:
            self._keep_apart()

    def forward(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs ``(batch, classes)`` of one client.

        Args:
            values: the client's tensors, by `keys`.
            base: everything else, by the plain model's names: `base_keys`, and buffers that differ from `buffers`.
            x: ``(batch, *input_shape)``.
        """
        with self.holding(values, base) as outputs:
            return outputs(x)

    def forward_clients(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs ``(clients, batch, classes)`` of clients whose ``values`` and ``x`` are stacked; one base.

        One client alone is computed by torch's own kernels for one.
        """
        with self.holding_clients(values, base, len(x)) as outputs:
            return outputs(x)

    def forward_stacked(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """As `forward_clients`, also where there is a single client.

        The clients' samples go through the model side by side where that gives what each has alone, which is tried
        once; else, as where a model's forward pass reads a client's tensors outside of the layers that hold them, the
        whole model is computed by `torch.func.vmap`.
        """
        with self._holding_stacked(values, base, len(x)) as outputs:
            return outputs(x)

    @contextmanager
    def holding(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """`forward` for many inputs: gives the function from ``x`` to outputs, to be used inside the ``with``.

        The tensors may be changed in place meanwhile. Nothing else may use this model then.
        """
        tensors = self._by_name(values, base)
        with self._installed(tensors):
            yield lambda x: self._compute(x, 0)

    @contextmanager
    def as_module(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The model of one client as a module, to be called inside the ``with`` with whatever the plain model takes.

        Pairs may be of any rank. The arguments are those of `forward`.
        """
        self._form = 0, False
        for part in self._parts:
            part.clients, part.channels_last = self._form
        with self._installed(self._by_name(values, base)):
            yield self._module

    @contextmanager
    def holding_clients(
        self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], clients: int
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """`forward_clients` for many inputs, as `holding` is `forward`."""
        if clients == 1:  # its tensors are views of those that are changed, and made anew each time
            yield lambda x: self.forward({key: value[0] for key, value in values.items()}, base, x[0])[None]
            return
        with self._holding_stacked(values, base, clients) as outputs:
            yield outputs

    @contextmanager
    def _holding_stacked(
        self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], clients: int
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        tensors = self._by_name(values, base)
        with ExitStack() as held:
            if self._is_tried:
                held.enter_context(self._installed(tensors))

            def outputs(x: Tensor) -> Tensor:
                if not self._is_tried:
                    if not self._can_lie_side_by_side(values, base, x):
                        self._keep_apart()
                    self._is_tried = True
                    held.enter_context(self._installed(tensors))
                found = self._compute(x.flatten(0, 1), clients)
                return found.view(*x.shape[:2], *found.shape[1:])

            yield outputs

    def _keep_apart(self) -> None:
        """Compute the whole model by `torch.func.vmap`."""
        stacked.stack(self._module, self._own)
        self._parts, self._form = self._stacked_parts(), None

    def _stacked_parts(self) -> list[stacked.Stacked]:
        return [part for part in self._module.modules() if isinstance(part, stacked.Stacked)]

    def _by_name(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by the names that the module has for them."""
        tensors = {name: values[key] if key in values else base[key] for name, key in self._names.items()}
        return tensors | {name: base[name] for name in self.buffers if name in base}

    @contextmanager
    def _installed(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the module hold these tensors in place of its own; `torch.func.functional_call` for many calls."""
        before: list[tuple[dict[str, Any], str, Tensor | None]] = []
        try:
            for name, tensor in tensors.items():
                owner, _, local = name.rpartition(".")
                part = self._module.get_submodule(owner)
                place: dict[str, Any] = part._parameters if local in part._parameters else part._buffers
                before.append((place, local, place[local]))
                place[local] = tensor
            yield
        finally:
            for place, local, tensor_before in reversed(before):
                place[local] = tensor_before

    def _compute(self, x: Tensor, clients: int, channels_last: bool | None = None) -> Tensor:
        """The outputs with the tensors that are installed, of so many clients side by side; of one alone with 0."""
        if channels_last is None:
            if self._channels_last is None:
                self._channels_last = x.dim() == 4 and self._takes_channels_last(x, clients)
            channels_last = self._channels_last
        if self._form != (clients, channels_last):
            self._form = clients, channels_last
            for part in self._parts:
                part.clients, part.channels_last = self._form
        outputs: Tensor = self._module(stacked.channels_last(x) if channels_last else x)
        return outputs

    def _takes_channels_last(self, x: Tensor, clients: int) -> bool:
        """Whether the model takes images in that order; ``Tensor.view`` for one does not."""
        with _trial(x):
            try:
                self._compute(x[: max(1, clients)], clients, channels_last=True)
            except Exception:  # whatever it is, it is not met in the usual order
                return False
        return True

    def _can_lie_side_by_side(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor], x: Tensor) -> bool:
        """Whether two clients with tensors and samples near those given get the outputs that each has alone."""
        noise = torch.Generator().manual_seed(0)

        def near(tensor: Tensor) -> Tensor:
            return tensor + 0.1 * torch.randn(tensor.shape, generator=noise).to(tensor)

        with _trial(x):
            two = {key: near(value[[0, -1]]) for key, value in values.items()}
            few = torch.stack([x[0, :2], x[-1].flip(0)[:2]])
            few = near(few) if x.is_floating_point() else few
            alone = [self.forward({key: value[i] for key, value in two.items()}, base, few[i]) for i in range(2)]
            try:
                with self._installed(self._by_name(two, base)):
                    together = self._compute(few.flatten(0, 1), 2)
            except Exception:  # whatever it is, it is not met where the clients are kept apart
                return False
        expected = torch.cat(alone)
        if together.shape != expected.shape:
            return False
        return bool((together - expected).norm() <= 1e-3 * expected.norm() + 1e-6)


@contextmanager
def _trial(x: Tensor) -> Iterator[None]:
    """A forward pass of which nothing stays: no gradients, no draws from the global generators, no autocast."""
    kind = x.device.type
    devices = [x.device] if kind == "cuda" else []
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices=devices), plain:
        yield


def _stack_parts(module: nn.Module, own: frozenset[str], prefix: str = "") -> None:
    """Have every part of the module that holds parameters ``own`` compute with stacked ones."""
    direct = frozenset(name for name in module._parameters if prefix + name in own)
    if isinstance(module, stacked.Stacked):
        module.own = direct
    elif direct and any(True for _ in module.children()):  # it may use its parts' tensors as it likes
        below = frozenset(name.removeprefix(prefix) for name in own if name.startswith(prefix))
        _stack_children(module, own, prefix)
        stacked.stack(module, below)
        return
    elif direct:
        stacked.stack(module, direct)
    _stack_children(module, own, prefix)


def _stack_children(module: nn.Module, own: frozenset[str], prefix: str) -> None:
    for name, child in module.named_children():
        _stack_parts(child, own, f"{prefix}{name}.")


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


class _Factorised(stacked.Stacked):
    """A linear, convolutional or embedding layer with adapters; a plain layer's class is added to its bases."""

    layer: FactorisedLayer
    layout: Layout

    def forward(self, x: Tensor) -> Tensor:
        """As the plain layer."""
        weight, bias = self._value("weight"), self._parameters.get("bias")
        if self.clients:
            return self._forward_stacked(x, weight, bias)
        if self.layout.family == "loha":
            weight = weight + self._hadamard()
        pair = self._pair()
        if pair is not None and self.layer.kind != "embedding" and weight.numel() <= _SMALL_WEIGHT:
            weight, pair = weight + self.layer.as_weight(pair[1] @ pair[0]), None
        y = _apply(self, self.layer, x, weight, bias)
        if pair is None:
            return y
        a, b = pair
        if self.layer.kind in ("conv1d", "conv2d"):
            inner = _apply(self, self.layer, x, a.reshape(-1, *self.layer.a_shape()[1:]), None)
            point = functional.conv1d if self.layer.kind == "conv1d" else functional.conv2d
            return y + point(inner, b.reshape(*b.shape, *(1,) * (inner.dim() - 2)))
        return y + functional.linear(_apply(self, self.layer, x, a.T if self.layer.transposed else a, None), b)

    def _forward_stacked(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With the clients' samples side by side, and tensors stacked except for ``weight``."""
        is_own, axis = "bias" in self.own, 1 if isinstance(self, _CONVOLUTIONS) else -1
        if self.layout.family == "loha":
            y = stacked.plus_bias(self._apply_stacked(x, weight + self._hadamard()), bias, is_own=is_own, axis=axis)
        else:
            here = stacked.channels_last(x) if self.channels_last and isinstance(self, nn.Conv2d) else x
            y = _apply(self, self.layer, here, weight, None if is_own else bias)
            y = stacked.plus_bias(y, bias if is_own else None, is_own=is_own, axis=axis)
        pair = self._pair()
        if pair is None:
            return y
        a, b = pair
        if isinstance(self, _CONVOLUTIONS):
            inner = self._apply_stacked(x, a.reshape(*a.shape[:2], *self.layer.a_shape()[1:]))
            return y + stacked.pointwise(inner, b, self.clients)
        inner = self._apply_stacked(x, a.mT if self.layer.transposed else a)
        return y + stacked.linear(inner, b, self.clients)

    def _apply_stacked(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the plain layer computes without bias, with stacked weights in their stored form."""
        if isinstance(self, _CONVOLUTIONS):
            return stacked.convolution(self, x, weight, self.clients)
        if isinstance(self, nn.Embedding):
            return stacked.look_up(x, weight, self.padding_idx, self.clients)
        return stacked.linear(x, weight.mT if self.layer.transposed else weight, self.clients)

    def _value(self, key: str) -> Tensor:
        value: Tensor | None = self._parameters[key.removeprefix(f"{self.layer.name}.")]
        assert value is not None
        return value

    def _hadamard(self) -> Tensor:
        """``s (w1_a w1_b) * (w2_a w2_b)`` in the shape of the stored weight."""
        w1_a, w1_b, w2_a, w2_b = (self._value(key) for key in shared_keys(self.layer, "loha"))
        product = self.layout.scale * (w1_a @ w1_b) * (w2_a @ w2_b)
        if self.layer.transposed:
            return product.mT.contiguous()
        return product.reshape(*product.shape[:-2], *self.layer.weight_shape)

    def _pair(self) -> tuple[Tensor, Tensor] | None:
        """Matrices ``A`` and ``B``, the scale in ``B``, whose product is the low-rank part of the weight."""
        layer, layout, pairs = self.layer, self.layout, []
        if layout.family == "lora":
            a, b = self._matrices(*shared_keys(layer, "lora"))
            if layout.nested_rank:
                a_down, a_up, b_down, b_up = nested_keys(layer)
                a = a + layout.nested_scale * (self._value(a_down) @ self._matrix(a_up))
                b = b + layout.nested_scale * (self._matrix(b_down) @ self._value(b_up))
            pairs.append((a, layout.scale * b))
        if layout.personal_rank:
            a, b = self._matrices(*personal_keys(layer))
            pairs.append((a, layout.personal_scale * b))
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        # Pairs side by side are one pair of a higher rank.
        return torch.cat([a for a, _ in pairs], dim=-2), torch.cat([b for _, b in pairs], dim=-1)

    def _matrices(self, a_key: str, b_key: str) -> tuple[Tensor, Tensor]:
        return self._matrix(a_key), self._matrix(b_key)

    def _matrix(self, key: str) -> Tensor:
        """A factor ``(rows, columns, ...)`` as a matrix, one a client where they are stacked."""
        return self._value(key).flatten(2 if self.clients else 1)


# Up to here a layer by itself is faster with W + s B A than with three products: measured for convolutions and linear
# layers on a CPU, where the two meet between 16,000 and 36,000 numbers for any batch.
_SMALL_WEIGHT = 20_000
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def _apply(module: nn.Module, layer: FactorisedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the plain layer computes, with another weight (any number of outputs) in its stored form.

    Args:
        module: gives stride, padding and the like.
        layer: its kind.
        x: the input.
        weight: the weight.
        bias: the bias.
    """
    if isinstance(module, _CONVOLUTIONS):
        return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]  # torch's is untyped
    if isinstance(module, nn.Embedding):
        return stacked.look_up(x, weight, module.padding_idx)
    if layer.transposed:
        return x @ weight if bias is None else x @ weight + bias
    return functional.linear(x, weight, bias)
