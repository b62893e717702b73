"""PEFT attached to a model, and the only code that touches it: attach, read, write, fold."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import Adapter, Entry, FactorisedLayer, concatenate, fold
from fedloru_flwr.models.plan import AdapterPlan, exact_pattern, has_fused_transformer

BaseMarks = dict[str, tuple[int, Tensor]]
_TRAINED = "default"
_LEDGER = "ledger"


class AdaptedModel:
    """A model with factor pairs attached after a plan, addressed by the plain model's names.

    The module passed in is changed in place and keeps its class and methods; its factorised layers become PEFT's LoRA
    layers. Gradients are on for the plan's Trainables alone. PEFT's own merging is never used: it makes the
    forward pass skip ``A`` and ``B``.

    Args:
        module: the plain model.
        plan: made from this very model.
    """

    def __init__(self, module: nn.Module, plan: AdapterPlan) -> None:
        self.module = module
        self.plan = plan
        self._lora: dict[str, Any] = {}
        self._parameters = dict(module.named_parameters())
        owners = {name: name.rpartition(".") for name in plan.statistics}
        self._owners = {name: (module.get_submodule(owner), local) for name, (owner, _, local) in owners.items()}
        self._seen: set[str] = set()
        self._watches: list[Any] = []
        self._rounded = False
        if plan.layers:
            self._attach()
        self._set_gradients()
        tensors = [*self._trainable(), *self._parameters.items(), *self._statistics().items()]
        self._built = {name: tensor.dtype for name, tensor in tensors}
        if has_fused_transformer(module):
            # torch's fused encoder reads the base weights directly in eval mode and would ignore the adapters.
            torch.backends.mha.set_fastpath_enabled(False)

    def _attach(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self._config = LoraConfig(
            r=self.plan.layers[0].rank,
            lora_alpha=self.plan.scale * self.plan.layers[0].rank,
            lora_dropout=0.0,
            bias="none",
            target_modules=exact_pattern([layer.name for layer in self.plan.layers]),
        )
        with warnings.catch_warnings():
            # PEFT warns of fan_in_fan_out for GPT-2's layer type and sets it right by itself.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(self._config, self.module)
        for layer in self.plan.layers:
            lora = self._lora[layer.name] = self.module.get_submodule(layer.name)
            _keep_attributes(lora)
            _follow_convolution(layer, lora, _TRAINED)
            for part in _pair(layer, lora, _TRAINED):
                part.data = part.data.float() if part.dtype in (torch.float16, torch.bfloat16) else part.data

    def _set_gradients(self) -> None:
        for name in self.plan.base:
            self._parameters[name].requires_grad_(False)
        for _, parameter in self._trainable():
            parameter.requires_grad_(True)

    def _statistics(self) -> dict[str, Tensor]:
        # Asked for anew each time: modules assign to their buffers, and so does moving a model to a device.
        return {name: getattr(owner, local) for name, (owner, local) in self._owners.items()}

    def _trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        for layer in self.plan.layers:
            a, b = _pair(layer, self._lora[layer.name], _TRAINED)
            yield layer.a_key, a
            yield layer.b_key, b
        for name in self.plan.dense_leaves:
            yield name, self._parameters[name]

    def read_trainables(self) -> dict[str, Tensor]:
        """A copy of the Trainables on the CPU, in their fixed order, in float32 (a float64 model's in float64)."""
        return {key: _wire_copy(parameter, self._built[key]) for key, parameter in self._trainable()}

    @torch.no_grad()
    def write_trainables(self, tensors: Mapping[str, Tensor]) -> None:
        """Load Trainables, without gradients left from before; gradients are on for exactly them again.

        Raises:
            ValueError: if keys, order or shapes are not the plan's.
        """
        mine = dict(self._trainable())
        _check_like(mine, tensors, "trainable")
        for key, parameter in mine.items():
            parameter.copy_(tensors[key])
            parameter.grad = None
        self._set_gradients()

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
        _check_like({name: self._parameters[name] for name in self.plan.base}, tensors, "base", ordered=False)
        for name in self.plan.base:
            self._parameters[name].copy_(tensors[name])

    @torch.no_grad()
    def fold(self, entry: Entry) -> None:
        """Fold one ledger entry into the base: ``W <- W + s B A``, in float32."""
        weights = {layer.weight_key: self._parameters[layer.weight_key] for layer in self.plan.layers}
        folded = fold(weights, entry.adapter, self.plan.layers, entry.scale)
        for name, parameter in weights.items():
            parameter.copy_(folded[name])

    @torch.no_grad()
    def stack(self, entries: Sequence[Entry]) -> None:
        """Hold these entries as one frozen adapter beside the untouched base (none: remove it)."""
        joined: Adapter = {}
        if entries:
            joined = concatenate([(entry.adapter, entry.scale) for entry in entries], self.plan.layers)
        for layer in self.plan.layers:
            lora = self._lora[layer.name]
            if not entries:
                if _LEDGER in lora.r:
                    lora.delete_adapter(_LEDGER)
                continue
            rank = joined[layer.b_key].shape[1]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lora.update_layer(_LEDGER, rank, lora_alpha=rank, config=self._config)
            _follow_convolution(layer, lora, _LEDGER)
            lora.set_adapter([_TRAINED, _LEDGER])
            for part, key in zip(_pair(layer, lora, _LEDGER), (layer.a_key, layer.b_key), strict=True):
                part.data = part.data.float() if part.dtype in (torch.float16, torch.bfloat16) else part.data
                part.copy_(joined[key])
                part.requires_grad_(False)

    def watch_gradients(self) -> None:
        """Start watching which factorised layers get a gradient; see `layers_without_gradient`."""
        self.stop_watching()
        self._seen = set()
        for key, parameter in self._trainable():
            self._watches.append(_note_gradient(parameter, key, self._seen))

    def stop_watching(self) -> None:
        """Remove the watch."""
        while self._watches:
            self._watches.pop().remove()

    def layers_without_gradient(self) -> tuple[str, ...]:
        """Factorised layers that got no gradient although others did since `watch_gradients`."""
        if not self._seen:
            return ()
        return tuple(layer.name for layer in self.plan.layers if not self._seen & {layer.a_key, layer.b_key})

    def restore_dtypes(self) -> bool:
        """Give every tensor the number format it was built with; say whether a user's loop had changed the base's."""
        for tensors in (dict(self._trainable()), self._statistics(), self._parameters):
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


def _pair(layer: FactorisedLayer, lora: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    if layer.kind == "embedding":
        return lora.lora_embedding_A[adapter], lora.lora_embedding_B[adapter]
    return lora.lora_A[adapter].weight, lora.lora_B[adapter].weight


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
