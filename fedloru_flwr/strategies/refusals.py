"""Options of a strategy that make no sense, by themselves or together: refused before anything is sent."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloru_flwr.strategies.federated import FederatedStrategy


def check_options(
    *,
    fractions: Mapping[str, float],
    periods: Mapping[str, int],
    amounts: Mapping[str, float],
    max_total_bytes: int,
    num_clients: int | None,
    reinit: str,
    accumulate_into: str,
) -> None:
    """Check each of `FederatedStrategy`'s arguments by itself.

    Args:
        fractions: by name; those that must lie between 0 and 1, ``fraction_train`` among them.
        periods: those that are numbers of rounds.
        amounts: those that must not be negative.
        max_total_bytes: the class's argument of this name.
        num_clients: likewise.
        reinit: likewise.
        accumulate_into: of its ``settings``.

    Raises:
        ValueError: one makes no sense.
    """
    for name, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if fractions["fraction_train"] == 0.0:
        raise ValueError("fraction_train is 0: nobody would train; give a fraction above 0")
    for name, every in periods.items():
        if every < 1:
            raise ValueError(f"{name} must be at least 1 round, got {every}")
    for name, number in amounts.items():
        if not 0.0 <= number < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {number}")
    if max_total_bytes < 0:
        raise ValueError(f"max_total_bytes must be at least 0 (no limit), got {max_total_bytes}")
    if num_clients is not None and num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if reinit not in ("reset", "keep"):
        raise ValueError(f"reinit must be 'reset' or 'keep', got {reinit!r}")
    if accumulate_into not in ("merge", "stack"):
        raise ValueError(f"accumulate_into must be 'merge' or 'stack', got {accumulate_into!r}")


def refuse_combinations(strategy: "FederatedStrategy") -> None:
    """Refuse what makes no sense together, with the reason.

    Raises:
        ValueError: something does not.
    """
    inner, uplink, downlink = strategy.inner, strategy.uplink, strategy.downlink
    own, its = type(strategy).__name__, type(inner.strategy).__name__
    drawn_every_round = strategy.schedule.every == 1 and strategy.reinit == "reset" and bool(strategy.plan.adapted)
    for remembers, what in ((strategy.scaffold, "scaffold=True"), (inner.has_moments(), "a server optimiser")):
        if remembers and drawn_every_round:
            raise ValueError(
                f"{own} that accumulates every round cannot be combined with {what}: its factors "
                "are drawn anew every round, so that what is remembered of them is always zero; accumulate less "
                "often"
            )
    if inner.is_private() and strategy.scaffold:
        raise ValueError(
            f"{its} cannot be combined with scaffold=True: control variates are "
            "clients' mean gradients, which travel and are averaged without clipping and noise"
        )
    if strategy.feedback and uplink.is_exact:
        raise ValueError(
            f"error_feedback=True means nothing with uplink_codec = {str(uplink)!r}, which leaves nothing out"
        )
    if inner.clips_on_clients() and not (uplink.is_plain and downlink.schedule.is_plain):
        raise ValueError(
            f"{its} cannot be combined with codecs: its mod on the clients clips "
            "plain tensors, and finds coded ones; let the server clip (DifferentialPrivacyServerSide...)"
        )
    if inner.is_private() and strategy.schedule.when == "loss":
        raise ValueError(
            f"{its} cannot be combined with accumulate_when='loss': when the model "
            "changes would tell of the clients' losses, which no noise covers; use 'rank'"
        )
    if inner.is_private() and strategy.feedback:
        raise ValueError(
            f"{its} cannot be combined with error feedback: what is clipped off "
            "would come again the next time; set error_feedback=False"
        )
    if inner.is_private() and strategy.plan.statistics:
        names = ", ".join(sorted({name.rpartition(".")[0] for name in strategy.plan.statistics})[:3])
        raise ValueError(
            f"{its} cannot be combined with running statistics (of {names}): they "
            "are averaged without clipping and noise, and would tell of the clients' data; use GroupNorm instead "
            "of BatchNorm"
        )
    if strategy.target_accuracy and not strategy.has_global_model:
        raise ValueError(
            f"{own} cannot be combined with target_accuracy={strategy.target_accuracy:g}: it has no "
            "global model whose accuracy could reach it"
        )
    asked = {
        "inner": None if inner.is_plain() else f"inner={its}",
        "scaffold": "scaffold=True" if strategy.scaffold else None,
        "ranks": None if strategy.ranks.uniform else "clients of different ranks",
        "stack": "accumulate_into='stack'" if strategy.settings.accumulate_into == "stack" else None,
        "keep": "reinit='keep'" if strategy.reinit == "keep" else None,
        "feedback": "error_feedback=True" if strategy.feedback else None,
        "sparse-up": f"uplink_codec={str(uplink)!r}" if any(one.keep < 1 for one in uplink.codecs) else None,
        "sparse": f"downlink_codec={str(downlink)!r}" if downlink.is_sparse() else None,
    }
    for what, reason in strategy.refused.items():
        if asked.get(what):
            raise ValueError(f"{own} cannot be combined with {asked[what]}: {reason}")
