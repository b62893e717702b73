"""Server side: one algorithm a file."""

from fedloru_flwr.strategies.fedavg import FedAvg
from fedloru_flwr.strategies.federated import FederatedStrategy, ResumeError
from fedloru_flwr.strategies.fedlora import FedLoRA
from fedloru_flwr.strategies.fedloru import FedLoRU
from fedloru_flwr.strategies.roster import RosterError

__all__ = ["FedAvg", "FedLoRA", "FedLoRU", "FederatedStrategy", "ResumeError", "RosterError"]
