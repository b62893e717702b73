"""PEFT attached to a model, and the only code that touches it: attach, read, write, fold."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedloru_flwr.lowrank import Adapter, Entry, FactorisedLayer, concatenate, fold
from fedloru_flwr.lowrank.factors import HADAMARD_PARTS
from fedloru_flwr.models.layout import Layout, nested_keys, personal_keys, shapes
from fedloru_flwr.models.plan import AdapterPlan, exact_pattern, has_fused_transformer
from fedloru_flwr.models.quantised import QuantisationError, Quantised, quantised_linear, quantised_weight

BaseMarks = dict[str, tuple[int, Tensor]]
_TRAINED = "default"
_PERSONAL = "personal"
_LEDGER = "ledger"


class AdaptedModel:
    """A model with factor pairs attached after a plan, addressed by the plain model's names.

    The module passed in is changed in place and keeps its class and methods; its factorised layers become PEFT's LoRA
    or LoHa layers. Gradients are on for what is trained alone. PEFT's own merging is never used: it makes the
    forward pass skip ``A`` and ``B``.

    What a client trains beside the base are its **values**: the adapter tensors of the model's `Layout`, and the dense
    leaves. In the plain layout of a form in which all of that is trained they are the Trainables.

    Args:
        module: the plain model.
        plan: made from this very model.
        seed: the run's, from which a one-sided method's ``A`` is drawn.
    """

    def __init__(self, module: nn.Module, plan: AdapterPlan, seed: int = 0) -> None:
        self.module = module
        self.plan = plan
        self._seed = seed
        self._layers: dict[str, Any] = {}
        self._parameters = dict(module.named_parameters())
        owners = {name: name.rpartition(".") for name in plan.statistics}
        self._owners = {name: (module.get_submodule(owner), local) for name, (owner, _, local) in owners.items()}
        self._quantised: dict[str, tuple[nn.Module, Quantised]] = {}
        self._seen: set[str] = set()
        self._watches: list[Any] = []
        self._rounded = False
        with torch.no_grad():
            for name, value in plan.base_of(self._parameters).items():
                if value is not self._parameters[name]:
                    self._parameters[name].copy_(value)
        self._values = {name: self._parameters[name] for name in plan.dense_leaves}
        self._built = {name: tensor.dtype for name, tensor in {**self._parameters, **self._statistics()}.items()}
        self.layout = plan.layout()
        if plan.adapted:
            self._attach()
            self._find_values()
        self._trained = tuple(plan.trainable_keys)
        self._set_gradients()
        if has_fused_transformer(module):
            # torch's fused encoder reads the base weights directly in eval mode and would ignore the adapters.
            torch.backends.mha.set_fastpath_enabled(False)

    def _attach(self) -> None:
        from peft import LoHaConfig, LoraConfig, inject_adapter_in_model

        names = exact_pattern([layer.name for layer in self.plan.adapted])
        rank, alpha = self.layout.rank, self.layout.scale * self.layout.rank
        if self.layout.family == "loha":
            self._config: Any = LoHaConfig(r=rank, alpha=alpha, target_modules=names)
        else:
            self._config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=names)
        with warnings.catch_warnings():
            # PEFT warns of fan_in_fan_out for GPT-2's layer type and sets it right by itself.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(self._config, self.module)
        for layer in self.plan.adapted:
            peft_layer = self._layers[layer.name] = self.module.get_submodule(layer.name)
            _keep_attributes(peft_layer)
            if self.layout.family == "lora":
                _follow_convolution(layer, peft_layer, _TRAINED)
                _in_float(pair_of(layer, peft_layer, _TRAINED))

    def use(self, layout: Layout) -> None:
        """Give the model this layout; its adapter tensors are then undefined until `write_values`.

        Raises:
            ValueError: if a layer cannot have it: embeddings have no nested pairs.
        """
        if layout == self.layout:
            return
        if layout.family != self.layout.family or layout.scale != self.layout.scale:
            raise ValueError(f"this model has adapters of {self.layout}, which cannot become {layout}")
        for layer in self.plan.adapted:
            peft_layer = self._layers[layer.name]
            if self.layout.nested_rank:
                for owner in _owners(layer, peft_layer):
                    parametrize.remove_parametrizations(owner, "weight", leave_parametrized=False)
            if layout.rank != self.layout.rank:
                self._add(layer, _TRAINED, layout.rank, layout.scale)
            if layout.personal_rank != self.layout.personal_rank or layout.personal_scale != self.layout.personal_scale:
                if self.layout.personal_rank:
                    peft_layer.delete_adapter(_PERSONAL)
                if layout.personal_rank:
                    self._add(layer, _PERSONAL, layout.personal_rank, layout.personal_scale)
            if layout.nested_rank:
                if layer.kind == "embedding":
                    raise ValueError(f"{layer.name}: an embedding cannot have a nested pair; leave it out")
                of = dict(shapes(layer, layout))
                keys = nested_keys(layer)
                for owner, (down, up) in zip(_owners(layer, peft_layer), (keys[:2], keys[2:]), strict=True):
                    nested = _Nested(owner.weight, of[down], of[up], layout.nested_scale)
                    parametrize.register_parametrization(owner, "weight", nested, unsafe=True)
        self.layout = layout
        self._activate()
        self._find_values()
        self._trained = tuple(key for key in self.plan.trainable_keys if key in self._values)
        self._set_gradients()

    def _add(self, layer: FactorisedLayer, adapter: str, rank: int, scale: float) -> None:
        """Put a pair of this rank into a layer, in place of one of the same name."""
        peft_layer = self._layers[layer.name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.layout.family == "loha":
                peft_layer.update_layer(adapter, rank, scale * rank, config=self._config)
                return
            peft_layer.update_layer(adapter, rank, lora_alpha=scale * rank, config=self._config)
        _follow_convolution(layer, peft_layer, adapter)
        _in_float(pair_of(layer, peft_layer, adapter))

    def _activate(self) -> None:
        """Have every adapter that is there take part."""
        for layer in self.plan.adapted:
            peft_layer = self._layers[layer.name]
            if self.layout.family == "lora":
                there = [name for name in (_TRAINED, _PERSONAL, _LEDGER) if name in peft_layer.r]
                peft_layer.set_adapter(there)

    def _find_values(self) -> None:
        """Note which parameter lies under which key, and in which number format it was built."""
        found: dict[str, nn.Parameter] = {}
        for layer in self.plan.adapted:
            peft_layer = self._layers[layer.name]
            if self.layout.family == "loha":
                hadamard = (getattr(peft_layer, f"hada_{part}")[_TRAINED] for part in HADAMARD_PARTS)
                found |= dict(zip(layer.hadamard_keys, hadamard, strict=True))
                continue
            if self.layout.nested_rank:
                a, b = (owner.parametrizations["weight"] for owner in _owners(layer, peft_layer))
                found |= {layer.a_key: a.original, layer.b_key: b.original}
                parts = (a[0].down, a[0].up, b[0].down, b[0].up)
                found |= dict(zip(nested_keys(layer), parts, strict=True))
            else:
                found |= dict(zip((layer.a_key, layer.b_key), pair_of(layer, peft_layer, _TRAINED), strict=True))
            if self.layout.personal_rank:
                found |= dict(zip(personal_keys(layer), pair_of(layer, peft_layer, _PERSONAL), strict=True))
        self._values = {**found, **{name: self._parameters[name] for name in self.plan.dense_leaves}}
        for key, parameter in found.items():
            self._built[key] = parameter.dtype

    def _set_gradients(self) -> None:
        for name in self.plan.base:
            self._parameters[name].requires_grad_(False)
        for key, parameter in self._values.items():
            parameter.requires_grad_(key in self._trained)
        for layer in self.plan.adapted if self.layout.family == "lora" else ():
            if _LEDGER in self._layers[layer.name].r:  # PEFT switches gradients on for whatever it activates
                for part in pair_of(layer, self._layers[layer.name], _LEDGER):
                    part.requires_grad_(False)

    def train_only(self, keys: Sequence[str]) -> None:
        """Switch gradients on for these values, and off for all others."""
        self._trained = tuple(keys)
        self._set_gradients()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that have gradients, by key."""
        return {key: self._values[key] for key in self._trained}

    def _statistics(self) -> dict[str, Tensor]:
        # Asked for anew each time: modules assign to their buffers, and so does moving a model to a device.
        return {name: getattr(owner, local) for name, (owner, local) in self._owners.items()}

    def read_values(self) -> dict[str, Tensor]:
        """A copy of the values on the CPU, in their fixed order, in float32 (a float64 model's in float64)."""
        return {key: _wire_copy(parameter, self._built[key]) for key, parameter in self._values.items()}

    @torch.no_grad()
    def write_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Load values, given in any order, without gradients left from before.

        Raises:
            ValueError: if keys or shapes are not the layout's.
        """
        _check_like(self._values, tensors, "trainable", ordered=False)
        for key, parameter in self._values.items():
            parameter.copy_(tensors[key])
            parameter.grad = None
        self._set_gradients()

    def read_trainables(self) -> dict[str, Tensor]:
        """A copy of the Trainables; see `read_values`."""
        values = self.read_values()
        return {key: values[key] for key in self.plan.trainable_keys}

    def write_trainables(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the Trainables in their fixed order, and train exactly them; see `write_values`.

        Raises:
            ValueError: if keys, order or shapes are not the plan's.
        """
        _check_like({key: self._values[key] for key in self.plan.trainable_keys}, tensors, "trainable")
        self.train_only(self.plan.trainable_keys)
        self.write_values({**self.read_values(), **tensors})

    def read_statistics(self) -> dict[str, Tensor]:
        """A copy of the running statistics on the CPU, in float32 (float64 stays)."""
        return {name: _wire_copy(buffer, self._built[name]) for name, buffer in self._statistics().items()}

    @torch.no_grad()
    def write_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Load running statistics, given in any order."""
        mine = self._statistics()
        _check_like(mine, tensors, "statistics", ordered=False)
        for name, buffer in mine.items():
            buffer.copy_(tensors[name])

    def read_base(self) -> dict[str, Tensor]:
        """The frozen parameters, by the plain model's names (not copied)."""
        return {name: self._parameters[name].detach() for name in self.plan.base}

    @torch.no_grad()
    def write_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the frozen parameters."""
        mine = {name: self._parameters[name] for name in self.plan.base if name not in self._quantised}
        others = {name: tensor for name, tensor in tensors.items() if name not in self._quantised}
        _check_like(mine, others, "base", ordered=False)
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])
        for name, (owner, kind) in self._quantised.items():
            self._hold_quantised(name, owner, quantised_weight(tensors[name].to(self._parameters[name].device), kind))

    def quantise(self, kind: Quantised) -> None:
        """Hold the frozen weights of all linear layers but the output layer in few bits from now on.

        What is to be accumulated then has to be stacked.

        Args:
            kind: ``"int8"`` or ``"nf4"``.

        Raises:
            QuantisationError: there is no such layer, or bitsandbytes is not installed.
        """
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        for name in self.plan.base:
            owner, _, local = name.rpartition(".")
            module = self.module.get_submodule(owner) if owner else self.module
            adapted = self._layers.get(owner)
            plain = module if adapted is None else adapted.get_base_layer()
            if local != "weight" or not owner or plain is head or type(plain) is not nn.Linear:
                continue
            held = quantised_linear(plain, kind)
            if adapted is not None:
                adapted.base_layer = held
            else:
                parent, _, child = owner.rpartition(".")
                setattr(self.module.get_submodule(parent), child, held)
            self._quantised[name] = (held, kind)
            self._hold_quantised(name, held, held.weight)
        if not self._quantised:
            raise QuantisationError(
                f"base-precision = {kind!r}: the model has no frozen layer of torch.nn.Linear; use 'bfloat16'"
            )

    def _hold_quantised(self, name: str, owner: nn.Module, weight: Any) -> None:
        owner.weight = weight
        self._parameters[name] = weight
        self._built[name] = weight.dtype

    @torch.no_grad()
    def fold(self, entry: Entry) -> None:
        """Fold one ledger entry into the base: ``W <- W + s B A``, in float32.

        Raises:
            QuantisationError: the base is quantised.
        """
        if self._quantised:
            raise QuantisationError("nothing can be folded into quantised weights: use accumulate-into = 'stack'")
        weights = {layer.weight_key: self._parameters[layer.weight_key] for layer in self.plan.layers}
        ((_, adapter),) = self._whole([entry])
        folded = fold(weights, adapter, self.plan.layers, entry.scale)
        for name, parameter in weights.items():
            parameter.copy_(folded[name])

    def _whole(self, entries: Sequence[Entry]) -> list[tuple[Entry, Adapter]]:
        """Each entry with its whole adapter: one-sided entries hold ``B`` alone."""
        return [(entry, self.plan.whole(entry.adapter, self._seed, entry.draw)) for entry in entries]

    @torch.no_grad()
    def stack(self, entries: Sequence[Entry]) -> None:
        """Hold these entries as one frozen adapter beside the untouched base (none: remove it)."""
        joined: Adapter = {}
        if entries:
            joined = concatenate([(adapter, entry.scale) for entry, adapter in self._whole(entries)], self.plan.layers)
        for layer in self.plan.adapted:
            lora = self._layers[layer.name]
            if not entries:
                if self.layout.family == "lora" and _LEDGER in lora.r:
                    lora.delete_adapter(_LEDGER)
                continue
            self._add(layer, _LEDGER, joined[layer.b_key].shape[1], 1.0)
            for part, key in zip(pair_of(layer, lora, _LEDGER), (layer.a_key, layer.b_key), strict=True):
                part.copy_(joined[key])
        self._activate()
        self._set_gradients()

    def watch_gradients(self) -> None:
        """Start watching which factorised layers get a gradient; see `layers_without_gradient`."""
        self.stop_watching()
        self._seen = set()
        for key, parameter in self._values.items():
            if parameter.requires_grad:
                self._watches.append(_note_gradient(parameter, key, self._seen))

    def stop_watching(self) -> None:
        """Remove the watch."""
        while self._watches:
            self._watches.pop().remove()

    def layers_without_gradient(self) -> tuple[str, ...]:
        """Factorised layers that got no gradient although others did since `watch_gradients`."""
        if not self._seen:
            return ()
        keys = {layer: {key for key, _ in shapes(layer, self.layout)} for layer in self.plan.adapted}
        return tuple(layer.name for layer, its in keys.items() if not self._seen & its)

    def restore_dtypes(self) -> bool:
        """Give every tensor the number format it was built with; say whether a user's loop had changed the base's."""
        for tensors in (self._values, self._statistics(), self._parameters):
            for name, tensor in tensors.items():
                if tensor.dtype != self._built[name]:
                    tensor.data = tensor.data.to(self._built[name])
                    self._rounded |= name in self.plan.base
        rounded, self._rounded = self._rounded, False
        return rounded

    def base_marks(self) -> BaseMarks:
        """What tells later whether the base has been changed: see `base_written` and `base_replaced`."""
        # torch counts writes in place; moving a model to another device or number format replaces the memory instead.
        # The old memory is held, so that its place is not given to the new.
        return {name: (self._parameters[name]._version, self._parameters[name].detach()) for name in self.plan.base}

    def base_written(self, marks: BaseMarks) -> tuple[str, ...]:
        """The frozen parameters that have been written to in place since ``marks``."""
        return tuple(name for name, (version, _) in marks.items() if self._parameters[name]._version != version)

    def base_replaced(self, marks: BaseMarks) -> bool:
        """Whether frozen parameters lie elsewhere on the same device, as after a change of number format and back."""
        return any(
            self._parameters[name].data_ptr() != before.data_ptr() and self._parameters[name].device == before.device
            for name, (_, before) in marks.items()
        )

    def frozen_with_gradient(self) -> tuple[str, ...]:
        """Frozen parameters that a user's loop has made trainable and given a gradient; they are forgotten."""
        touched = tuple(name for name in self.plan.base if self._parameters[name].grad is not None)
        for name in touched:
            self._parameters[name].grad = None
        return touched


