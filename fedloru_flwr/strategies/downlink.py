"""What the server sends under a codec, see `fedloru_flwr.coding`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.coding import Chain, Parcel
from fedloru_flwr.lowrank import Adapter, Codec, CodecSchedule, derive_seed
from fedloru_flwr.models.plan import AdapterPlan
from fedloru_flwr.strategies.state import ServerState


@dataclass(frozen=True)
class Downlink:
    """The codecs of what is sent and accumulated, by rounds.

    Attributes:
        schedule: of the codecs.
        plan: of the model.
        seed: the run's.
    """

    schedule: CodecSchedule
    plan: AdapterPlan
    seed: int

    def __str__(self) -> str:
        return str(self.schedule)

    def at(self, server_round: int) -> Codec:
        """The codec of a round."""
        return self.schedule.at(server_round)

    def is_sparse(self, server_round: int | None = None) -> bool:
        """Whether changes are sent, in a round or (without one) in any."""
        codecs = self.schedule.codecs if server_round is None else (self.at(server_round),)
        return any(codec.keep < 1 for codec in codecs)

    def of_entries(self, server_round: int) -> Codec | None:
        """The codec of what is accumulated after a round: that of the round, but all of it; None: it is not coded."""
        codec = replace(self.at(server_round), keep=1.0)
        return None if codec.is_exact else codec

    def advanced(self, state: ServerState, server_round: int) -> ServerState:
        """The state with one step more towards what clients are to hold, where changes are sent in this round.

        A chain begins at what the server has: before round 1 its clients can build that, unless they were given other
        weights; later they are sent it once.
        """
        if not self.is_sparse(server_round):
            return state
        chain = state.chain or Chain.begun(state.trainables, state.draw)
        seed = derive_seed(self.seed, "downlink", "train", server_round)
        chain = chain.advanced(state.trainables, state.draw, self.fresh, self.at(server_round), seed)
        return replace(state, chain=chain)

    def fresh(self, draw: int) -> Adapter:
        """The factors of a draw."""
        return self.plan.fresh(self.seed, draw)

    def parcel(self, server_round: int, work: wire.Work, payload: Mapping[str, Tensor]) -> Parcel | None:
        """What clients with this work receive, coded whole; None where it is not."""
        codec = replace(self.at(server_round), keep=1.0)
        if codec == Codec() or not payload:
            return None
        shapes = {key: tuple(value.shape) for key, value in payload.items()}
        drawn = self.plan.fresh_like(shapes, self.seed, work.draw, work.rank)
        seed = derive_seed(self.seed, "downlink", server_round, work.rank, work.half)
        return Parcel.packed(payload, drawn, codec, seed)
