"""Which parts of a model are factorised, trained densely, averaged as statistics, or left frozen.

The plan is a function of the plain model and a few settings alone, so the server and every client make the same one,
and only the settings travel.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedloru_flwr.lowrank import (
    Adapter,
    FactorisedLayer,
    derive_seed,
    frozen_a,
    initial_factors,
    initial_hadamard,
    seeded,
)
from fedloru_flwr.lowrank.factors import Kind
from fedloru_flwr.lowrank.forms import FORMS, Family, Form
from fedloru_flwr.models.layout import Layout, shared_keys

TargetModules = str | Sequence[str] | None
_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Embedding, "embedding"),
)
TYPE_NAMES = ("Linear", "Conv1d", "Conv2d", "Embedding", "Conv1D")
_TRANSPOSED_LINEAR = "Conv1D"  # transformers' GPT-2 layer: a linear layer that stores (in, out)
_HEAD_SHARE = 0.25


class PlanError(ValueError):
    """The settings cannot be applied to the model."""


@dataclass(frozen=True)
class AdapterPlan:
    """What of a model travels, and as what.

    A plan has a **form**:

    - ``full``: nothing is factorised; every trainable parameter is a dense leaf.
    - ``factors``: pairs ``A``, ``B`` beside a frozen ``W`` (LoRA).
    - ``hadamard``: the four parts of a Hadamard product beside it (LoHa).
    - ``one-sided``, ``one-sided-orthonormal``: ``A`` is drawn from the run's seed, only ``B`` is trained.
    - ``from-zero``: as ``factors``, but ``W = 0``: the pair is the whole weight (FedHM).
    - ``compressed``: every parameter is trained as it is, and the layers' updates are sent as pairs.

    Attributes:
        layers: the factorised layers, in the model's order.
        dense_leaves: parameters trained as they are (norms, biases, stem, head), in the model's order.
        statistics: running means and variances of normalisation layers, averaged and never stepped.
        base: the frozen rest of the parameters, among them the factorised weights ``W``.
        scale: ``s = alpha / rank``.
        notes: what was left dense and why, for people.
        form: see above.
    """

    layers: tuple[FactorisedLayer, ...]
    dense_leaves: tuple[str, ...]
    statistics: tuple[str, ...]
    base: tuple[str, ...]
    scale: float
    notes: tuple[str, ...] = ()
    form: Form = "factors"

    @cached_property
    def family(self) -> Family:
        """The adapters' family."""
        return "loha" if self.form == "hadamard" else "lora"

    @cached_property
    def one_sided(self) -> bool:
        """Whether ``A`` is drawn, not trained."""
        return self.form in ("one-sided", "one-sided-orthonormal")

    @cached_property
    def adapted(self) -> tuple[FactorisedLayer, ...]:
        """The layers that have adapters while a client trains."""
        return () if self.form == "compressed" else self.layers

    @cached_property
    def factor_keys(self) -> tuple[str, ...]:
        """Keys of the adapter that is trained: ``A`` then ``B`` of each layer, in the plain form."""
        if self.one_sided:
            return tuple(layer.b_key for layer in self.layers)
        return tuple(key for layer in self.adapted for key in shared_keys(layer, self.family))

    @cached_property
    def trainable_keys(self) -> tuple[str, ...]:
        """Keys of the Trainables in their fixed order: the adapter, then the dense leaves."""
        return (*self.factor_keys, *self.dense_leaves)

    def layout(self, rank: int | None = None) -> Layout:
        """What a client's model of this rank (by default the layers' own) holds beside the base."""
        own = self.adapted[0].rank if self.adapted else 0
        return Layout(rank=own if rank is None or not own else rank, scale=self.scale, family=self.family)

    def base_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frozen parameters among a plain model's values, as this form starts from them."""
        zero = {layer.weight_key for layer in self.layers} if self.form == "from-zero" else set()
        return {name: torch.zeros_like(values[name]) if name in zero else values[name] for name in self.base}

    def fresh(self, seed: int, draw: int, rank: int | None = None) -> Adapter:
        """A fresh adapter, of product zero: the keys are `factor_keys`.

        Args:
            seed: the run's seed.
            draw: the number of restarts so far.
            rank: another rank than the layers'.
        """
        if self.form == "hadamard":
            return initial_hadamard(self.adapted, seed, draw)
        if self.one_sided:
            return {layer.b_key: torch.zeros(layer.b_shape(rank), dtype=layer.dtype) for layer in self.layers}
        return initial_factors(self.adapted, seed, draw, rank=rank)

    def fresh_like(self, shapes: Mapping[str, Sequence[int]], seed: int, draw: int, rank: int) -> Adapter:
        """The fresh factors that have these shapes: of a client's own rank, or of the rank that all share."""
        found: Adapter = {}
        if any(key in shapes for key in self.factor_keys):
            for of in {rank or None, None}:
                found |= {k: v for k, v in self.fresh(seed, draw, of).items() if tuple(v.shape) == shapes.get(k)}
        return found

    def with_fresh(
        self, received: Mapping[str, Tensor], seed: int, draw: int, rank: int | None = None
    ) -> dict[str, Tensor]:
        """What a client received and, where there was no factor in it, factors as they are drawn; see `fresh`."""
        if not self.factor_keys or any(key in received for key in self.factor_keys):
            return dict(received)
        return {**received, **self.fresh(seed, draw, rank)}

    def whole(self, adapter: Mapping[str, Tensor], seed: int, draw: int) -> dict[str, Tensor]:
        """An adapter with what is drawn and not sent: a one-sided method's ``A``, of the rank that ``B`` has."""
        if not self.one_sided or not adapter:
            return dict(adapter)
        drawn: Adapter = {}
        for layer in self.layers:
            if layer.b_key not in adapter:
                continue  # not a factor pair
            b = adapter[layer.b_key]
            a = frozen_a([layer], seed, draw, orthonormal=self.form == "one-sided-orthonormal", rank=b.shape[1])
            drawn |= {key: value.to(b.dtype) for key, value in a.items()}
        return {**drawn, **adapter}