def _note_gradient(parameter: nn.Parameter, key: str, seen: set[str]) -> Any:
    def hook(_: Tensor) -> None:
        seen.add(key)

    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's is untyped


def pair_of(layer: FactorisedLayer, lora: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters of ``A`` and ``B`` of a PEFT layer's adapter."""
    if layer.kind == "embedding":
        return lora.lora_embedding_A[adapter], lora.lora_embedding_B[adapter]
    return lora.lora_A[adapter].weight, lora.lora_B[adapter].weight


def _owners(layer: FactorisedLayer, lora: Any) -> tuple[Any, Any]:
    """The modules that hold ``A`` and ``B`` as their weights."""
    return lora.lora_A[_TRAINED], lora.lora_B[_TRAINED]


def _in_float(parts: Iterable[nn.Parameter]) -> None:
    """Hold factors of a half-precision layer in float32."""
    for part in parts:
        if part.dtype in (torch.float16, torch.bfloat16):
            part.data = part.data.float()


class _Nested(nn.Module):
    """``X -> X + s D U``."""

    def __init__(self, weight: Tensor, down: tuple[int, ...], up: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(weight.new_zeros(down))
        self.up = nn.Parameter(weight.new_zeros(up))

    def forward(self, weight: Tensor) -> Tensor:
        nested = self.down.flatten(1) @ self.up.flatten(1)
        return weight + self.scale * nested.reshape(weight.shape)


def _keep_attributes(lora: Any) -> None:
    """Let the model's own code go on reading what PEFT's layer lacks, such as ``self.embedding.embedding_dim``."""
    for name, value in vars(lora.get_base_layer()).items():
        if not (name.startswith("_") or hasattr(lora, name)):
            setattr(lora, name, value)


def _follow_convolution(layer: FactorisedLayer, lora: Any, adapter: str) -> None:
    """PEFT's convolution of ``A`` forgets dilation and padding mode; give it the base layer's."""
    if layer.kind in ("conv1d", "conv2d"):
        base, a = lora.get_base_layer(), lora.lora_A[adapter]
        a.dilation, a.padding_mode = base.dilation, base.padding_mode
        a._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice


def _wire_copy(tensor: Tensor, built_as: torch.dtype) -> Tensor:
    dtype = torch.float64 if built_as == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype, copy=True)


def _check_like(mine: Mapping[str, Tensor], received: Mapping[str, Tensor], what: str, *, ordered: bool = True) -> None:
    if set(mine) != set(received) or (ordered and list(mine) != list(received)):
        odd = sorted(set(mine) ^ set(received))
        detail = f"only on one side: {', '.join(odd[:6])}" if odd else "the same names in another order"
        raise ValueError(
            f"the {what} tensors received are not this model's ({len(received)} received, {len(mine)} expected; "
            f"{detail}): server and client must build the same model"
        )
    for name, tensor in mine.items():
        if tensor.shape != received[name].shape:
            raise ValueError(
                f"{what} tensor {name!r} has shape {tuple(received[name].shape)}, expected {tuple(tensor.shape)}: "
                "server and client must build the same model"
            )
