"""FedLoRU: communication-efficient federated training with low-rank updates, on Flower.

Server side in `fedloru_flwr.strategies`, client side in `fedloru_flwr.clients`; `run` is ``fedloru run`` in Python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloru_flwr.launch import RunFailedError, run

__all__ = ["RunFailedError", "run"]


def __getattr__(name: str) -> Any:
    # Lazily: every Flower process imports this package, and only the command needs these.
    if name in __all__:
        from fedloru_flwr import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
