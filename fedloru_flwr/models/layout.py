r"""What one client's model holds beside its frozen base: which adapter tensors, under which keys, at which scale.

The effective weight of a factorised layer is ``W + s B' A'`` plus, where there is one, ``s_p B_p A_p``:

- Family ``lora``: ``A (r, in, *kernel)`` at ``<layer>.lora_A`` and ``B (out, r, 1, ...)`` at ``<layer>.lora_B``;
  ``A' = A``, ``B' = B``.
- Nested (mFedLoRU): also ``A_d (r, r_A)``, ``A_u (r_A, in, *kernel)``, ``B_d (out, r_B, 1, ...)``, ``B_u (r_B, r)``;
  ``A' = A + s_A A_d A_u``, ``B' = B + s_B B_d B_u``.
- Personal (pFedLoRU): also ``A_p``, ``B_p``, of the shapes of a pair of the personal rank.
- Family ``loha``: ``w1_a, w2_a (out, r)`` and ``w1_b, w2_b (r, in * prod(kernel))``; ``B' A'`` stands for
  ``(w1_a w1_b) * (w2_a w2_b)``, elementwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedloru_flwr.lowrank import FactorisedLayer
from fedloru_flwr.lowrank.forms import Family


@dataclass(frozen=True)
class Layout:
    """The shape of a client's adapters; clients of one layout can be trained as one batch.

    Attributes:
        rank: ``r`` of the shared pair.
        scale: ``s``, the same for every client, whatever its rank.
        family: ``"lora"`` or ``"loha"``.
        nested_rank: ``r_A = r_B`` of the nested pair; 0 for none.
        nested_scale: ``s_A = s_B``.
        personal_rank: the rank of the personal pair; 0 for none.
        personal_scale: ``s_p``.
    """

    rank: int
    scale: float
    family: Family = "lora"
    nested_rank: int = 0
    nested_scale: float = 1.0
    personal_rank: int = 0
    personal_scale: float = 1.0


def shared_keys(layer: FactorisedLayer, family: Family) -> tuple[str, ...]:
    """Keys of a layer's shared adapter: ``A`` then ``B``, or the four parts of a Hadamard product."""
    if family == "loha":
        return layer.hadamard_keys
    return layer.a_key, layer.b_key


def nested_keys(layer: FactorisedLayer) -> tuple[str, str, str, str]:
    """Keys of ``A_d``, ``A_u``, ``B_d``, ``B_u``."""
    return (f"{layer.a_key}_down", f"{layer.a_key}_up", f"{layer.b_key}_down", f"{layer.b_key}_up")


def personal_keys(layer: FactorisedLayer) -> tuple[str, str]:
    """Keys of the personal ``A`` and ``B``."""
    return f"{layer.name}.personal_A", f"{layer.name}.personal_B"


def shapes(layer: FactorisedLayer, layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of every adapter tensor that a model of this layout has in one layer, in order."""
    r, inner = layout.rank, layout.nested_rank
    if layout.family == "loha":
        left, right = (layer.out_features, r), (r, layer.in_features)
        yield from zip(layer.hadamard_keys, (left, right, left, right), strict=True)
    else:
        yield layer.a_key, layer.a_shape(r)
        yield layer.b_key, layer.b_shape(r)
    if inner:
        a_down, a_up, b_down, b_up = nested_keys(layer)
        yield a_down, (r, inner)
        yield a_up, layer.a_shape(inner)
        yield b_down, layer.b_shape(inner)
        yield b_up, (inner, r)
    if layout.personal_rank:
        a, b = personal_keys(layer)
        yield a, layer.a_shape(layout.personal_rank)
        yield b, layer.b_shape(layout.personal_rank)
