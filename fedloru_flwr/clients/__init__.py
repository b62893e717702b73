"""Client side: the drop-in session for any Flower app, and the package's own local training."""

from fedloru_flwr.clients.identity import client_identity
from fedloru_flwr.clients.session import LowRankSession, SessionAnswer

__all__ = ["LowRankSession", "SessionAnswer", "client_identity"]
