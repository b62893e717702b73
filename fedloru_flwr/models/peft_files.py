r"""PEFT's own files: what a model has learnt as a LoRA adapter directory, and such a directory as where a run begins.

PEFT finds modules by the ends of their names, so that some names cannot be said in its configuration; what is needed is
worked out here and refused where it cannot be had. Everything is read and written by the peft library.
"""

import copy
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import Adapter, FactorisedLayer, as_pair, fold, product, relative_difference, seeded
from fedloru_flwr.lowrank.factors import at_least_float32
from fedloru_flwr.models.adapters import pair_of
from fedloru_flwr.models.plan import factorisable, plain_state
from fedloru_flwr.models.quantised import Quantised

_ADAPTER = "default"
_CONFIG = "adapter_config.json"
# Settings of a LoRA adapter with which it is more than a product beside the weight.
_NOT_A_PRODUCT = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_SAME_PRODUCT = 1e-5


class AdapterError(ValueError):
    """An update that PEFT's files cannot hold, or a directory that is not a usable adapter; says why."""


@dataclass(frozen=True)
class Update:
    """What a model has learnt beside a base, by the plain model's names.

    A layer's weight is ``W + B A``; a tensor in ``values`` takes the place of the base's.

    Attributes:
        layers: the layers that have a pair.
        pairs: ``A (r, in, *kernel)`` and ``B (out, r, 1, ...)`` of every layer, of scale 1, each of a rank of its own.
        values: whole parameters and running statistics.
    """

    layers: tuple[FactorisedLayer, ...]
    pairs: Mapping[str, Tensor]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def rank_of(self, layer: FactorisedLayer) -> int:
        """The rank of a layer's pair."""
        return int(self.pairs[layer.b_key].shape[1])


@torch.no_grad()
def apply_update(model: nn.Module, update: Update) -> None:
    """Change a plain model in place: ``W <- W + B A``, formed in float32, and the values as they are."""
    tensors = model.state_dict(keep_vars=True)
    folded = fold(
        {layer.weight_key: tensors[layer.weight_key] for layer in update.layers}, update.pairs, update.layers, 1
    )
    for name, value in {**folded, **update.values}.items():
        tensors[name].copy_(value)


def as_peft_holds_it(model: nn.Module, update: Update) -> Update:
    """The same update with everything where PEFT can hold it.

    Biases of layers that have pairs go with them (``bias``); other values go with their whole module
    (``modules_to_save``). A module that PEFT cannot name without naming a layer of a pair too (it goes by the ends of
    names: the stem ``conv1`` beside ``layer1.conv1``) gets an exact pair of full rank instead.

    Args:
        model: the plain model with the base's values.
        update: what to hold.

    Raises:
        AdapterError: for what PEFT would leave out or compute in another way, with the reason.
    """
    for layer in update.layers:
        _check_forward(model, layer)
    while True:
        odd = next(iter(_cannot_be_saved(model, update)), None)
        if odd is None:
            return update
        name, reason = odd
        whole = factorisable(model, name, 1) if name else "it is the whole model"
        if isinstance(whole, str):
            raise AdapterError(
                f"a PEFT adapter cannot hold what was trained of module {name!r}: {reason}, and it cannot have a pair "
                f"either, since {whole}. Export it with the format 'merged', or leave it out of dense-leaves"
            )
        _check_forward(model, whole)
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        value = update.values.get(whole.weight_key, weight)
        delta = at_least_float32(value.detach().cpu()) - at_least_float32(weight.detach().cpu())
        a, b = as_pair(whole, {whole.delta_key: delta}) if bool(delta.any()) else _nothing(whole, delta)
        layer = replace(whole, rank=len(a))
        pair = {layer.a_key: a.reshape(layer.a_shape()), layer.b_key: b.reshape(layer.b_shape())}
        values = {key: value for key, value in update.values.items() if key != layer.weight_key}
        update = Update((*update.layers, layer), {**update.pairs, **pair}, values)


def _nothing(layer: FactorisedLayer, like: Tensor) -> tuple[Tensor, Tensor]:
    """A pair of rank 1 whose product is zero."""
    return like.new_zeros(1, layer.in_features), like.new_zeros(layer.out_features, 1)


def _check_forward(model: nn.Module, layer: FactorisedLayer) -> None:
    """Refuse layers whose pair plain PEFT would compute otherwise, or not at all."""
    module = model.get_submodule(layer.name)
    odd = ""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (set(module.dilation) != {1} or module.padding_mode != "zeros"):
        odd = "PEFT's convolution of A has neither the dilation nor the padding mode of the layer's own"
    parents = [layer.name.rsplit(".", cut)[0] for cut in range(1, layer.name.count(".") + 1)]
    if any(isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer) for parent in parents):
        odd = "torch's fused encoder layer reads W alone in eval mode"
    if odd:
        raise AdapterError(
            f"a PEFT adapter of layer {layer.name!r} would not compute what the run's model does: {odd}. Export it "
            "with the format 'merged'"
        )


