"""Server side: one algorithm a file, registered by name."""

from fedloru_flwr.strategies.fedavg import FedAvg
from fedloru_flwr.strategies.federated import FederatedStrategy, ResumeError
from fedloru_flwr.strategies.fedlora import FedLoRA
from fedloru_flwr.strategies.fedloru import FedLoRU
from fedloru_flwr.strategies.roster import RosterError

ALGORITHMS: dict[str, type[FederatedStrategy]] = {"fedavg": FedAvg, "fedlora": FedLoRA, "fedloru": FedLoRU}

__all__ = ["ALGORITHMS", "FedAvg", "FedLoRA", "FedLoRU", "FederatedStrategy", "ResumeError", "RosterError"]