def _is_transposed_linear(module: nn.Module) -> bool:
    return type(module).__name__ == _TRANSPOSED_LINEAR and type(module).__module__.startswith("transformers.")


def _kind(module: nn.Module) -> Kind | None:
    if _is_transposed_linear(module):
        return "linear"
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer computes what torch's own class does, and PEFT can build a factor of its class."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return type(module) in (nn.Conv1d, nn.Conv2d)
    return all(type(module).forward is cls.forward for cls, _ in _KINDS if isinstance(module, cls))


def _obstacle(name: str, module: nn.Module, shared: dict[int, list[str]], inside_attention: set[str]) -> str | None:
    """Why this layer cannot be factorised safely, or None."""
    if not name:
        return "it is the whole model and only layers inside one can be replaced (wrap it in nn.Sequential)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (parametrisation or weight norm)"
    if name in inside_attention:
        return "nn.MultiheadAttention reads its weight directly, so that factors would get no gradient"
    if not _is_plain(module):
        return f"its class {type(module).__name__} changes what the layer computes or how it is built"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        return f"it is a grouped convolution (groups={module.groups}), whose product cannot be folded"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "its gradients are sparse, which its factors' are not"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it renormalises its rows in place (max_norm)"
    if len(shared[id(weight)]) > 1:
        others = [other for other in shared[id(weight)] if other != f"{name}.weight"]
        return f"its weight is shared with {', '.join(others) or 'another place in the model'}"
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}"
    return None


