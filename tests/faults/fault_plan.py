"""A seeded plan of what goes wrong: which client, in which round, in which way."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Each loses the client's reply of that round.
LOSING = (
    "raises",
    "stalls",
    "dies",
    "error reply",
    "missing key",
    "extra key",
    "wrong shape",
    "wrong dtype",
    "wrong order",
    "NaN",
    "Inf",
    "wrong lineage",
    "bytes that do not parse",
    "num-examples of 0",
    "negative num-examples",
    "NaN num-examples",
    "text for metrics",
    "missing metrics",
    "old reply",
    "another round",
    "absurd norm",
    "raises after training",
)


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong.

    Attributes:
        lost: by round, the clients whose replies are lost, each with one of `LOSING`.
        forgetful: by round, clients whose disk and memory are emptied before it, and whose replies count all the same.
    """

    lost: Mapping[int, Mapping[str, str]]
    forgetful: Mapping[int, frozenset[str]]

    @classmethod
    def drawn(cls, seed: int, drawn: Mapping[int, Sequence[str]], share: float, forgetting: float) -> "FaultPlan":
        """Draw a plan in which every way of failing comes about as often as any other.

        Args:
            seed: of the plan.
            drawn: who takes part, by round.
            share: how many of them lose their reply.
            forgetting: how many of the others have lost their cache.
        """
        rng = random.Random(f"faults {seed}")
        replied: set[str] = set()
        bag: list[str] = []
        lost, forgetful = {}, {}
        asked = failed = 0
        for server_round, clients in sorted(drawn.items()):
            asked += len(clients)
            failing = sorted(rng.sample(list(clients), round(share * asked) - failed))
            failed += len(failing)
            lost[server_round] = {}
            for client in failing:
                bag = bag or rng.sample(LOSING, len(LOSING))
                # Nobody can repeat an old reply before the second.
                fit = [kind for kind in bag if kind != "old reply" or client in replied] or ["raises"]
                kind = fit[-1]
                bag = [other for other in bag if other != kind]
                lost[server_round][client] = kind
            well = [client for client in clients if client not in failing]
            # Where a client does not answer, the whole of a phase's time is spent on waiting for it.
            waits = {"stalls", "dies"} & set(lost[server_round].values())
            forgetful[server_round] = frozenset(() if waits else rng.sample(well, round(forgetting * len(well))))
            replied |= set(well)
        return cls(lost, forgetful)

    def fault_of(self, server_round: int, client: str) -> str | None:
        """What goes wrong with a client's reply."""
        return self.lost.get(server_round, {}).get(client)

    def kinds(self) -> set[str]:
        """All that goes wrong in it."""
        return {kind for of_round in self.lost.values() for kind in of_round.values()}
