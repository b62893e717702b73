r"""What travels under a codec: a server's tensors to its clients, and a client's update back.

Down goes ``C(x - x_0)``, with ``x_0`` the factors as they were drawn, which everybody knows, where that is the smaller
of the two, or else ``C(x)``; dense leaves always whole. The server keeps ``x`` as it is: what a codec leaves out of one
message is still in the next one's, for whoever receives that, and nothing adds up.

Up goes ``C(x_k - y + e_k)``, with ``y`` what the client received and ``e_k`` what its last message left out. The server
adds what arrives to its own ``x``, not to ``y``, so that an error of the way down does not come back. With error
feedback (Karimireddy et al., arXiv 1901.09847) ``e_k <- x_k - y + e_k - C(x_k - y + e_k)``; without it ``e_k = 0``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fedloru_flwr.lowrank import Codec, CodecError
from fedloru_flwr.lowrank.ledger import CODED

RESIDUAL = "residual/"


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
        return {"codec": self.codec, "shapes": {k: list(v) for k, v in self.shapes.items()}, "drawn": self.from_drawn}

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
            return cls(codec, shapes, label["drawn"] is True, bytes_of(arrays))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a coded message lacks or mistypes {error}") from error


def _fits(drawn: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.shape == drawn.shape


def _size(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(tensor.float())) for tensor in tensors.values())


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor of them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(arrays: Mapping[str, Tensor]) -> bytes:
    """The bytes that travel in place of tensors.

    Raises:
        CodecError: if the tensors are something else.
    """
    if list(arrays) != [CODED] or arrays[CODED].dtype != torch.uint8 or arrays[CODED].dim() != 1:
        raise CodecError(f"expected one array {CODED!r} of bytes, got {', '.join(list(arrays)[:3]) or 'none'}")
    return arrays[CODED].numpy().tobytes()


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
    data = codec.encode(update, seed)
    arrives = codec.decode(data, {key: value.shape for key, value in update.items()})
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