def _owners(model: nn.Module, update: Update) -> list[str]:
    """The modules to be saved whole for the sake of the values, the outermost ones, tied ones under all names."""
    tied = _tied_names(model)
    owners = {name.rpartition(".")[0]: None for key in update.values for name in tied.get(key, [key])}
    targets = {layer.name for layer in update.layers}
    found = [owner for owner in owners if owner not in targets]
    return [owner for owner in found if not any(_is_inside(owner, other) for other in found)]


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: its for its in names.values() for name in its}


def _is_inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _cannot_be_saved(model: nn.Module, update: Update) -> Iterator[tuple[str, str]]:
    """Modules that have to be saved whole and cannot be, and why."""
    targets = [layer.name for layer in update.layers]
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner in _owners(model, update):
        inside = [target for target in targets if _is_inside(target, owner)]
        # PEFT matches the names of modules to save in two ways: to wrap them, and to leave them without pairs.
        wrapped = [name for name in modules if name.endswith(owner)]
        touched = [
            target
            for target in targets
            if re.match(rf"(^|.*\.){owner}($|\..*)", target)
            or any(target == name or _is_inside(target, name) or _is_inside(name, target) for name in wrapped)
        ]
        lists = [name for name in wrapped if isinstance(modules[name], nn.ModuleList | nn.ModuleDict)]
        if inside:
            yield owner, f"it is saved whole only, and holds layers with pairs ({inside[0]})"
        elif touched:
            yield owner, f"its name is also the end of the name of {touched[0]}, which has a pair"
        elif lists or any(_is_inside(one, other) for one in wrapped for other in wrapped):
            yield owner, f"its name is also the end of the names of other modules ({', '.join(wrapped[:3])})"


