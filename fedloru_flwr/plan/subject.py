"""What a plan is of: a model without its weights, a batch, and how many samples each client has."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloru_flwr import wire
from fedloru_flwr.config import ConfigError, RunConfig, name_to_key
from fedloru_flwr.data import DataSpec, partition_indices
from fedloru_flwr.data.loading import held_out_count
from fedloru_flwr.models import build_seeded
from fedloru_flwr.models.plan import has_batch_norm
from fedloru_flwr.plan.rehearsal import Cast
from fedloru_flwr.strategies import FederatedStrategy
from fedloru_flwr.workload import (
    check_init_adapter,
    data_config,
    local_work,
    network_factory,
    plain_network,
    server_data,
)

_BUILT_PARAMETERS = 50_000_000
_ASSUMED_EXAMPLES = 100
# What a plan of a transformers model does not look at.
_OF_THE_WORKLOAD = (
    "dataset",
    "data_path",
    "label_column",
    "input_columns",
    "classes",
    "num_classes",
    "input_shape",
    "partitioner",
    "dirichlet_alpha",
    "shards_per_client",
    "min_partition_size",
    "test_fraction",
    "glyph_samples",
    "glyph_size",
    "glyph_noise",
    "glyph_seed",
    "max_length",
    "packing",
    "prompt_template",
    "gradient_checkpointing",
    "base_precision",
    "model_width",
    "hidden",
    "norm",
    "init_adapter",
)


@dataclass(frozen=True)
class Subject:
    """A workload as a plan sees it.

    Attributes:
        name: for people.
        model: on the meta device, or, where it is small, as a run would build it.
        inputs: one batch, on the meta device: ``(batch, *sample shape)``, or token ids ``(batch, length)``.
        train: how many samples each client trains on.
        held_out: how many it evaluates on.
        equals: parameters that stay equal however they are trained, see `equal_leaves`.
        assumptions: what is not known and was taken for granted, for people.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    equals: Mapping[str, str]
    assumptions: tuple[str, ...] = ()

    def cast(self, config: RunConfig, strategy: FederatedStrategy, version: str) -> Cast:
        """Who takes part in the run of these settings."""
        joins = has_batch_norm(self.model)
        prefixes = ("",) * strategy.has_global_model + ("personal-",) * strategy.has_personal_model
        measures = local_work(config).measures
        received = [f"{wire.RECEIVED}{prefixes[-1]}{name}" for name in measures] if config.evaluate_in_training else []
        of_a_step = config.batch_size * config.accumulate_steps
        return Cast(
            clients=tuple(str(index) for index in range(config.num_clients)),
            train=self.train,
            held_out=self.held_out,
            steps=tuple(config.local_epochs * _steps(count, of_a_step, joins) for count in self.train),
            train_metrics=("train_loss", *received),
            evaluate_metrics=tuple(f"{prefix}{name}" for prefix in prefixes for name in measures),
            version=version,
        )


def subject_of(
    config: RunConfig, transformers: str | Path | None = None, sequence_length: int = 512, examples: int = 0
) -> Subject:
    """The workload that settings describe.

    Args:
        config: the settings.
        transformers: a model of the transformers library instead of the settings' network: a ``config.json``, a
            directory that holds one, or a name on the hub, of which the configuration alone is read.
        sequence_length: tokens a sample, for such a model.
        examples: samples that a client trains on, where the plan does not see the data; 0: 100.

    Raises:
        ValueError: for data, settings or a configuration that cannot be.
    """
    if sequence_length < 1 or examples < 0:
        raise ConfigError(
            f"sequence-length = {sequence_length} and examples = {examples}: expected at least 1 token and 0 examples"
        )
    check_init_adapter(config)
    if transformers is not None:
        told = "the weights are taken to be all different, as pretrained ones are"
        model, assumed = _transformers_model(str(transformers))
        inputs = _batch(config, model, sequence_length)
        train, held_out, more = _assumed_samples(config, examples)
        granted = (told, more, *assumed, *_without_effect(config))
        return Subject(f"{transformers}", model, inputs, train, held_out, {}, granted)
    assumptions: tuple[str, ...] = ()
    is_told = bool(examples) if config.pretrained else bool(config.sample_shape and config.num_classes)
    if config.dataset == "clients" or (config.dataset.startswith("hub:") and is_told):
        shape, classes = config.sample_shape, config.num_classes
        spec = DataSpec((config.max_length,), max(classes, 2)) if config.pretrained else DataSpec(shape, classes)
        train, held_out, more = _assumed_samples(config, examples)
        assumptions = (more,)
    else:
        _, spec = server_data(config)
        counts = [len(part) for part in partition_indices(data_config(config))]
        held_out = tuple(held_out_count(count, config.held_out_fraction) for count in counts)
        train = tuple(count - held for count, held in zip(counts, held_out, strict=True))
    factory = network_factory(config, spec)
    with torch.device("meta"):
        model = plain_network(config, spec)()
    dtype = torch.long if config.pretrained else torch.float32
    inputs = torch.empty(config.batch_size, *spec.input_shape, dtype=dtype, device="meta")
    equals: dict[str, str] = {}
    if sum(parameter.numel() for parameter in model.parameters()) <= _BUILT_PARAMETERS:
        model = build_seeded(factory, config.seed)  # equal tensors travel once
        equals = equal_leaves(model, inputs)
    else:
        assumptions += ("the weights are taken to be all different; equal tensors would travel once",)
    return Subject(f"{config.model} on {config.dataset}", model, inputs, train, held_out, equals, assumptions)