def _layer(name: str, module: nn.Module, kind: Kind, rank: int) -> FactorisedLayer:
    transposed = kind == "embedding" or _is_transposed_linear(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return FactorisedLayer(name, kind, tuple(weight.shape), rank, transposed, dtype)


def as_names(target_modules: TargetModules) -> tuple[str, ...]:
    """A comma-separated string or a sequence of names as a tuple; None and ``"auto"`` are empty."""
    if target_modules is None:
        return ()
    parts = target_modules.split(",") if isinstance(target_modules, str) else list(target_modules)
    names = tuple(part.strip() for part in parts if part.strip())
    return () if names in ((), ("auto",)) else names


def _matches(target: str, name: str, module: nn.Module) -> bool:
    if target in TYPE_NAMES:
        return type(module).__name__ == target or (
            target != _TRANSPOSED_LINEAR and isinstance(module, getattr(nn, target))
        )
    return name == target or name.endswith(f".{target}")


def _head(candidates: list[tuple[str, nn.Module]], total: int) -> str | None:
    """The output layer, where it is a small part of the model: the last linear layer of the model."""
    linear = [(name, module) for name, module in candidates if isinstance(module, nn.Linear)]
    if len(candidates) < 2 or not linear:
        return None
    name, module = linear[-1]
    is_last = name == candidates[-1][0]
    # The features, since reading a parametrised weight computes it and may move its buffers.
    return name if is_last and module.in_features * module.out_features <= _HEAD_SHARE * total else None


def plan_adapter(
    model: nn.Module,
    rank: int,
    alpha: float,
    target_modules: TargetModules = None,
    dense_leaves: str | Sequence[str] = "all",
) -> AdapterPlan:
    r"""Choose the layers to factorise and sort the rest of the model.

    Without ``target_modules`` (or with ``"auto"``) a linear, convolutional or embedding layer is factorised if it is
    trainable, both its dimensions exceed the rank, ``r (in + out) <= in out / 2`` (factors halve its bytes at least),
    and nothing makes it unsafe; the output layer stays dense unless it holds more than a quarter of the model's
    parameters. Where no layer's bytes can be halved, those whose dimensions exceed the rank are taken all the same.
    With ``target_modules``, exactly the named layers are: names or dotted suffixes (``"fc1"``,
    ``"layer1.0.conv1"``) and types (``"Linear"``, ``"Conv2d"``, ``"Embedding"``, GPT-2's ``"Conv1D"``).

    Args:
        model: the plain model; it is not changed.
        rank: ``r``, at least 1.
        alpha: LoRA's alpha; the scale is ``alpha / r``.
        target_modules: a comma-separated string or a sequence, see above.
        dense_leaves: ``"all"`` trains every other trainable parameter as it is, ``"none"`` freezes them, names or
            dotted prefixes choose.

    Raises:
        PlanError: for a rank or alpha that is not positive, a target that matches no layer or one that cannot be
            factorised, when no layer is left to factorise, and for a model that has lazy parameters or already
            carries PEFT's layers.
    """
    if rank < 1:
        raise PlanError(f"rank must be at least 1, got {rank}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise PlanError(f"alpha must be a positive number, got {alpha}")
    _check_initialised(model)
    for name, module in model.named_modules():
        if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            raise PlanError(
                f"the model already carries PEFT's layers ({name or type(module).__name__}): pass the plain model "
                "(PEFT's merge_and_unload() returns it, with its gradients off)"
            )
    shared, inside_attention = _shared_names(model), _inside_attention(model)
    candidates = [(name, module) for name, module in model.named_modules() if _kind(module) is not None]
    targets = as_names(target_modules)
    chosen: list[FactorisedLayer] = []
    unprofitable: list[FactorisedLayer] = []
    notes: list[str] = []
    if targets:
        matched = {target: [n for n, m in candidates if _matches(target, n, m)] for target in targets}
        for target, names in matched.items():
            if not names:
                found = ", ".join(name for name, _ in candidates) or "none"
                raise PlanError(
                    f"target-modules: {target!r} matches no linear, convolutional or embedding layer; the model has: "
                    f"{found}. Name one of them, a type ({', '.join(TYPE_NAMES)}), or leave it at 'auto'"
                )
        wanted = {name for names in matched.values() for name in names}
    else:
        total = sum(parameter.numel() for parameter in model.parameters())
        head = _head(candidates, total)
        wanted = set()
        for name, module in candidates:
            weight = module._parameters.get("weight")
            if name == head:
                notes.append(f"{name}: the output layer stays dense")
            elif weight is not None and not weight.requires_grad:
                notes.append(f"{name}: frozen in the model, left so; name it in target-modules to train it")
            else:
                wanted.add(name)
    for name, module in candidates:
        if name not in wanted:
            continue
        kind = _kind(module)
        assert kind is not None
        obstacle = _obstacle(name, module, shared, inside_attention)
        if obstacle is not None:
            by_name = any(_matches(target, name, module) for target in targets if target not in TYPE_NAMES)
            if by_name:
                raise PlanError(f"target-modules: {name!r} cannot be factorised, since {obstacle}; leave it out")
            notes.append(f"{name or type(module).__name__}: stays dense, since {obstacle}")
            continue
        layer = _layer(name, module, kind, rank)
        if layer.max_rank <= rank:
            size = f"{layer.out_features} x {layer.in_features}"
            notes.append(f"{name}: stays dense, its dimensions ({size}) do not exceed the rank {rank}")
        elif not targets and 2 * rank * (layer.out_features + layer.in_features) > math.prod(layer.weight_shape):
            unprofitable.append(layer)
        else:
            chosen.append(layer)
    if chosen:
        notes += [f"{n.name}: stays dense, factors of rank {rank} would not halve its bytes" for n in unprofitable]
    else:
        chosen = unprofitable
        notes += [
            f"{layer.name}: factors of rank {rank} hold more numbers than the layer itself"
            for layer in unprofitable
            if rank * (layer.out_features + layer.in_features) > math.prod(layer.weight_shape)
        ]
    if not chosen:
        why = "; ".join(notes) or "the model has no linear, convolutional or embedding layer"
        raise PlanError(f"no layer is left to factorise at rank {rank}: {why}. Lower the rank or name target-modules")
    return _sort_rest(model, tuple(chosen), alpha / rank, dense_leaves, tuple(notes))


def plan_model(
    model: nn.Module,
    form: Form,
    rank: int,
    alpha: float,
    target_modules: TargetModules,
    dense_leaves: str | Sequence[str],
) -> AdapterPlan:
    """The plan that a run's settings ask for: `plan_adapter`, or `plan_full` for the form ``full``.

    Raises:
        PlanError: see `plan_adapter`; or a layer cannot have the form's adapters.
    """
    if form not in FORMS:
        raise PlanError(f"unknown form of adapters {form!r}: expected one of {', '.join(FORMS)}")
    if form == "full":
        return plan_full(model)
    if form == "compressed":
        plan = plan_adapter(model, rank, alpha, target_modules, dense_leaves)
        trained = {*plan.dense_leaves, *(layer.weight_key for layer in plan.layers)}
        names = [name for name, _ in model.named_parameters()]
        return replace(
            plan,
            dense_leaves=tuple(name for name in names if name in trained),
            base=tuple(name for name in names if name not in trained),
            scale=1.0,
            form=form,
        )
    plan = plan_adapter(model, rank, alpha, target_modules, dense_leaves)
    if form == "hadamard":
        odd = [layer.name for layer in plan.layers if layer.kind == "embedding" or layer.transposed]
        if odd:
            raise PlanError(
                f"target-modules: {', '.join(odd)} cannot have Hadamard factors (PEFT's LoHa knows linear and "
                "convolutional layers): leave them out, or use factors"
            )
    return replace(plan, form=form, scale=1.0 if form == "from-zero" else plan.scale)


def plan_recorded(
    model: nn.Module, form: Form, rank: int, alpha: float, layers: Sequence[str], dense_leaves: Sequence[str]
) -> AdapterPlan:
    """The plan of a run that has written down what it factorised and what it trained densely.

    Args:
        model: the plain model; it is not changed.
        form: see `AdapterPlan`.
        rank: ``r``.
        alpha: LoRA's alpha.
        layers: names of the factorised layers.
        dense_leaves: names of the parameters trained as they are.

    Raises:
        PlanError: if the model has no such layer or parameter.
    """
    modules, parameters = dict(model.named_modules()), [name for name, _ in model.named_parameters()]
    missing = [name for name in layers if name not in modules or _kind(modules[name]) is None]
    missing += [name for name in dense_leaves if name not in parameters]
    if missing:
        raise PlanError(
            f"the model has no {', '.join(missing[:5])}, which the run has trained: it is not the run's model, or not "
            "built with the same settings"
        )
    found = []
    for name in layers:
        kind = _kind(modules[name])
        assert kind is not None
        found.append(_layer(name, modules[name], kind, rank))
    dense = tuple(name for name in parameters if name in set(dense_leaves))
    base = tuple(name for name in parameters if name not in dense)
    scale = 1.0 if form in ("full", "from-zero", "compressed") else alpha / rank
    return AdapterPlan(tuple(found), dense, tuple(_statistics(model)), base, scale, form=form)


def factorisable(model: nn.Module, name: str, rank: int) -> FactorisedLayer | str:
    """The layer of this name as one with factors of a rank, or why it cannot have any."""
    module = model.get_submodule(name)
    kind = _kind(module)
    if kind is None:
        return f"its class {type(module).__name__} is no linear, convolutional or embedding layer"
    obstacle = _obstacle(name, module, _shared_names(model), _inside_attention(model))
    return obstacle if obstacle is not None else _layer(name, module, kind, rank)


def _shared_names(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter is found, by ``id``."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    return shared


def _inside_attention(model: nn.Module) -> set[str]:
    """The output projections of torch's attention layers."""
    return {
        f"{name}.out_proj" if name else "out_proj"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def plan_full(model: nn.Module) -> AdapterPlan:
    """The plan of full-rank training: nothing is factorised, every trainable parameter is a dense leaf."""
    _check_initialised(model)
    plan = replace(_sort_rest(model, (), 1.0, "all", ()), form="full")
    if not plan.dense_leaves:
        raise PlanError("the model has no trainable parameter: every one has requires_grad = False")
    return plan


def _check_initialised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise PlanError(f"parameter {name!r} is not initialised yet: let the factory run one batch")


def _sort_rest(
    model: nn.Module,
    layers: tuple[FactorisedLayer, ...],
    scale: float,
    dense_leaves: str | Sequence[str],
    notes: tuple[str, ...],
) -> AdapterPlan:
    factorised = {layer.weight_key for layer in layers}
    wanted = _dense_filter(dense_leaves, [name for name, _ in model.named_parameters()])
    statistics = tuple(_statistics(model))
    saved = model.state_dict(keep_vars=True)
    others = [n for n, b in model.named_buffers() if n in saved and b.is_floating_point() and n not in statistics]
    if others:
        notes += (
            f"buffers left as they are built: {', '.join(others)} (only the running statistics of normalisation layers "
            "are averaged)",
        )
    dense: list[str] = []
    base: list[str] = []
    for name, parameter in model.named_parameters():
        trainable = parameter.requires_grad and name not in factorised and wanted(name)
        (dense if trainable else base).append(name)
    return AdapterPlan(layers, tuple(dense), statistics, tuple(base), scale, notes)


def _dense_filter(dense_leaves: str | Sequence[str], names: list[str]) -> Callable[[str], bool]:
    if dense_leaves == "all":
        return lambda name: True
    if dense_leaves == "none":
        return lambda name: False
    parts = dense_leaves.split(",") if isinstance(dense_leaves, str) else list(dense_leaves)
    prefixes = tuple(part.strip() for part in parts if part.strip())
    if isinstance(dense_leaves, str) and not prefixes:
        raise PlanError("dense-leaves is empty: use 'all', 'none' or names or prefixes")

    def matches(prefix: str, name: str) -> bool:
        return name == prefix or name.startswith(f"{prefix}.")

    for prefix in prefixes:
        if not any(matches(prefix, name) for name in names):
            raise PlanError(f"dense-leaves: {prefix!r} matches no parameter; use 'all', 'none' or names or prefixes")
    return lambda name: any(matches(prefix, name) for prefix in prefixes)


def _statistics(model: nn.Module) -> Iterable[str]:
    """Running statistics of batch and instance normalisation; other buffers (masks, tables) stay as they are built."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    prefixed = [(f"{name}." if name else "", m) for name, m in norms]
    return [
        f"{prefix}{local}"
        for prefix, module in prefixed
        for local in ("running_mean", "running_var")
        if module._buffers.get(local) is not None
    ]


def has_fused_transformer(model: nn.Module) -> bool:
    """Whether torch would run parts of the model in a fused inference path that ignores adapters."""
    return any(isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention) for module in model.modules())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has batch normalisation, which cannot train on a single sample."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain model, detached, on the CPU and not shared with it; tied entries are tied no more.

    Tensors on the meta device, as in a plan, stay there.
    """
    values = {name: value.detach() for name, value in model.state_dict().items()}
    return {name: (value if value.is_meta else value.cpu()).clone() for name, value in values.items()}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every parameter name of the state dict to the name under which a tied parameter is counted."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def exact_pattern(names: Sequence[str]) -> str:
    """A regular expression that matches exactly these module names."""
    return "|".join(re.escape(name) for name in names)


def build_seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call a model factory with the global generators seeded, and leave them as they were.

    Torch, NumPy and Python are seeded, so that a factory that draws its initial weights gives the same ones on
    every machine of one kind.

    Raises:
        PlanError: if the factory does not return an ``nn.Module``.
    """
    with seeded(derive_seed(seed, "model")):
        model = factory()
    if not isinstance(model, nn.Module):
        raise PlanError(f"the model factory must return a torch.nn.Module, it returned {type(model).__name__}")
    return model


def initial_trainables(values: Mapping[str, Tensor], plan: AdapterPlan, seed: int) -> dict[str, Tensor]:
    """The Trainables before the first round: fresh factors, and the dense leaves of the plain model's ``values``."""
    dense = {name: as_sent(values[name]) for name in plan.dense_leaves}
    return {**plan.fresh(seed, 0), **dense}


def as_sent(tensor: Tensor) -> Tensor:
    """A tensor in the number format it travels in: float32, or float64 where it is that."""
    return tensor if tensor.dtype.itemsize == 8 else tensor.float()