def write_adapter(model: nn.Module, update: Update, directory: str | os.PathLike[str], base_name: str | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` by peft's ``save_pretrained``.

    The configuration has ``alpha = r``, so that the scale is 1, and a ``rank_pattern`` and ``alpha_pattern`` where
    layers differ.

    Args:
        model: the plain model; it is changed, and of no further use.
        update: as `as_peft_holds_it` gives it, with at least one layer.
        directory: made if missing.
        base_name: where the base can be loaded from, for those who load the adapter by itself; None: nowhere.
    """
    from peft import get_peft_model

    saved, tied = _owners(model, update), _tied_names(model)
    with warnings.catch_warnings(), seeded(0):
        # PEFT warns of fan_in_fan_out, which it sets right by itself, and of tied weights, which are saved twice here.
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, _config(model, update, saved))
        wrapped.peft_config[_ADAPTER].base_model_name_or_path = base_name
        inner = wrapped.base_model.model
        with torch.no_grad():
            for layer in update.layers:
                parts = pair_of(layer, inner.get_submodule(layer.name), _ADAPTER)
                for part, key in zip(parts, (layer.a_key, layer.b_key), strict=True):
                    part.copy_(update.pairs[key])
            tensors = plain_tensors(inner)
            for name, value in update.values.items():
                for one in tied.get(name, [name]):
                    tensors[one].copy_(value)
        wrapped.save_pretrained(os.fspath(directory), save_embedding_layers=False)


def _config(model: nn.Module, update: Update, saved: list[str]) -> Any:
    from peft import LoraConfig

    ranks = {layer.name: update.rank_of(layer) for layer in update.layers}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches the end of a name, unless the pattern says where it begins.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    others = [name for name, _ in model.named_modules() if name not in ranks]
    ambiguous = any(other.endswith(f".{name}") for name in ranks for other in others)
    linear = [layer.transposed for layer in update.layers if layer.kind == "linear"]
    biases = any(f"{name}.bias" in update.values for name in ranks)
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules="|".join(map(re.escape, ranks)) if ambiguous else list(ranks),
        modules_to_save=saved or None,
        bias="lora_only" if biases else "none",
        lora_dropout=0.0,
        fan_in_fan_out=bool(linear) and all(linear),
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    )


def open_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Any:
    """Return plain ``peft.PeftModel.from_pretrained(model, directory)`` on the CPU, in eval mode.

    Args:
        model: the base; it is changed in place.
        directory: of the adapter.

    Raises:
        AdapterError: if PEFT cannot load it, or finds less in it than the configuration says.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told, seeded(0):
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(model, os.fspath(directory), torch_device="cpu")
        except Exception as error:  # whatever PEFT raises for a file that is missing, damaged or of another model
            raise AdapterError(f"PEFT cannot load the adapter in {directory} into this model: {error}") from error
    missing = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    if missing:
        raise AdapterError(f"the adapter in {directory} is incomplete or of another model: {missing[0][:400]}")
    return loaded.eval()


def products(wrapped: Any, layers: tuple[FactorisedLayer, ...]) -> Iterator[tuple[FactorisedLayer, Tensor]]:
    """What each layer of a PEFT model adds to its weight, as PEFT computes it, in the weight's shape."""
    for layer in layers:
        yield layer, wrapped.base_model.model.get_submodule(layer.name).get_delta_weight(_ADAPTER).detach()


def plain_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and buffers in use within a model that carries PEFT's layers, by the plain model's names.

    Those of ``A`` and ``B`` are not among them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[_ADAPTER]
    elif isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    own = {**module._parameters, **module._buffers}
    tensors = {f"{prefix}{name}": one for name, one in own.items() if one is not None}
    for name, child in module.named_children():
        tensors |= plain_tensors(child, f"{prefix}{name}.")
    return tensors


def read_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Update:
    """Read a LoRA adapter that PEFT has saved, as an update of this model.

    Args:
        model: the plain model that it was made for; it is not changed (a copy is).
        directory: with ``adapter_config.json`` and the weights beside it.

    Raises:
        AdapterError: if it is no such directory, does not fit the model, changes nothing, or is more than products
            ``s B A`` beside weights and whole modules (DoRA, other methods than LoRA, tokens).
    """
    from peft.tuners.lora import LoraLayer

    path = Path(directory)
    config = _read_config(path)
    before = plain_state(model)
    inner = open_adapter(copy.deepcopy(model), path).base_model.model
    layers: list[FactorisedLayer] = []
    pairs: Adapter = {}
    for name, module in inner.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = factorisable(model, name, int(module.r[_ADAPTER]))
        if isinstance(layer, str):
            raise AdapterError(f"the adapter in {path} has a pair for {name!r}, which cannot be folded, since {layer}")
        a, b = (part.detach().clone() for part in pair_of(layer, module, _ADAPTER))
        pair = {layer.a_key: at_least_float32(a), layer.b_key: at_least_float32(b) * float(module.scaling[_ADAPTER])}
        if relative_difference(module.get_delta_weight(_ADAPTER), product(layer, pair)) > _SAME_PRODUCT:
            raise AdapterError(f"the adapter in {path} computes something else than s B A in {name!r}: merge it first")
        layers.append(layer)
        pairs |= pair
    changed = {
        name: tensor.detach().clone()
        for name, tensor in plain_tensors(inner).items()
        if name in before and tensor.is_floating_point() and not torch.equal(tensor, before[name])
    }
    moved = [layer.name for layer in layers if layer.weight_key in changed]
    if moved:
        raise AdapterError(
            f"the adapter in {path} changes the weight of {moved[0]!r} when it is loaded (init_lora_weights = "
            f"{getattr(config, 'init_lora_weights', None)!r}): save it as an ordinary LoRA adapter"
        )
    if not changed and not any(bool(product(layer, pairs).any()) for layer in layers):
        raise AdapterError(f"the adapter in {path} changes nothing: its products are zero and it has no other values")
    return Update(tuple(layers), pairs, changed)


def _read_config(path: Path) -> Any:
    """The configuration of a LoRA adapter in a directory.

    Raises:
        AdapterError: there is none, or it is one of more than products of factors.
    """
    from peft import PeftConfig

    if not (path / _CONFIG).is_file():
        raise AdapterError(
            f"there is no {_CONFIG} in {path}: expected a directory that PEFT's save_pretrained has made"
        )
    try:
        config = PeftConfig.from_pretrained(os.fspath(path))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterError(f"{path / _CONFIG} cannot be read: {error}") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise AdapterError(f"the adapter in {path} is of type {kind}, not LORA: merge it into the model instead")
    odd = [name for name in _NOT_A_PRODUCT if getattr(config, name, None)]
    if odd:
        raise AdapterError(
            f"the adapter in {path} is more than a product of factors beside a weight ({', '.join(odd)}): merge it "
            "into the model instead"
        )
    return config


@dataclass(frozen=True)
class FromAdapter:
    """A model factory whose models begin with an existing LoRA adapter: ``W_0 = W + s B A``, and its whole modules.

    Attributes:
        factory: builds the plain model the adapter was made for.
        path: the adapter's directory.

    Raises:
        AdapterError: when called, see `read_adapter`.
    """

    factory: Callable[[], nn.Module]
    path: str

    @property
    def quantised(self) -> Quantised | None:
        """In how few bits the clients hold the frozen weights, where the factory says so."""
        return getattr(self.factory, "quantised", None)

    def __call__(self) -> nn.Module:
        """Build the model and fold the adapter into it."""
        model = self.factory()
        apply_update(model, read_adapter(model, self.path))
        return model
