"""From settings to data and network, the same on the server and on every client."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from flwr.app import Context
from torch import nn

from fedloru_flwr.clients.language import LanguageWork
from fedloru_flwr.clients.training import ClassifierWork, LocalOptimisation
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.data import (
    ClientData,
    DataConfig,
    DataError,
    DataSpec,
    Samples,
    load_central,
    load_client,
    load_own,
    validate,
)
from fedloru_flwr.lowrank import AccumulationSchedule, LearningRateSchedule
from fedloru_flwr.models import FromAdapter, NetworkFactory
from fedloru_flwr.models.pretrained import PretrainedFactory, head, linear_layers, read_configuration
from fedloru_flwr.registry import ALGORITHMS


def data_config(config: RunConfig) -> DataConfig:
    """The data settings of a run."""
    return DataConfig(
        dataset=config.dataset,
        data_path=config.data_path,
        partitioner=config.partitioner,
        num_clients=config.num_clients,
        dirichlet_alpha=config.dirichlet_alpha,
        shards_per_client=config.shards_per_client,
        min_partition_size=config.min_partition_size,
        label_column=config.label_column,
        input_columns=config.input_columns,
        classes=config.classes,
        num_classes=config.num_classes,
        test_fraction=config.test_fraction,
        held_out_fraction=config.held_out_fraction,
        glyph_samples=config.glyph_samples,
        glyph_size=config.glyph_size,
        glyph_noise=config.glyph_noise,
        glyph_seed=config.glyph_seed,
        text="" if not config.pretrained else "causal-lm" if config.writes else "classification",
        tokenizer=config.pretrained,
        max_length=config.max_length,
        packing=config.packing,
        prompt_template=config.prompt_template,
        seed=config.seed,
    )


def server_data(config: RunConfig) -> tuple[Samples | None, DataSpec]:
    """The central held-out samples, None where only clients have data, and what a network has to fit."""
    if config.pretrained:
        read_configuration(config.pretrained)  # before its tokenizer, that a missing model is told as one
    if config.dataset == "clients" and config.pretrained:
        return None, DataSpec((config.max_length,), config.num_classes)
    if config.dataset == "clients":
        return None, DataSpec(config.sample_shape, config.num_classes)
    validate(data_config(config))
    return load_central(data_config(config))


def client_data(config: DataConfig, context: Context) -> tuple[ClientData, DataSpec]:
    """The data of the client at hand: its own where its node config has a ``data-path``, else its partition.

    Args:
        config: the run's, see `data_config`.
        context: the client's.

    Raises:
        DataError: if there is neither.
    """
    if own := context.node_config.get("data-path"):
        return load_own(str(own), config)
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int) or config.dataset == "clients":
        raise DataError(
            "this client has no data: start its SuperNode with --node-config 'data-path=\"...\"' for data of its own, "
            "or with partition-id for a share of the run's dataset"
        )
    return load_client(config, partition_id)


def network_factory(config: RunConfig, spec: DataSpec) -> Callable[[], nn.Module]:
    """The network that fits the data, with the adapter that ``init-adapter`` names.

    A client that has no such directory builds the network without it; since its ``W_0`` is then not the server's, it is
    sent that one.

    Raises:
        ConfigError: if it cannot take the data's samples.
    """
    plain = plain_network(config, spec)
    if config.init_adapter and Path(config.init_adapter).is_dir():
        return FromAdapter(plain, config.init_adapter)
    return plain


def check_init_adapter(config: RunConfig) -> None:
    """Refuse an ``init-adapter`` that is not there.

    Raises:
        ConfigError: it names no directory.
    """
    if config.init_adapter and not Path(config.init_adapter).is_dir():
        raise ConfigError(
            f"init-adapter = {config.init_adapter!r} is no directory: name one that PEFT's save_pretrained has made"
        )


def plain_network(config: RunConfig, spec: DataSpec) -> NetworkFactory | PretrainedFactory:
    """The network that fits the data, before any adapter.

    Raises:
        ConfigError: if it cannot take the data's samples, or cannot be had.
    """
    if config.pretrained:
        factory = pretrained_factory(config, spec.num_classes)
        longest = getattr(factory.configuration(), "max_position_embeddings", None)
        if isinstance(longest, int) and config.max_length > longest:
            raise ConfigError(
                f"max-length = {config.max_length} is more than the {longest} tokens that model = {config.model!r} can "
                "take: lower it"
            )
        return factory
    try:
        return NetworkFactory(
            name=config.model,
            input_shape=spec.input_shape,
            num_classes=spec.num_classes,
            width=config.model_width,
            hidden=config.hidden_widths,
            norm=cast("Any", config.norm),
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def pretrained_factory(config: RunConfig, num_classes: int) -> PretrainedFactory:
    """The transformers model of ``model = "hf:..."``."""
    is_language_model = config.writes
    return PretrainedFactory(
        name=config.pretrained,
        task="causal-lm" if is_language_model else "classification",
        num_labels=0 if is_language_model else num_classes,
        precision=cast("Any", config.base_precision),
        seed=config.seed,
    )


def settings_for_model(config: RunConfig) -> RunConfig:
    """The settings with what ``auto`` means for their model: the layers to factorise and the dense leaves.

    Of a built-in network the plan chooses the layers, and everything else is trained as it is. Of a transformers model
    all linear layers but the output layer are factorised, and nothing else is trained but the head of a classifier.
    """
    targets, dense = config.target_modules, config.dense_leaves
    if config.pretrained:
        factory = pretrained_factory(config, max(config.num_classes, 2))  # their number changes no name
        if targets == "auto":
            targets = ",".join(linear_layers(factory)) or targets
        if dense == "auto":
            dense = "none" if config.writes else ",".join(head(factory))
    elif dense == "auto":
        dense = "all"
    return replace(config, target_modules=targets, dense_leaves=dense)


def local_work(config: RunConfig) -> ClassifierWork | LanguageWork:
    """How clients train and evaluate their model."""
    if not config.pretrained:
        return ClassifierWork()
    return LanguageWork(
        task="causal-lm" if config.writes else "classification",
        name=config.pretrained,
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        exact_match_samples=config.exact_match_samples,
    )


def accumulation_schedule(config: RunConfig) -> AccumulationSchedule:
    """When the run accumulates."""
    if config.accumulation_rounds:
        return AccumulationSchedule.listed(config.accumulation_rounds)
    every = config.accumulate_every or ALGORITHMS[config.algorithm].every
    return AccumulationSchedule.periodic(every) if every else AccumulationSchedule.never()


def learning_rate(config: RunConfig, server_round: int) -> float:
    """The clients' learning rate in a round."""
    schedule = LearningRateSchedule(
        cast("Any", config.learning_rate_schedule), config.learning_rate, config.learning_rate_restart
    )
    return schedule(server_round, config.num_server_rounds, accumulation_schedule(config))


def local_optimisation(config: RunConfig, server_round: int) -> LocalOptimisation:
    """How the clients optimise in a round."""
    return LocalOptimisation(
        epochs=config.local_epochs,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        learning_rate=learning_rate(config, server_round),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
    )
