"""Networks, the plan of what is factorised, and PEFT attached after it."""

from fedloru_flwr.models.networks import MLP, MODELS, NetworkFactory, ResNet, SmallCNN
from fedloru_flwr.models.peft_files import AdapterError, FromAdapter
from fedloru_flwr.models.plan import AdapterPlan, PlanError, build_seeded, plan_adapter, plan_full, plan_model

__all__ = [
    "MLP",
    "MODELS",
    "AdapterError",
    "AdapterPlan",
    "FromAdapter",
    "NetworkFactory",
    "PlanError",
    "ResNet",
    "SmallCNN",
    "build_seeded",
    "plan_adapter",
    "plan_full",
    "plan_model",
]
