"""Pure torch mathematics of low-rank updates: no Flower, no PEFT."""

from fedloru_flwr.lowrank.aggregation import (
    aggregation_error,
    aggregation_errors,
    best_pair,
    cut,
    mean_product,
    pad,
    residual,
    stacked,
    unnest,
)
from fedloru_flwr.lowrank.averaging import weighted_mean
from fedloru_flwr.lowrank.codecs import Codec, CodecError, CodecSchedule
from fedloru_flwr.lowrank.compress import compress, has_zero_product, join, relative_difference
from fedloru_flwr.lowrank.factors import (
    Adapter,
    FactorisedLayer,
    as_pair,
    concatenate,
    fold,
    frozen_a,
    initial_factors,
    initial_hadamard,
    orthonormal_rows,
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
from fedloru_flwr.lowrank.streaming import FixedTree, TreeMean, TreeProducts, place_of

__all__ = [
    "AccumulationSchedule",
    "Adapter",
    "Codec",
    "CodecError",
    "CodecSchedule",
    "Entry",
    "FactorisedLayer",
    "FixedTree",
    "LearningRateSchedule",
    "Ledger",
    "TreeMean",
    "TreeProducts",
    "aggregation_error",
    "aggregation_errors",
    "as_pair",
    "best_pair",
    "choose",
    "compress",
    "concatenate",
    "cut",
    "derive_seed",
    "digest_tensors",
    "fold",
    "frozen_a",
    "generator_states",
    "has_zero_product",
    "initial_factors",
    "initial_hadamard",
    "join",
    "mean_product",
    "orthonormal_rows",
    "pad",
    "place_of",
    "product",
    "relative_difference",
    "residual",
    "restore_generators",
    "seed_everything",
    "seeded",
    "stacked",
    "truncate",
    "uniform",
    "unnest",
    "weighted_mean",
]
