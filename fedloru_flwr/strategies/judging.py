"""A reply is judged before it is used."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from flwr.app import Message
from flwr.serverapp.exception import AggregationError
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fedloru_flwr import wire
from fedloru_flwr.coding import decode_update
from fedloru_flwr.lowrank import Codec, CodecError

_PIECE = 2**16
_LARGEST_WEIGHT = 2**53  # the sum of such weights stays finite and exact enough; no client has more examples
Metrics = Mapping[str, int | float | list[int] | list[float]]


@dataclass(frozen=True)
class Expected:
    """What a good reply looks like.

    Attributes:
        lineage: the model the client was asked to work on.
        trainables: keys in order, with shapes and dtypes; None for an evaluation reply.
        statistics: the same for running statistics.
        extras: the same for what the method exchanges beside them.
        weighted_by: the metric that weighs the reply.
        server_round: the round the client was asked in.
        codec: of the trainables; None where they travel as they are.
        known: what of them the server knew before, see `fedloru_flwr.coding`.
    """

    lineage: str
    trainables: Mapping[str, Tensor] | None
    statistics: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    weighted_by: str
    server_round: int
    codec: Codec | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def largest_reply(self) -> int:
        """Bytes above which a reply is refused unread: twice those of its tensors, and 1 MiB for all else."""
        parts = (self.trainables or {}, self.statistics, self.extras)
        return 2**20 + 2 * sum(tensor.nbytes for part in parts for tensor in part.values())


class Rejected(ValueError):
    """Why a reply is not used."""


class WorkerDiedError(AggregationError):
    """A worker of the simulation has died, and Flower would go on giving it clients, all of which would fail."""


def judge(message: Message, expected: Expected) -> wire.Reply:
    """Return the parsed reply, or raise `Rejected` with the reason."""
    if wire.find_answer(message) is not None:
        raise Rejected("it could not be brought to the lineage it was asked for")
    if message.has_error():
        raise Rejected(f"error {message.error.code}: {wire.error_reason(message)}")
    size = wire.payload_bytes(message)
    if size > (limit := expected.largest_reply):
        raise Rejected(f"it has {size} bytes, more than the {limit} that such a reply may have")
    try:
        reply = wire.reply_of(message, trained=expected.trainables is not None)
    except wire.WireError as error:
        raise Rejected(str(error)) from error
    if not reply.client:
        raise Rejected("it does not say which client it is from")
    weight = reply.metrics.get(expected.weighted_by)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        raise Rejected(f"{expected.weighted_by} must be a positive number, got {weight!r}")
    if weight > _LARGEST_WEIGHT:
        raise Rejected(f"{expected.weighted_by} must be at most {_LARGEST_WEIGHT}, got {weight!r}")
    if reply.lineage != expected.lineage:
        raise Rejected(f"it worked on lineage {reply.lineage[:12] or 'unknown'}, expected {expected.lineage[:12]}")
    if reply.server_round != expected.server_round:
        raise Rejected(f"it answers round {reply.server_round}, expected round {expected.server_round}")
    if expected.trainables is not None:
        if expected.codec is not None:
            try:
                arrived = decode_update(expected.codec, reply.tensors, expected.trainables, expected.known)
            except CodecError as error:
                raise Rejected(f"its trainable tensors do not parse: {error}") from error
            reply = replace(reply, tensors=arrived)
        _check_tensors("trainable", reply.tensors, expected.trainables)
        # Statistics travel as safetensors, which knows no order.
        _check_tensors("statistics", reply.statistics, dict(sorted(expected.statistics.items())))
        _check_tensors("extra", reply.extras, dict(sorted(expected.extras.items())))
        for name, tensor in reply.extras.items():
            if not is_finite(weight * tensor):
                raise Rejected(f"extra tensor {name} is too large to be weighed by {expected.weighted_by} = {weight}")
    return reply


def reject_odd_metrics(metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """The clients whose metrics have other names or lengths than most, each with a reason: they cannot be averaged."""
    shapes = {client: metrics_shape(of) for client, of in metrics.items()}
    usual = Counter(shapes.values()).most_common(1)[0][0] if shapes else ()
    return {
        client: f"its metrics are {_tell(shape)}, those of most clients {_tell(usual)}"
        for client, shape in shapes.items()
        if shape != usual
    }


def reject_absurd_updates(norms: Mapping[str, float], earlier: Sequence[float], ratio: float) -> dict[str, str]:
    """The clients whose update is absurdly large, each with a reason.

    Args:
        norms: of each client's update, ``||x_k - x||`` over everything it trained.
        earlier: each earlier round's median.
        ratio: how many times the usual norm is absurd; 0: nothing is. Usual is the median of the earlier ones, or the
            median of this round, of at least three, where that is larger: what most clients do is not absurd, as
            where a learning rate grows. Nor is what all clients of a round do, of two or more.
    """
    usual = statistics.median(earlier) if earlier else 0.0
    if len(norms) >= 3:
        usual = max(usual, statistics.median(norms.values()))
    absurd = {client: norm for client, norm in norms.items() if ratio and usual and norm > ratio * usual}
    if len(norms) > 1 and len(absurd) == len(norms):
        return {}
    return {
        client: f"its update's norm {norm:.3g} is more than {ratio:g} times the usual {usual:.3g} (max-norm-ratio, 0 "
        "lets everything pass)"
        for client, norm in absurd.items()
    }


def certain_norm(earlier: Sequence[float], ratio: float) -> float:
    """The norm up to which `reject_absurd_updates` accepts an update whatever the others' norms turn out to be.

    The round's own median can only raise what is usual, and with it the limit.
    """
    if not ratio:
        return math.inf
    return ratio * statistics.median(earlier) if earlier else 0.0


def distance(tensors: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all differences from the origin's tensors of the same names, in float64.

    It goes through the memory in pieces: temporary tensors of a reply's size cost more than the sums.
    """
    norms, buffer = [], torch.empty(_PIECE, dtype=torch.float64)
    for mine, other in zip(_pieces(tensors.values()), _pieces(origin[name] for name in tensors), strict=True):
        difference = buffer[: len(mine)].copy_(mine).sub_(other)
        norms.append(math.sqrt(torch.dot(difference, difference).item()))
    return math.hypot(*norms)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """All numbers of the tensors in order, flat, in pieces of at most `_PIECE`.

    What is smaller is joined, of whatever number formats: an operation on a small tensor costs as much as on a piece.
    """
    waiting: list[Tensor] = []
    count = 0
    for tensor in tensors:
        size = tensor.numel()
        if count + size > _PIECE and waiting:
            yield _joined(waiting)
            waiting, count = [], 0
        if size > _PIECE:
            yield from torch.split(tensor.reshape(-1), _PIECE)
        else:
            waiting.append(tensor)
            count += size
    if count:
        yield _joined(waiting)


def _joined(tensors: list[Tensor]) -> Tensor:
    if len({tensor.dtype for tensor in tensors}) > 1:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]  # torch's; the same in one call
    return flat


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. A sum tells in one pass, unless it overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def metrics_shape(metrics: Metrics) -> tuple[tuple[str, int], ...]:
    """Names and lengths, -1 for a single number."""
    return tuple(sorted((name, len(value) if isinstance(value, list) else -1) for name, value in metrics.items()))


def _tell(shape: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(name if length < 0 else f"{name} ({length} numbers)" for name, length in shape)


def _check_tensors(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if list(got) != list(expected):
        missing, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
        if missing or extra:
            raise Rejected(f"{what} tensors: missing {missing[:3]}, unexpected {extra[:3]}")
        raise Rejected(f"{what} tensors are in another order than they were sent")
    for name, tensor in got.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise Rejected(f"{what} tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        if tensor.dtype != wanted.dtype:
            raise Rejected(f"{what} tensor {name} has dtype {tensor.dtype}, expected {wanted.dtype}")
    if not all(map(is_finite, _pieces(got.values()))):
        name = next(name for name, tensor in got.items() if not is_finite(tensor))
        raise Rejected(f"{what} tensor {name} holds NaN or infinite values")