def equal_leaves(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Parameters that begin equal and always have equal gradients, such as the biases of two branches that are added.

    Told by one backward pass of a copy on random inputs.

    Args:
        model: with its weights.
        inputs: of their shape; two or more samples.

    Returns:
        By parameter the name of the first that it is equal to; an empty one for a parameter without a gradient.
    """
    trial = deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    if inputs.is_floating_point():
        outputs = trial(torch.randn(2, *inputs.shape[1:], generator=generator))
    else:
        vocabulary = cast("Any", trial).config.vocab_size
        outputs = trial(torch.randint(vocabulary, (2, *inputs.shape[1:]), generator=generator)).logits
    (outputs * torch.randn(outputs.shape, generator=generator)).sum().backward()
    first: dict[tuple[bytes, bytes], str] = {}
    found = {}
    for name, parameter in trial.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            found[name] = ""
            continue
        values = tuple(part.detach().numpy().tobytes() for part in (parameter, parameter.grad))
        key = (repr(tuple(parameter.shape)).encode() + values[0], values[1])
        if key in first:
            found |= {name: first[key], first[key]: first[key]}
        first.setdefault(key, name)
    return found


def _assumed_samples(config: RunConfig, examples: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The same number for every client, and the assumption in words."""
    train = examples or _ASSUMED_EXAMPLES
    held_out = held_out_count(max(2, math.ceil(train / (1 - config.held_out_fraction))), config.held_out_fraction)
    told = (
        f"every client is taken to train on {train} samples (examples): a reply tells their number, of 1 byte below "
        "64, 2 below 8192, 3 below 1048576"
    )
    return (train,) * config.num_clients, (held_out,) * config.num_clients, told


def _steps(count: int, batch_size: int, joins_single: bool) -> int:
    """Optimiser steps an epoch; see `fedloru_flwr.clients.training.batches`."""
    joined = joins_single and count > batch_size and count % batch_size == 1
    return -(-count // batch_size) - int(joined)


def _without_effect(config: RunConfig) -> tuple[str, ...]:
    """The settings that a plan of a transformers model does not look at, in words, where some are not the default."""
    own = () if config.pretrained else ("model", "task")  # with hf: they say what is measured
    odd = [
        name_to_key(setting.name)
        for setting in dataclasses.fields(config)
        if setting.name in (*_OF_THE_WORKLOAD, *own) and getattr(config, setting.name) != setting.default
    ]
    return (f"settings without effect on the plan of a transformers model: {', '.join(odd)}",) if odd else ()


def _batch(config: RunConfig, model: nn.Module, sequence_length: int) -> Tensor:
    """One batch of what the model's first argument is, where that is tokens or images; else tokens.

    Raises:
        ConfigError: the model cannot take so many tokens.
    """
    found = cast("Any", model).config
    longest = getattr(found, "max_position_embeddings", None)
    sides, channels = getattr(found, "image_size", None), getattr(found, "num_channels", None)
    if getattr(model, "main_input_name", "") == "pixel_values" and isinstance(sides, int) and isinstance(channels, int):
        return torch.empty(config.batch_size, channels, sides, sides, dtype=found.dtype or torch.float32, device="meta")
    if isinstance(longest, int) and sequence_length > longest:
        raise ConfigError(
            f"sequence-length = {sequence_length} is more than the {longest} tokens (max_position_embeddings) that the "
            f"model can take: expected 1 to {longest}"
        )
    return torch.empty(config.batch_size, sequence_length, dtype=torch.long, device="meta")


def _transformers_model(source: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of the transformers library on the meta device, from its configuration alone, and what was assumed.

    Raises:
        ConfigError: the library is not installed, there is no such configuration, or no model can be made of it.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers = ... needs the library of that name: pip install transformers") from None
    try:
        found = transformers.AutoConfig.from_pretrained(source, local_files_only=Path(source).exists())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transformers = {source!r} has no configuration that can be read (expected a config.json, a directory "
            f"with one, or a name on the hub): {str(error).strip().partition(chr(10))[0]}"
        ) from error
    named = next(iter(found.architectures or ()), "")
    make: Callable[..., Any] | None = getattr(getattr(transformers, named or "?", None), "_from_config", None)
    assumed: tuple[str, ...] = ()
    if make is None:
        why = f"names {named!r}, which the library does not have" if named else "names no architecture"
        assumed = (f"the model is taken to be a causal language model: its configuration {why}",)
        make = transformers.AutoModelForCausalLM.from_config
    dtype = getattr(found, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            return cast("nn.Module", make(found, dtype=dtype)), assumed
    except Exception as error:  # whatever a model does with a configuration that is not for it
        raise ConfigError(
            f"transformers = {source!r}: no {named or 'causal language model'} can be made of this configuration "
            f'({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}): expected "architectures" in '
            "it to name a class of the transformers library that fits it"
        ) from error
