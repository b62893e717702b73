r"""What travels under a codec: a server's tensors to its clients, and a client's update back.

Down goes ``C(x - x_0)``, with ``x_0`` the factors as they were drawn, which everybody knows, where that is the smaller
of the two, or else ``C(x)``; dense leaves always whole. The server keeps ``x`` as it is: what a codec leaves out of one
message is still in the next one's, for whoever receives that, and nothing adds up.

Where the codec is sparse, what goes down is ``C(x - y)``, with ``y`` what all who have followed hold, and everybody,
the server too, then has ``y <- y + C(x - y)`` (EF21: Richtarik et al., arXiv 2106.05203). Such steps form a chain: a
client that was not asked for some rounds is sent the steps it lacks, or ``y`` itself where that is smaller.

Up goes ``C(x_k - y + e_k)``, with ``y`` what the client received and ``e_k`` what its last message left out. The server
adds what arrives to its own ``x``, not to ``y``, so that an error of the way down does not come back. With error
feedback (Karimireddy et al., arXiv 1901.09847) ``e_k <- x_k - y + e_k - C(x_k - y + e_k)``; without it ``e_k = 0``.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fedloru_flwr.lowrank import Codec, CodecError, digest_tensors
from fedloru_flwr.lowrank.ledger import CODED, as_tensor, bytes_of

RESIDUAL = "residual/"
Fresh = Callable[[int], Mapping[str, Tensor]]
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Parcel:
    """A server's tensors under a codec.

    Attributes:
        codec: its name.
        shapes: of the tensors, by key, in order.
        from_drawn: whether factors are sent as what they differ from those drawn.
        data: the bytes.
    """

    codec: str
    shapes: Mapping[str, tuple[int, ...]]
    from_drawn: bool
    data: bytes

    @classmethod
    def packed(cls, tensors: Mapping[str, Tensor], drawn: Mapping[str, Tensor], codec: Codec, seed: int) -> Self:
        """Code tensors for clients that know what was ``drawn``."""
        drawn = {key: tensors[key] - of for key, of in drawn.items() if _fits(of, tensors.get(key))}
        from_drawn = _size(drawn) < _size({key: tensors[key] for key in drawn})
        coded = codec.encode({**tensors, **drawn} if from_drawn else tensors, seed)
        return cls(str(codec), {key: tuple(of.shape) for key, of in tensors.items()}, from_drawn, coded)

    def opened(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, in float32.

        Raises:
            CodecError: if the bytes are not those of such tensors.
        """
        found = Codec.parse(self.codec).decode(self.data, self.shapes)
        if self.from_drawn:
            found |= {key: found[key] + of.float() for key, of in drawn.items() if _fits(of, found.get(key))}
        return found

    def arrays(self) -> dict[str, Tensor]:
        """The bytes as the tensor that travels."""
        return {CODED: as_tensor(self.data)}

    def label(self) -> dict[str, Any]:
        """All but the bytes, as JSON can hold it."""
        return {
            "codec": self.codec,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "drawn": int(self.from_drawn),
        }

    @classmethod
    def labelled(cls, label: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Self:
        """The parcel of a `label` and its `arrays`.

        Raises:
            ValueError: if they are of something else.
        """
        try:
            shapes = {str(key): tuple(int(length) for length in of) for key, of in label["shapes"].items()}
            if any(length < 0 for of in shapes.values() for length in of):
                raise ValueError(f"shapes: {str(shapes)[:200]}")
            codec = str(Codec.parse(str(label["codec"])))
            return cls(codec, shapes, label["drawn"] == 1, bytes_of(arrays))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a coded message lacks or mistypes {error}") from error


def restarted(y: Mapping[str, Tensor], draw: int, fresh: Fresh) -> dict[str, Tensor]:
    """``y`` with the factors of a draw, or as it is for the draw -1."""
    drawn = fresh(draw) if draw >= 0 else {}
    return {key: drawn[key].to(value.dtype) if key in drawn else value for key, value in y.items()}


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Attributes:
        draw: with which the factors begin before it, where they have been drawn anew since the last step; else -1.
        codec: the name of ``C``.
        data: ``C(x - y)``.
    """

    draw: int
    codec: str
    data: bytes

    def after(self, digest: str) -> str:
        """Names the chain that ends with this step, from the name of the one before."""
        return hashlib.sha256(f"{digest}\x1f{self.draw}\x1f{self.codec}\x1f".encode() + self.data).hexdigest()

    def taken(self, y: Mapping[str, Tensor], fresh: Fresh) -> dict[str, Tensor]:
        """``y`` after this step.

        Args:
            y: before it.
            fresh: gives the factors of a draw.

        Raises:
            CodecError: if the bytes are not those of such tensors.
        """
        y = restarted(y, self.draw, fresh)
        changes = Codec.parse(self.codec).decode(self.data, {key: value.shape for key, value in y.items()})
        return {key: value + changes[key] for key, value in y.items()}


@dataclass(frozen=True)
class Chain:
    """What all who have followed hold of the Trainables, and the last steps that led there.

    Attributes:
        root: the digest of ``y`` before the first step.
        digest: names the chain.
        y: what they hold.
        draw: the number of restarts before the last step.
        steps: the last ones, with the names of the chains before them; as many as are smaller than ``y`` together.
    """

    root: str
    digest: str
    y: Mapping[str, Tensor]
    draw: int = 0
    steps: tuple[tuple[str, Step], ...] = ()

    @classmethod
    def begun(cls, tensors: Mapping[str, Tensor], draw: int = 0) -> Self:
        """The chain before the first step, with factors of a draw."""
        root = digest_tensors(tensors)
        return cls(root, root, dict(tensors), draw)

    def advanced(self, x: Mapping[str, Tensor], draw: int, fresh: Fresh, codec: Codec, seed: int) -> "Chain":
        """The chain with one step more, towards ``x``.

        Args:
            x: what the server has.
            draw: the number of restarts before this step.
            fresh: gives the factors of a draw.
            codec: ``C``.
            seed: of the rounding.
        """
        begins = draw if draw != self.draw else -1
        y = restarted(self.y, begins, fresh)
        data = codec.encode({key: x[key] - value for key, value in y.items()}, seed)
        step = Step(begins, str(codec), data)
        steps, size = [(self.digest, step)], len(data)
        for one in reversed(self.steps):
            size += len(one[1].data)
            if size >= self.nbytes():
                break
            steps.insert(0, one)
        return Chain(self.root, step.after(self.digest), step.taken(self.y, fresh), draw, tuple(steps))

    def since(self, digest: str) -> tuple[Step, ...] | None:
        """The steps from there on; None where they are no longer known."""
        if digest == self.digest:
            return ()
        names = [name for name, _ in self.steps]
        return tuple(step for _, step in self.steps[names.index(digest) :]) if digest in names else None

    def nbytes(self) -> int:
        """The size of ``y``."""
        return sum(value.nbytes for value in self.y.values())


@dataclass(frozen=True)
class Follow:
    """How a client comes to the end of a chain.

    Attributes:
        root: see `Chain`.
        start: the chain that it is believed to hold; empty where it is sent ``y`` itself.
        end: the chain that it is to hold.
        steps: that lead there from ``start``.
    """

    root: str
    start: str
    end: str
    steps: tuple[Step, ...] = ()

    @classmethod
    def to_end_of(cls, chain: Chain, held: str) -> Self:
        """The way for a client that holds ``held``, in steps if they are known."""
        steps = chain.since(held)
        return cls(chain.root, held if steps is not None else "", chain.digest, steps or ())

    def arrays(self, chain: Chain) -> dict[str, Tensor]:
        """The tensors that travel."""
        return {CODED: as_tensor(b"".join(step.data for step in self.steps))} if self.start else dict(chain.y)

    def label(self) -> dict[str, Any]:
        """All but the tensors, as JSON can hold it."""
        steps = [[step.draw, step.codec, len(step.data)] for step in self.steps]
        return {"root": self.root, "start": self.start, "end": self.end, "steps": steps}

    def taken(self, y: Mapping[str, Tensor], fresh: Fresh) -> dict[str, Tensor]:
        """``y`` at the end, from what it is at the start.

        Raises:
            CodecError: if a step does not parse, or they lead elsewhere.
        """
        digest = self.start
        for step in self.steps:
            y, digest = step.taken(y, fresh), step.after(digest)
        if digest != self.end:
            raise CodecError("the steps received do not lead where they should: they are corrupt or forged")
        return dict(y)

    @classmethod
    def labelled(cls, label: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Self:
        """The way of a `label` and its `arrays`.

        Raises:
            ValueError: if they are of something else.
        """
        try:
            root, start, end = (label[name] for name in ("root", "start", "end"))
            told = [(int(number), str(Codec.parse(str(codec))), int(size)) for number, codec, size in label["steps"]]
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"a coded message lacks or mistypes {error}") from error
        if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (root, end, start or root)):
            raise ValueError("a chain is named by something else than a digest")
        numbers = [*(number + 1 for number, _, _ in told), *(size for _, _, size in told)]
        if not all(type(one) is int and 0 <= one < 2**31 for one in numbers):
            raise ValueError(f"a chain's numbers are out of range: {str(numbers)[:200]}")
        if not start:
            return cls(root, "", end)
        data, steps = bytes_of(arrays), []
        for number, codec, size in told:
            steps.append(Step(number, codec, data[:size]))
            data = data[size:]
        return cls(root, start, end, tuple(steps))


def _fits(drawn: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.shape == drawn.shape


def _size(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(tensor.float())) for tensor in tensors.values())


def flat_parts(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of one flat tensor, of the names and shapes of others; none if it is of another size."""
    sizes = [of.numel() for of in like.values()]
    if flat.numel() != sum(sizes):
        return {}
    parts = torch.split(flat, sizes)
    return {key: part.view(of.shape) for (key, of), part in zip(like.items(), parts, strict=True)}


def encode_update(
    codec: Codec,
    sent: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Code what a client sends.

    Args:
        codec: how.
        sent: ``x_k``.
        known: ``y``; what is not there, or of another shape, counts as zero.
        residual: ``e_k``; what is not there counts as zero.
        seed: of the rounding.

    Returns:
        The tensor that travels, what arrives of ``x_k`` as seen from ``y``, and what is left out.
    """
    update = {key: value - known[key] if _fits(value, known.get(key)) else value for key, value in sent.items()}
    update = {key: value + residual[key] if key in residual else value for key, value in update.items()}
    data, arrives = codec.transmit(update, seed)
    left = {key: value - arrives[key] for key, value in update.items()}
    return {CODED: as_tensor(data)}, _added(arrives, known), left


def decode_update(
    codec: Codec, arrays: Mapping[str, Tensor], like: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a client sent, as seen from the server's own ``x``.

    Args:
        codec: by which it was coded.
        arrays: that travelled.
        like: tensors of the keys, shapes and dtypes that were coded.
        known: ``x``; what is not there, or of another shape, counts as zero.

    Raises:
        CodecError: if the bytes are not those of such tensors.
    """
    arrived = _added(codec.decode(bytes_of(arrays), {key: of.shape for key, of in like.items()}), known)
    return {key: value.to(like[key].dtype) for key, value in arrived.items()}


def _added(update: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: known[key] + value if _fits(value, known.get(key)) else value for key, value in update.items()}
