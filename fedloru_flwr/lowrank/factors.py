r"""Factor pairs and what is done with them.

A layer's weight ``W`` is ``(out, in)`` (convolution: ``(out, in, *kernel)``), its factors are ``A (r, in, *kernel)``
and ``B (out, r, 1, ...)``, and its effective weight is ``W + s B A`` with ``s = alpha / r``. A convolution's
product is that of the flattened factors, ``B (out, r) @ A (r, in * prod(kernel))``. Embeddings and GPT-2's
``Conv1D`` store the transpose ``(in, out)`` and are marked ``transposed``.

An **adapter** is a flat ``dict[str, Tensor]`` holding, for every layer, ``<layer>.lora_A`` and ``<layer>.lora_B``; or
the four parts of a Hadamard product ``(w1_a w1_b) * (w2_a w2_b)`` (FedPara, LoHa) at ``<layer>.hada_w1_a`` and so on;
or the product itself, of the weight's shape, at ``<layer>.delta``. Whichever it is, the layer gains ``s`` times it.

Source: FedLoRU (arXiv 2409.12371), section 4; the names of the factors are LoRA's (arXiv 2106.09685), the Hadamard
product is FedPara's (arXiv 2108.06098).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedloru_flwr.lowrank.random import uniform

Adapter = dict[str, Tensor]
Kind = Literal["linear", "conv1d", "conv2d", "embedding"]
HADAMARD_PARTS = ("w1_a", "w1_b", "w2_a", "w2_b")


@dataclass(frozen=True)
class FactorisedLayer:
    """One layer whose weight is updated through a factor pair.

    Attributes:
        name: the module's name in the plain model, for example ``"layer1.0.conv1"``.
        kind: the type of layer.
        weight_shape: the stored weight's shape.
        rank: ``r``.
        transposed: the weight is stored as ``(in, out)``.
        dtype: of its factors: float32, or float64 where the weight is that.
    """

    name: str
    kind: Kind
    weight_shape: tuple[int, ...]
    rank: int
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    @cached_property
    def weight_key(self) -> str:
        """The weight's key in the plain model's state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @cached_property
    def a_key(self) -> str:
        """The key of ``A`` in an adapter."""
        return f"{self.name}.lora_A"

    @cached_property
    def b_key(self) -> str:
        """The key of ``B`` in an adapter."""
        return f"{self.name}.lora_B"

    @cached_property
    def delta_key(self) -> str:
        """The key of a product that is not factorised."""
        return f"{self.name}.delta"

    @cached_property
    def hadamard_keys(self) -> tuple[str, str, str, str]:
        """The keys of ``w1_a (out, r)``, ``w1_b (r, in_features)``, ``w2_a`` and ``w2_b``."""
        return tuple(f"{self.name}.hada_{part}" for part in HADAMARD_PARTS)  # type: ignore[return-value]  # four

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys under which an adapter may hold something of this layer."""
        return (self.a_key, self.b_key, self.delta_key, *self.hadamard_keys)

    @cached_property
    def out_features(self) -> int:
        """Rows of the weight seen as a matrix."""
        return self.weight_shape[1] if self.transposed else self.weight_shape[0]

    @cached_property
    def in_features(self) -> int:
        """Columns of the weight seen as a matrix: ``in * prod(kernel)``."""
        return math.prod(self.weight_shape) // self.out_features

    @cached_property
    def max_rank(self) -> int:
        """The largest rank a product of the weight's shape can have."""
        return min(self.out_features, self.in_features)

    def a_shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Shape of ``A``: ``(r, in, *kernel)``."""
        r = self.rank if rank is None else rank
        return (r, self.in_features) if self.transposed else (r, *self.weight_shape[1:])

    def b_shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Shape of ``B``: ``(out, r, 1, ...)``."""
        r = self.rank if rank is None else rank
        kernel = () if self.transposed else (1,) * (len(self.weight_shape) - 2)
        return (self.out_features, r, *kernel)

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten a factor pair of any rank to ``A (r, in_features)``, ``B (out_features, r)``."""
        return a.reshape(-1, self.in_features), b.reshape(self.out_features, -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Give an ``(out_features, in_features)`` matrix the shape of the stored weight."""
        return matrix.T.contiguous() if self.transposed else matrix.reshape(self.weight_shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Flatten a tensor of the stored weight's shape to ``(out_features, in_features)``."""
        return weight.T if self.transposed else weight.reshape(self.out_features, self.in_features)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or unchanged where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread: a matrix product's last bits depend on the number of threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def has_product(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> bool:
    """Whether the adapter says what this layer gains."""
    if layer.a_key in adapter and layer.b_key in adapter:
        return True
    return layer.delta_key in adapter or all(key in adapter for key in layer.hadamard_keys)


def rank_bound(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> int:
    """The largest rank that the adapter's product can have; 0 where it has none."""
    if layer.delta_key in adapter:
        return layer.max_rank
    if layer.hadamard_keys[0] in adapter:
        return int(min(adapter[layer.hadamard_keys[0]].shape[1] ** 2, layer.max_rank))
    return int(min(adapter[layer.b_key].shape[1], layer.max_rank)) if layer.b_key in adapter else 0


def product(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> Tensor:
    """Return the adapter's product (``B A`` of a pair) in the stored weight's shape, in float32 (float64 stays).

    It is computed on one CPU thread, so that everyone who folds the same factors gets the same bits.
    """
    if layer.delta_key in adapter:
        return at_least_float32(adapter[layer.delta_key].detach().cpu())
    with single_thread():
        if layer.hadamard_keys[0] in adapter:
            w1_a, w1_b, w2_a, w2_b = (at_least_float32(adapter[key].detach().cpu()) for key in layer.hadamard_keys)
            return layer.as_weight((w1_a @ w1_b) * (w2_a @ w2_b))
        a, b = layer.as_matrices(adapter[layer.a_key], adapter[layer.b_key])
        return layer.as_weight(at_least_float32(b.detach().cpu()) @ at_least_float32(a.detach().cpu()))


def as_pair(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return matrices ``A (R, in_features)`` and ``B (out_features, R)`` whose product is the adapter's.

    A Hadamard product of rank ``r`` becomes a pair of rank ``r^2``: column ``(i, j)`` of ``B`` is
    ``w1_a[:, i] * w2_a[:, j]``, row ``(i, j)`` of ``A`` is ``w1_b[i] * w2_b[j]``. A bare product goes with an identity.
    """
    if layer.delta_key in adapter:
        dense = layer.as_matrix(at_least_float32(adapter[layer.delta_key]))
        eye = torch.eye(layer.max_rank, dtype=dense.dtype, device=dense.device)
        return (eye, dense) if layer.in_features == layer.max_rank else (dense, eye)
    if layer.hadamard_keys[0] in adapter:
        w1_a, w1_b, w2_a, w2_b = (at_least_float32(adapter[key]) for key in layer.hadamard_keys)
        b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(layer.out_features, -1)
        a = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, layer.in_features)
        return a, b
    a, b = layer.as_matrices(adapter[layer.a_key], adapter[layer.b_key])
    return at_least_float32(a), at_least_float32(b)


def fold(
    weights: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    layers: Sequence[FactorisedLayer],
    scale: float,
) -> dict[str, Tensor]:
    """Return ``W + s B A`` for every layer, keyed as ``weights``; other entries are passed on as they are.

    The sum is formed in float32 and returned in the dtype and on the device of ``W``.
    """
    folded = dict(weights)
    for layer in layers:
        weight = weights[layer.weight_key]
        update = (product(layer, adapter) * scale).to(weight.device)
        folded[layer.weight_key] = (at_least_float32(weight.detach()) + update).to(weight.dtype)
    return folded


def concatenate(adapters: Sequence[tuple[Mapping[str, Tensor], float]], layers: Sequence[FactorisedLayer]) -> Adapter:
    """Join adapters into one of scale 1 with the same effect: ``B' A' = sum_i s_i B_i A_i``.

    ``A'`` stacks the ``A_i``, ``B'`` stacks the ``s_i B_i``; the rank is the sum of the ranks. Where it would exceed
    the layer's own, the product is written as ``B' = sum_i s_i B_i A_i, A' = I`` (or its transpose), which is exact.

    Args:
        adapters: pairs of an adapter and its scale ``s_i``, in the order they were accumulated.
        layers: the layers they belong to.

    Raises:
        ValueError: if ``adapters`` is empty.
    """
    if not adapters:
        raise ValueError("there is nothing to concatenate: pass at least one adapter")
    joined: Adapter = {}
    for layer in layers:
        pairs = [as_pair(layer, one) for one, _ in adapters]
        scales = [scale for _, scale in adapters]
        a = torch.cat([a for a, _ in pairs], dim=0)
        b = torch.cat([b * s for (_, b), s in zip(pairs, scales, strict=True)], dim=1)
        rank = a.shape[0]
        if rank > layer.max_rank:
            with single_thread():
                dense = b @ a
            rank = layer.max_rank
            eye = torch.eye(rank, dtype=dense.dtype, device=dense.device)
            a, b = (eye, dense) if layer.in_features == rank else (dense, eye)
        joined[layer.a_key] = a.reshape(layer.a_shape(rank))
        joined[layer.b_key] = b.reshape(layer.b_shape(rank))
    return joined


def truncate(layer: FactorisedLayer, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best rank-``rank`` pair for ``weight`` and the Frobenius norm of what it leaves out.

    With the singular value decomposition ``U S V^T`` of the weight as a matrix, ``B = U_r sqrt(S_r)`` and
    ``A = sqrt(S_r) V_r^T`` minimise ``||W - B A||_F`` (Eckart-Young); the error is ``sqrt(sum_{i>r} S_i^2)``.

    Args:
        layer: gives the shapes.
        weight: a tensor of the layer's stored shape.
        rank: between 1 and the layer's ``max_rank``.

    Returns:
        ``A``, ``B`` and the error.

    Raises:
        ValueError: if ``rank`` is outside ``[1, max_rank]``.
    """
    if not 1 <= rank <= layer.max_rank:
        raise ValueError(f"rank must be between 1 and {layer.max_rank} for layer {layer.name!r}, got {rank}")
    with single_thread():
        u, s, vh = torch.linalg.svd(at_least_float32(layer.as_matrix(weight)), full_matrices=False)
    root = s[:rank].sqrt()
    a = (root[:, None] * vh[:rank]).reshape(layer.a_shape(rank))
    b = (u[:, :rank] * root).reshape(layer.b_shape(rank))
    return a, b, float(torch.linalg.vector_norm(s[rank:]))


def initial_factors(
    layers: Sequence[FactorisedLayer], seed: int, version: int, *, rank: int | None = None, label: str = "factors"
) -> Adapter:
    """Return fresh factors whose product is zero, drawn from ``(seed, version, layer)``.

    Linear and convolution: ``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0`` (LoRA's initialisation, ``in`` counting the
    kernel). Embedding: ``A = 0`` and ``B ~ U(-sqrt(3), sqrt(3))``, of unit variance, since a row of ``A`` is a token.

    Args:
        layers: the factorised layers.
        seed: the run's seed.
        version: the number of restarts so far, so that each draws anew.
        rank: another rank than the layers'.
        label: keeps the draws for one purpose apart from those for another.
    """
    adapter: Adapter = {}
    for layer in layers:
        a, b = torch.zeros(layer.a_shape(rank)), torch.zeros(layer.b_shape(rank))
        if layer.kind == "embedding":
            b = uniform(seed, label, version, layer.name, shape=b.shape, bound=math.sqrt(3.0))
        else:
            bound = 1.0 / math.sqrt(layer.in_features)
            a = uniform(seed, label, version, layer.name, shape=a.shape, bound=bound)
        adapter[layer.a_key], adapter[layer.b_key] = a.to(layer.dtype), b.to(layer.dtype)
    return adapter


def initial_hadamard(layers: Sequence[FactorisedLayer], seed: int, version: int) -> Adapter:
    """Return fresh parts of Hadamard products of zero: ``w2_b = 0``, the others ``U(-1/sqrt(n), 1/sqrt(n))``.

    ``n`` is a part's number of columns, which is PEFT's initialisation.
    """
    adapter: Adapter = {}
    for layer in layers:
        for part, key in zip(HADAMARD_PARTS, layer.hadamard_keys, strict=True):
            shape = (layer.out_features, layer.rank) if part.endswith("a") else (layer.rank, layer.in_features)
            bound = 0.0 if part == "w2_b" else 1.0 / math.sqrt(shape[1])
            drawn = uniform(seed, "factors", version, layer.name, part, shape=shape, bound=bound)
            adapter[key] = drawn.to(layer.dtype)
    return adapter


def frozen_a(
    layers: Sequence[FactorisedLayer], seed: int, version: int, *, orthonormal: bool, rank: int | None = None
) -> Adapter:
    """Return the ``A`` that one-sided methods share by seed and never train.

    Args:
        layers: the factorised layers.
        seed: the run's seed.
        version: the number of restarts so far.
        orthonormal: rows of length 1 at right angles (FedLoRU's one-sided form), else LoRA's initial ``A``
            (FFA-LoRA). An embedding's ``A`` is drawn in either way like a linear layer's.
        rank: another rank than the layers'.
    """
    adapter: Adapter = {}
    for layer in layers:
        a = uniform(
            seed,
            "factors",
            version,
            layer.name,
            shape=layer.a_shape(rank),
            bound=1.0 / math.sqrt(layer.in_features),
        )
        adapter[layer.a_key] = orthonormal_rows(a) if orthonormal else a
    return adapter


def orthonormal_rows(a: Tensor) -> Tensor:
    """Gram and Schmidt's process in float64, so that rounding to float32 gives the same on every machine."""
    rows = a.reshape(len(a), -1).double()
    done: list[Tensor] = []
    for row in rows:
        for _ in range(2):  # the second pass takes away what rounding has left
            for other in done:
                row = row - (row * other).sum() * other
        done.append(row / (row * row).sum().sqrt())
    return torch.stack(done).to(a.dtype).reshape(a.shape)
