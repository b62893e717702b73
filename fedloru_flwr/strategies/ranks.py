"""Which client trains at which rank."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedloru_flwr.lowrank import derive_seed


class RankMap:
    """Ranks by share of the clients, by client, or one for all.

    Args:
        ranks: ``"4:0.5,8:0.3,16:0.2"`` (shares that add up to 1), a mapping from client to rank, or the path of a
            ``.toml`` or ``.json`` file that holds one (``"default"`` stands for clients not named); empty or None: one
            rank for all.
        rank: the rank of clients that the map says nothing of.
        num_clients: K, so that clients ``"0"`` to ``"K-1"`` get exactly their shares; others get theirs by chance.
        seed: of who gets which.

    Raises:
        ValueError: for anything that is no such map.
    """

    def __init__(
        self, ranks: str | Mapping[str, int] | None, rank: int, *, num_clients: int | None = None, seed: int = 0
    ) -> None:
        self._rank = rank
        self._num_clients = num_clients or 0
        self._seed = seed
        self._shares: list[tuple[int, float]] = []
        self._named: dict[str, int] = {}
        if isinstance(ranks, str) and ranks.strip():
            if Path(ranks).suffix in (".toml", ".json"):
                self._named = _checked(_read(Path(ranks)), ranks)
            else:
                self._shares = parse_shares(ranks)
        elif ranks:
            self._named = _checked(ranks, "ranks")
        self._position: dict[str, int] = {}
        if self._shares and self._num_clients:
            names = [str(index) for index in range(self._num_clients)]
            by_chance = sorted(names, key=lambda name: derive_seed(seed, "rank", name))
            self._position = {name: position for position, name in enumerate(by_chance)}

    @property
    def uniform(self) -> bool:
        """Whether all clients have the rank of the settings."""
        return not self._shares and not self._named

    @property
    def highest(self) -> int:
        """The largest rank that any client may get."""
        rest = [self._named.get("default", self._rank)] if self._named else []
        return max([rank for rank, _ in self._shares] + list(self._named.values()) + rest, default=self._rank)

    def of(self, client: str, budget: int = 0) -> int:
        """The rank of a client: what the map says, but at most what the client says it can train (0: anything)."""
        if self._named:
            rank = self._named.get(client, self._named.get("default", self._rank))
        elif self._shares:
            if client in self._position:
                x = (self._position[client] + 0.5) / self._num_clients
            else:
                x = derive_seed(self._seed, "rank", client) / 2**63
            rank, reached = self._shares[-1][0], 0.0
            for candidate, share in self._shares:
                reached += share
                if x < reached:
                    rank = candidate
                    break
        else:
            rank = self._rank
        return min(rank, budget) if budget else rank

    def describe(self) -> object:
        """The map as JSON can hold it, to tell one run from another."""
        return self._named or self._shares or self._rank


def parse_shares(text: str) -> list[tuple[int, float]]:
    """Parse ``"4:0.5,8:0.3,16:0.2"``.

    Raises:
        ValueError: if it is no such list, or the shares do not add up to 1.
    """
    shares = []
    for part in text.split(","):
        rank, colon, share = part.strip().partition(":")
        try:
            pair = int(rank), float(share)
        except ValueError:
            colon = ""
        if not colon or pair[0] < 1 or not 0 < pair[1] <= 1:
            raise ValueError(
                f"ranks = {text!r}: {part.strip()!r} is not rank:share with a rank of at least 1 and a share between 0 "
                'and 1, as in "4:0.5,16:0.5"; or name a .toml or .json file'
            )
        shares.append(pair)
    total = sum(share for _, share in shares)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"ranks = {text!r}: the shares add up to {total:g}, they must make 1")
    return shares


def _read(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(f"ranks = {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"ranks = {str(path)!r} does not parse: {error}") from error


def _checked(raw: object, where: str) -> dict[str, int]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"ranks = {where!r}: expected a table of client = rank")
    for client, rank in raw.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"ranks: client {client!r} has rank {rank!r}, expected a whole number of at least 1")
    return {str(client): rank for client, rank in raw.items()}
