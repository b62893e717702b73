"""What clients train on: a built-in, local or hub data set, dealt out by Flower's partitioners."""

from fedloru_flwr.data.loading import load_central, load_client, load_own, notes, partition_indices, share, validate
from fedloru_flwr.data.samples import IGNORED, ClientData, DataConfig, DataError, DataSpec, Samples

__all__ = [
    "IGNORED",
    "ClientData",
    "DataConfig",
    "DataError",
    "DataSpec",
    "Samples",
    "load_central",
    "load_client",
    "load_own",
    "notes",
    "partition_indices",
    "share",
    "validate",
]
