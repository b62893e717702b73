"""FedLoRU: federated low-rank updates, accumulated into a full-rank model (arXiv 2409.12371, algorithm 1).

Each round the clients train ``A`` and ``B`` with ``W`` frozen and the server averages them,
``A <- sum_k p_k A_k``, ``B <- sum_k p_k B_k``; every ``tau`` rounds ``W <- W + s B A`` on the server and every client,
and the factors restart. After ``T`` rounds the model is ``W_0 + s sum_i B_i A_i``, of rank up to ``r floor(T / tau)``.

A round moves ``r (in + out)`` numbers a factorised layer and the dense leaves, down and up; an accumulation costs no
message of its own, but each client receives every entry once, at its next contact.
"""

from collections.abc import Mapping
from typing import ClassVar

from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class FedLoRU(LowRankStrategy):
    """The paper's algorithm; for the arguments see `LowRankStrategy`. ``tau`` is 10 where it is not given."""

    algorithm = "fedloru"
    accumulation = Accumulation(every=10)
    refused: ClassVar[Mapping[str, str]] = {
        "ranks": "averaging needs factors of one shape; mFedLoRU is FedLoRU for clients of different ranks"
    }
