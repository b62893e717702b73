"""Server side: one algorithm a file."""

from fedloru_flwr.strategies.books import ResumeError
from fedloru_flwr.strategies.fedavg import FedAvg
from fedloru_flwr.strategies.federated import FederatedStrategy
from fedloru_flwr.strategies.fedex_lora import FedExLoRA
from fedloru_flwr.strategies.fedhm import FedHM
from fedloru_flwr.strategies.fedlora import FedLoRA
from fedloru_flwr.strategies.fedloru import FedLoRU
from fedloru_flwr.strategies.fedloru_seeded import FedLoRUSeeded
from fedloru_flwr.strategies.fedpara import FedPara
from fedloru_flwr.strategies.fedsa_lora import FedSALoRA
from fedloru_flwr.strategies.ffa_lora import FFALoRA
from fedloru_flwr.strategies.flexlora import FlexLoRA
from fedloru_flwr.strategies.flora import FLoRA
from fedloru_flwr.strategies.hetlora import HetLoRA
from fedloru_flwr.strategies.lowrank import LowRankStrategy
from fedloru_flwr.strategies.lowrank_ef import LowRankEF
from fedloru_flwr.strategies.mfedloru import MFedLoRU
from fedloru_flwr.strategies.pfedloru import PFedLoRU
from fedloru_flwr.strategies.rolora import RoLoRA
from fedloru_flwr.strategies.roster import RosterError

__all__ = [
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedExLoRA",
    "FedHM",
    "FedLoRA",
    "FedLoRU",
    "FedLoRUSeeded",
    "FedPara",
    "FedSALoRA",
    "FederatedStrategy",
    "FlexLoRA",
    "HetLoRA",
    "LowRankEF",
    "LowRankStrategy",
    "MFedLoRU",
    "PFedLoRU",
    "ResumeError",
    "RoLoRA",
    "RosterError",
]
