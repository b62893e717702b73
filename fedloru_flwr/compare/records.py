"""What a comparison keeps of a run: its settings, how it ended, and its measurements round by round."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fedloru_flwr.config import Scalar
from fedloru_flwr.engines.app_dir import DISTRIBUTION

# Settings that say where and how a run is carried out, not what it computes.
FREE = ("output-dir", "run-name", "resume", "checkpoint-every", "timeout", "track", "track-project")

# A run's status when it has come to its last round, and when a limit has ended it before.
ENDED_WELL = ("finished", "stopped")

Series = list[float | None]
_RANKS: tuple[str, ...] = ("kind", "layer", "entry", "round", "new", "alignment", "aggregation_error")
_RANKS += ("total_stable_rank", "total_effective_rank", "total_rank_90")


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        settings: all of them.
        finished: whether it ran to its end.
        reason: why it did not.
        rounds: of its rows.
        up: bytes that clients had sent by the end of each round, all clients together.
        down: the same for the server.
        accuracy: of the global model on the central test samples; None where it was not evaluated.
        personal: mean over the clients of their own models' accuracy on their own held-out samples.
        error: the relative error of the aggregation, mean over the layers.
        spread: of the last round in which clients evaluated: mean, std and worst decile over clients, by metric.
        seconds: the rounds took.
        path: its directory.
        answers: what a language model said: ``round``, ``prompt``, ``reference`` and ``generated`` of each.
        ranks: the rows of ``rank.csv``, without singular values.
    """

    settings: dict[str, Scalar]
    finished: bool
    reason: str = ""
    rounds: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    accuracy: Series = field(default_factory=list)
    personal: Series = field(default_factory=list)
    error: Series = field(default_factory=list)
    spread: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    path: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_rows(
        cls,
        settings: Mapping[str, Scalar],
        rows: Sequence[Mapping[str, Any]],
        *,
        reason: str = "",
        path: str = "",
        answers: Sequence[dict[str, Any]] = (),
        ranks: Sequence[dict[str, Any]] = (),
    ) -> Self:
        """Make the record of the rows of a ``metrics.jsonl``; a ``reason`` says that the run has failed."""
        up = down = 0
        ups, downs = [], []
        spread: dict[str, dict[str, float]] = {}
        for row in rows:
            # What an evaluation moves is a matter of how often one looks, not of the method.
            looking = (row.get("bytes_by_purpose") or {}).get("evaluation") or {}
            up += row["bytes_up"] - looking.get("up", 0)
            down += row["bytes_down"] - looking.get("down", 0)
            ups.append(up)
            downs.append(down)
            spread = row.get("clients") or spread
        return cls(
            settings=dict(settings),
            finished=not reason,
            reason=reason,
            rounds=[row["round"] for row in rows],
            up=ups,
            down=downs,
            accuracy=[row.get("accuracy") for row in rows],
            personal=[((row.get("clients") or {}).get("personal-accuracy") or {}).get("mean") for row in rows],
            error=[_mean_error(row.get("aggregation_error")) for row in rows],
            spread={name: dict(numbers) for name, numbers in spread.items()},
            seconds=round(sum(row.get("seconds") or 0.0 for row in rows), 3),
            path=path,
            answers=list(answers),
            ranks=[{key: row[key] for key in _RANKS if key in row} for row in ranks],
        )

    @classmethod
    def failed(cls, settings: Mapping[str, Scalar], reason: str) -> Self:
        """A run that did not finish."""
        return cls(dict(settings), False, reason)

    @classmethod
    def of_directory(cls, path: Path, reason: str = "") -> Self:
        """Read a run directory.

        Raises:
            OutputError: there is no run, or it is damaged.
        """
        from fedloru_flwr.runs import RunDirectory

        run = RunDirectory.open(path)
        settings = run.read_manifest().get("config", {})
        summary = run.read_summary()
        if not reason and (summary is None or summary["status"] not in ENDED_WELL):
            reason = f"the run is {summary['status'] if summary else 'not at its end'}"
        rows, more = run.read_rounds(), {"answers": run.read_answers(), "ranks": run.read_ranks()}
        return cls.of_rows(settings, rows, reason=reason, path=str(run.path), **more)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`."""
        return cls(**content)


def fingerprint(settings: Mapping[str, Scalar]) -> str:
    """Name what a run computes: equal for equal settings and versions of this package, whatever its directory."""
    told = {key: value for key, value in sorted(settings.items()) if key not in FREE}
    told[DISTRIBUTION] = importlib.metadata.version(DISTRIBUTION)
    path = Path(str(settings.get("ranks", "")))
    if path.suffix in (".toml", ".json") and path.is_file():
        told["ranks"] = path.read_text(encoding="utf-8", errors="replace")
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _mean_error(by_layer: Mapping[str, float | None] | None) -> float | None:
    errors = [error for error in (by_layer or {}).values() if error is not None]
    return sum(errors) / len(errors) if errors else None
