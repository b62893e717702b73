"""An analysis in numbers: means over seeds with confidence intervals, as Markdown and as CSV."""

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedloru_flwr.rank.learned import LEDGER

Row = Mapping[str, Any]
NONE = "\u2013"
ALL_ROUNDS = "all"
RESTARTED = "\u2020"  # marks rounds after which the factors are fresh
# Student's t for 95 % and 1, 2, ... degrees of freedom; beyond the table it is taken as the last.
_T95_TO_15 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131)
_T95_TO_30 = (2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042)
_T95 = _T95_TO_15 + _T95_TO_30
_SPACE_NAMES = {"full": "all parameters", "adapter": "factors"}
_LEADING = ("training", "label", "seed", "round", "after_restart", "kind", "of", "points", "number", "space", "layer")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval, by Student's t; without one for a single seed."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        """Of independent values; None if there are none."""
        if not values:
            return None
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, None, 1)
        half = _T95[min(len(values) - 1, len(_T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, len(values))

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval on another, monotonous scale."""
        low, high = (None if one is None else function(one) for one in (self.low, self.high))
        return Interval(function(self.mean), low, high, self.count)

    def shown(self, digits: int = 3) -> str:
        """``1.52 [1.31, 1.77]``."""
        told = f"{self.mean:.{digits}g}"
        return (
            told if self.low is None or self.high is None else f"{told} [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        )


@dataclass(frozen=True)
class Claim:
    """Client against server: stable ranks on few samples and on many, paired by seed (and round).

    Attributes:
        of: what the few are: ``sample``, drawn from the many, or ``client``, clients' own samples.
        training: the training's label.
        space: ``full`` or ``adapter``.
        layer: ``""`` for the whole.
        server_round: the round, or `ALL_ROUNDS`.
        points: the sizes of the small samples, of clients' own their mean, and of the whole.
        small: stable rank on the small samples, by seed.
        whole: on the whole one, by seed.
        ratio: geometric mean of small over whole, over the seeds; over all rounds each seed counts once.
        larger: in how many of ``pairs`` (seed, round, draw or client) the small sample's was larger.
        pairs: how many there are.
        left_out: pairs beside these that have no ratio, since one of the two Hessians is zero.
    """

    of: str
    training: str
    space: str
    layer: str
    server_round: int | str
    points: tuple[int, int]
    small: list[float]
    whole: list[float]
    ratio: Interval | None
    larger: int
    pairs: int
    left_out: int = 0

    @property
    def told_left_out(self) -> str:
        """How many of all pairs were left out, with the reason; empty for none."""
        if not self.left_out:
            return ""
        whose = "its Hessian is" if self.left_out == 1 else "their Hessians are"
        return f"{self.left_out} of {self.pairs + self.left_out} left out: {whose} zero"


def claims(rows: Iterable[Row], layer: str = "") -> list[Claim]:
    """Every small sample size, and clients' own samples, against the whole: at each round, and over all.

    Args:
        rows: all of them.
        layer: whose diagonal block; ``""`` for the whole Hessian.
    """
    whole: dict[tuple[str, str], dict[tuple[int, int], _Size]] = defaultdict(dict)
    found: dict[tuple[str, str], dict[tuple[str, int], list[_Size]]] = defaultdict(lambda: defaultdict(list))
    measured = [row for row in rows if row["kind"] == "hessian" and row["layer"] == layer]
    most = max((row["points"] for row in measured if row["of"] == "sample"), default=0)
    for row in measured:
        place, at = (row["label"], row["space"]), (row["seed"], row["round"])
        one = _Size(*at, row["points"], row["stable_rank"])
        if row["of"] == "sample" and row["points"] == most:
            whole[place][at] = one
        else:
            found[place][row["of"], row["points"] if row["of"] == "sample" else 0].append(one)
    made = []
    for (training, space), groups in found.items():
        there = whole[training, space]
        for of, size in sorted(groups, key=lambda group: (group[0] != "sample", group[1])):
            pairs = [
                _Pair(one.seed, one.server_round, one.points, one.stable_rank, there[one.seed, one.server_round][-1])
                for one in groups[of, size]
                if (one.seed, one.server_round) in there
            ]
            rounds: list[int | str] = [*sorted({pair.server_round for pair in pairs}), ALL_ROUNDS]
            for at_round in rounds if pairs else []:
                chosen = [pair for pair in pairs if at_round in (ALL_ROUNDS, pair.server_round)]
                made.append(_claim(of, training, space, layer, at_round, most, chosen))
    return made


class _Size(NamedTuple):
    """A stable rank on so many points."""

    seed: int
    server_round: int
    points: int
    stable_rank: float


class _Pair(NamedTuple):
    """A small sample and the whole."""

    seed: int
    server_round: int
    points: int
    small: float
    whole: float


def _claim(of: str, training: str, space: str, layer: str, at: int | str, most: int, pairs: Sequence[_Pair]) -> Claim:
    by_seed: dict[int, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.small > 0 and pair.whole > 0:
            by_seed[pair.seed].append(pair)
    chosen = [pair for own in by_seed.values() for pair in own]
    ratio = Interval.of(
        [statistics.fmean([math.log(pair.small / pair.whole) for pair in own]) for own in by_seed.values()]
    )
    return Claim(
        of=of,
        training=training,
        space=space,
        layer=layer,
        server_round=at,
        points=(round(statistics.fmean([pair.points for pair in pairs])), most),
        small=[statistics.fmean([pair.small for pair in own]) for own in by_seed.values()],
        whole=[statistics.fmean([pair.whole for pair in own]) for own in by_seed.values()],
        ratio=None if ratio is None else ratio.mapped(math.exp),
        larger=sum(pair.small > pair.whole for pair in chosen),
        pairs=len(chosen),
        left_out=len(pairs) - len(chosen),
    )


def verdict(claim: Claim) -> str:
    """What a claim's numbers say, in a sentence."""
    small, whole = claim.points
    few = f"n = {small} has" if claim.of == "sample" else f"clients' own samples (n = {small} on average) have"
    told = f"{claim.training}, {_SPACE_NAMES[claim.space]}: {few} the larger stable rank in {claim.larger} of "
    told += f"{claim.pairs} pairs with n = {whole}"
    told += f" ({claim.told_left_out})" if claim.left_out else ""
    if claim.ratio is None:
        return f"{told}; there is nothing to compare."
    if claim.ratio.low is None or claim.ratio.high is None:
        return f"{told}; a single seed says nothing of chance."
    told += f"; ratio {claim.ratio.shown()} (95 %)"
    if claim.ratio.low > 1:
        return f"{told}: the claim holds here."
    return f"{told}: the opposite holds here." if claim.ratio.high < 1 else f"{told}: undecided."


def markdown(title: str, seeds: Sequence[int], rows: Sequence[Row], failures: Sequence[str] = ()) -> str:
    """All tables; no time of day, so that the same measurements give the same bytes."""
    parts = [f"# {title}\n", f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.\n"]
    if failures:
        parts.append("## Failed\n\n" + "\n".join(f"- {line}" for line in failures) + "\n")
    whole = claims(rows)
    told = [verdict(claim) for claim in whole if claim.server_round == ALL_ROUNDS]
    if told:
        parts.append("\n".join(f"- {line}" for line in told) + "\n")
    sections = (_stable_ranks(rows, whole), _layers(rows), _similarities(rows), _weights(rows), _ledger(rows))
    parts += [section for section in sections if section]
    return "\n".join(parts)


def as_csv(rows: Sequence[Row]) -> str:
    """Every measurement, one a line, with the numbers in full; what does not belong to a kind is empty."""
    columns = dict.fromkeys((*_LEADING, "rank", "entry"))
    for row in rows:
        columns |= dict.fromkeys(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()})
    return buffer.getvalue()


def _stable_ranks(rows: Sequence[Row], whole: Sequence[Claim]) -> str:
    restarted = {(row["label"], row["round"]) for row in rows if row.get("after_restart")}
    lines = [
        [
            claim.training,
            _SPACE_NAMES[claim.space],
            f"{claim.server_round}{f' {RESTARTED}' * ((claim.training, claim.server_round) in restarted)}",
            f"{claim.points[0]}" if claim.of == "sample" else f"clients' ({claim.points[0]})",
            _spread(claim.small),
            _spread(claim.whole),
            claim.ratio.shown() if claim.ratio else NONE,
            _larger(claim),
        ]
        for claim in whole
    ]
    odd = sum(row["kind"] == "hessian" and not row["converged"] for row in rows)
    caption = (
        "Stable rank of the loss Hessian, squared Frobenius norm over squared spectral norm, on few samples and on the "
        "whole: mean ± sample standard deviation over the seeds. Ratio: geometric mean of small over whole, paired by "
        "seed, with its 95 % confidence interval; over all rounds, each seed counts once. Larger: pairs in which the "
        "small sample's is. Clients': on clients' own training samples, of which the mean number is in brackets. A "
        "Hessian of zeros has no stable rank: it is left out, and counted where it is. "
        + (f"{RESTARTED}: the factors are fresh, of product zero (B = 0). " if restarted else "")
        + f"{odd} of the measurements did not reach their tolerance."
    )
    heads = ["training", "of", "round", "n", "small", "whole", "ratio", "larger"]
    return _table("Stable rank, client against server", caption, heads, lines, texts=3)


def _larger(claim: Claim) -> str:
    told = f"{claim.larger} of {claim.pairs}"
    return f"{told} ({claim.told_left_out})" if claim.left_out else told


def _layers(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row["layer"] for row in rows if row["kind"] == "hessian" and row["layer"])
    lines = [
        [
            claim.training,
            _SPACE_NAMES[claim.space],
            claim.layer,
            f"{claim.points[0]}",
            _spread(claim.small),
            _spread(claim.whole),
            claim.ratio.shown() if claim.ratio else NONE,
            _larger(claim),
        ]
        for name in names
        for claim in claims(rows, name)
        if claim.server_round == ALL_ROUNDS
    ]
    caption = "The same of each layer's diagonal block of the Hessian, over all rounds."
    heads = ["training", "of", "layer", "n", "small", "whole", "ratio", "larger"]
    return _table("Stable rank by layer", caption, heads, lines, texts=3)


def _similarities(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str, str, int], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    shares: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "similarity":
            key = row["label"], row["of"], row["layer"], row["rank"]
            found[key][row["seed"]][row["round"]] = row["mean"]
            shares[key].append(row["share"])
    lines = []
    for (training, of, layer, rank), by_seed in found.items():
        whole = found[training, of, layer, 0]
        means = [statistics.fmean(by_round.values()) for by_round in by_seed.values()]
        gaps = [
            statistics.fmean([value - whole[seed][at] for at, value in by_round.items() if at in whole[seed]])
            for seed, by_round in by_seed.items()
            if {*by_round} & {*whole[seed]}
        ]
        gap = Interval.of(gaps) if rank else None
        lines.append(
            [
                training,
                of,
                layer or "all",
                "full" if rank == 0 else str(rank),
                _spread(means),
                gap.shown() if gap else NONE,
                f"{statistics.fmean(shares[training, of, layer, rank]):.3f}",
            ]
        )
    caption = (
        "Cosine between clients, mean over pairs of clients and over rounds; mean ± sample standard deviation over the "
        "seeds. Gain: cosine after cutting to the rank, minus that of the full matrices, with its 95 % confidence "
        "interval over the seeds. Share: of the squared norm that the cut leaves."
    )
    heads = ["training", "what", "matrix", "rank", "cosine", "gain", "share"]
    return _table("Similarity of clients", caption, heads, lines, texts=3)


def _weights(rows: Sequence[Row]) -> str:
    last = {
        label: max((row["round"] for row in rows if row["kind"] == "weights" and row["label"] == label), default=0)
        for label in dict.fromkeys(row["label"] for row in rows)
    }
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "weights" and row["round"] == last[row["label"]]:
            found[row["label"], row["layer"]].append(row)
    lines = [
        [
            training,
            layer,
            str(last[training]),
            *(_spread([row[key] for row in own]) for key in ("stable_rank", "effective_rank", "rank_90")),
            _spread([float(row["numerical_rank"]) for row in own]),
        ]
        for (training, layer), own in found.items()
    ]
    caption = (
        "What was learned, W - W0, at the last round measured: stable rank, effective rank (exponential of the "
        "singular values' entropy), singular values with 90 % of the squared norm, singular values above a millionth "
        "of the largest. Mean ± sample standard deviation over the seeds."
    )
    heads = ["training", "matrix", "round", "stable rank", "effective rank", "rank of 90 %", "numerical rank"]
    return _table("Rank of what was learned", caption, heads, lines, texts=2)


def _ledger(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == LEDGER:
            found[row["label"], row["layer"], row["entry"]].append(row)
    lines = []
    for (training, layer, entry), own in found.items():
        errors = [row["aggregation_error"] for row in own if row["aggregation_error"] is not None]
        lines.append(
            [
                training,
                layer,
                str(entry),
                str(own[0]["round"]),
                *(
                    _spread([row[key] for row in own])
                    for key in ("frobenius", "new_columns", "new_rows", "new", "alignment", "total_effective_rank")
                ),
                _spread(errors),
            ]
        )
    caption = (
        "What each accumulation added (the last may be the factors still in training): norm; share of its squared "
        "norm in output directions, in input directions and in both that no earlier one had; cosine with the sum of "
        "the earlier ones; effective rank of the sum; aggregation error, mean over its rounds. Mean ± sample standard "
        "deviation over the seeds."
    )
    heads = ["training", "matrix", "entry", "round", "norm", "new outputs", "new inputs", "new", "alignment"]
    return _table("What accumulation adds", caption, [*heads, "effective rank", "aggregation error"], lines, texts=2)


def _table(title: str, caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]], *, texts: int) -> str:
    if not lines:
        return ""
    written = [f"## {title}\n", f"{caption}\n", "| " + " | ".join(heads) + " |"]
    written.append("|" + "---|" * texts + "---:|" * (len(heads) - texts))
    written += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(written) + "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.fmean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean
