r"""What a server can do with the clients' factors beside averaging them, and how far an average is from exact.

Clients ``k`` hold pairs ``A_k (r_k, in)``, ``B_k (out, r_k)`` and weigh ``p_k``, with ``sum_k p_k = 1``. The exact
aggregate is the mean of the products, ``M = sum_k p_k B_k A_k``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloru_flwr.lowrank.factors import (
    Adapter,
    FactorisedLayer,
    as_pair,
    at_least_float32,
    has_product,
    product,
    single_thread,
    truncate,
)

Adapters = Sequence[Mapping[str, Tensor]]


def shares(weights: Sequence[float]) -> list[float]:
    """``p_k = w_k / sum_j w_j``."""
    total = sum(weights)
    return [weight / total for weight in weights]


def stacked(layer: FactorisedLayer, adapters: Adapters, coefficients: Sequence[float]) -> Adapter:
    """Return ``sum_k c_k B_k A_k`` exactly, as one pair of rank ``sum_k r_k`` or, where that is smaller, as it is.

    ``A = [A_1; A_2; ...]`` and ``B = [c_1 B_1, c_2 B_2, ...]`` (FLoRA, arXiv 2409.05976).
    """
    pairs = [as_pair(layer, adapter) for adapter in adapters]
    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b * c for (_, b), c in zip(pairs, coefficients, strict=True)], dim=1)
    rank = len(a)
    if rank * (layer.out_features + layer.in_features) >= layer.out_features * layer.in_features:
        with single_thread():
            return {layer.delta_key: layer.as_weight(b @ a)}
    return {layer.a_key: a.reshape(layer.a_shape(rank)), layer.b_key: b.reshape(layer.b_shape(rank))}


def mean_product(layer: FactorisedLayer, adapters: Adapters, weights: Sequence[float]) -> Tensor:
    """Return ``M = sum_k p_k B_k A_k`` in the shape of the stored weight."""
    p = shares(weights)
    pairs = [as_pair(layer, adapter) for adapter in adapters]
    with single_thread():
        a = torch.cat([a for a, _ in pairs])
        b = torch.cat([b * share for (_, b), share in zip(pairs, p, strict=True)], dim=1)
        return layer.as_weight(b @ a)


def residual(
    layer: FactorisedLayer, adapters: Adapters, weights: Sequence[float], applied: Mapping[str, Tensor]
) -> Adapter:
    """Return what the applied adapter lacks of the exact aggregate: ``M - B A`` (FedEx-LoRA, arXiv 2410.09432).

    Args:
        layer: gives the keys and shapes.
        adapters: the clients' factors.
        weights: their weights ``w_k``.
        applied: the pair ``A``, ``B`` that the server goes on with.
    """
    return stacked(layer, [*adapters, applied], [*shares(weights), -1.0])


def aggregation_error(
    layer: FactorisedLayer, adapters: Adapters, weights: Sequence[float], applied: Mapping[str, Tensor]
) -> float:
    r"""Return ``||M - D||_F / ||M||_F``, with ``D`` the applied adapter's product; 0 where ``M`` is zero.

    Computed in float64, from the factors through ``||B A||_F^2 = tr((B^T B)(A A^T))`` where that takes fewer operations
    than forming the product.
    """
    if any(layer.delta_key in one for one in adapters):
        return product_error(
            layer, {layer.delta_key: mean_product(layer, [_double(one) for one in adapters], weights)}, applied
        )
    pairs = [as_pair(layer, _double(adapter)) for adapter in adapters]
    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b * share for (_, b), share in zip(pairs, shares(weights), strict=True)], dim=1)
    return product_error(layer, {layer.a_key: a, layer.b_key: b}, applied)


def aggregation_errors(
    layers: Sequence[FactorisedLayer], adapters: Adapters, weights: Sequence[float], applied: Mapping[str, Tensor]
) -> dict[str, float]:
    """`aggregation_error` of every layer whose products all of them tell, by its name."""
    known = [layer for layer in layers if all(has_product(layer, one) for one in (*adapters, applied))]
    return {
        layer.name: aggregation_error(layer, [of(layer, one) for one in adapters], weights, applied) for layer in known
    }


def of(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> Adapter:
    """What an adapter holds of one layer."""
    return {key: adapter[key] for key in layer.keys if key in adapter}


def product_error(layer: FactorisedLayer, exact: Mapping[str, Tensor], applied: Mapping[str, Tensor]) -> float:
    r"""Return ``||M - D||_F / ||M||_F`` as `aggregation_error` does, with ``M`` the product of ``exact``."""
    exact, applied = (_double(of(layer, adapter)) for adapter in (exact, applied))
    if layer.delta_key in exact or layer.delta_key in applied:
        matrix = layer.as_matrix(product(layer, exact))
        difference = matrix - layer.as_matrix(product(layer, applied))
        norms = float(torch.linalg.matrix_norm(difference)), float(torch.linalg.matrix_norm(matrix))
    else:
        (a, b), (applied_a, applied_b) = as_pair(layer, exact), as_pair(layer, applied)
        with single_thread():
            gap = _product_norm(torch.cat([b, -applied_b], dim=1), torch.cat([a, applied_a]))
            norms = gap, _product_norm(b, a)
    return norms[0] / norms[1] if norms[1] > 0 else 0.0


def _double(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in adapter.items()}


def _product_norm(b: Tensor, a: Tensor) -> float:
    rank, (rows, columns) = len(a), (b.shape[0], a.shape[1])
    if rank * (rows + columns) >= rows * columns:
        return float(torch.linalg.matrix_norm(b @ a))
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    # Differences that cancel leave rounding of the order of the terms, which may come out negative.
    noise = 1e-14 * float(b.square().sum()) * float(a.square().sum())
    return squared**0.5 if squared > noise else 0.0


def cut(layer: FactorisedLayer, adapter: Mapping[str, Tensor], rank: int) -> Adapter:
    """Keep the first ``rank`` rows of ``A`` and columns of ``B`` (HetLoRA's truncation)."""
    return {layer.a_key: adapter[layer.a_key][:rank], layer.b_key: adapter[layer.b_key][:, :rank]}


def pad(layer: FactorisedLayer, adapter: Mapping[str, Tensor], rank: int) -> Adapter:
    """Fill a pair up with zeros to ``rank`` (HetLoRA's padding)."""
    a, b = adapter[layer.a_key], adapter[layer.b_key]
    padded = {layer.a_key: a.new_zeros(layer.a_shape(rank)), layer.b_key: b.new_zeros(layer.b_shape(rank))}
    padded[layer.a_key][: len(a)] = a
    padded[layer.b_key][:, : b.shape[1]] = b
    return padded


def best_pair(layer: FactorisedLayer, delta: Tensor, rank: int) -> Adapter:
    """The best pair of this rank for a product, by truncated singular value decomposition; see `truncate`."""
    a, b, _ = truncate(layer, delta, rank)
    return {layer.a_key: a, layer.b_key: b}


def unnest(
    layer: FactorisedLayer, adapter: Mapping[str, Tensor], nested: Mapping[str, Tensor], scale: float
) -> Adapter:
    """Return ``A + s_A A_d A_u`` and ``B + s_B B_d B_u`` (mFedLoRU), with one scale for both.

    Args:
        layer: gives the keys and shapes.
        adapter: the pair ``A``, ``B`` that the client received.
        nested: its ``<key>_down`` and ``<key>_up`` of both.
        scale: ``s_A = s_B``.
    """
    a, b = (at_least_float32(adapter[key]) for key in (layer.a_key, layer.b_key))
    a_down, a_up, b_down, b_up = (
        at_least_float32(nested[f"{key}_{part}"]) for key in (layer.a_key, layer.b_key) for part in ("down", "up")
    )
    with single_thread():
        a = a + scale * (a_down @ a_up.flatten(1)).reshape(a.shape)
        b = b + scale * (b_down.flatten(1) @ b_up).reshape(b.shape)
    return {layer.a_key: a, layer.b_key: b}
