"""Pure torch mathematics of low-rank updates: no Flower, no PEFT."""

from fedloru_flwr.lowrank.averaging import weighted_mean
from fedloru_flwr.lowrank.factors import (
    Adapter,
    FactorisedLayer,
    concatenate,
    fold,
    initial_factors,
    product,
    truncate,
)
from fedloru_flwr.lowrank.ledger import Entry, Ledger, digest_tensors
from fedloru_flwr.lowrank.random import (
    choose,
    derive_seed,
    generator_states,
    restore_generators,
    seed_everything,
    seeded,
    uniform,
)
from fedloru_flwr.lowrank.schedules import AccumulationSchedule, LearningRateSchedule

__all__ = [
    "AccumulationSchedule",
    "Adapter",
    "Entry",
    "FactorisedLayer",
    "LearningRateSchedule",
    "Ledger",
    "choose",
    "concatenate",
    "derive_seed",
    "digest_tensors",
    "fold",
    "generator_states",
    "initial_factors",
    "product",
    "restore_generators",
    "seed_everything",
    "seeded",
    "truncate",
    "uniform",
    "weighted_mean",
]
