r"""Means over many clients that are formed as the replies come, in little memory, whatever the order they come in.

Every client has a place, a whole number. A binary tree stands over the places, which parts them bit by bit from the
highest on; the value of a node is that of its left half merged with that of its right half, formed as soon as both are
known, and a half in which nobody replied is passed over. So a result is formed by the same operations on the same
operands, bit for bit, in whatever order replies come; and it is the same whether a client's reply was lost or the
client was never asked.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedloru_flwr.lowrank.aggregation import of, product_error
from fedloru_flwr.lowrank.factors import FactorisedLayer, as_pair, at_least_float32, has_product, single_thread

T = TypeVar("T")


class FixedTree(Generic[T]):
    """A binary tree over places, whose nodes are merged as soon as both halves are known.

    In the order of the places at most about ``log2(n) + 1`` values are held at once, for ``n`` places that are spread
    evenly; in any other, at most twice as many for every run of places that are known.

    Args:
        places: distinct whole numbers of at least 0, at least one; or how many, for ``0 ... n - 1``.
        merge: makes one value of a left and a right one; it may reuse both.
    """

    def __init__(self, places: int | Iterable[int], merge: Callable[[T, T], T]) -> None:
        ordered = list(range(places)) if isinstance(places, int) else sorted(places)
        if not ordered or len(set(ordered)) < len(ordered) or ordered[0] < 0:
            raise ValueError("a tree needs at least 1 place, and each of them once, as a whole number of at least 0")
        self._merge = merge
        self._leaves = {place: 2 * index for index, place in enumerate(ordered)}
        self._parents = _parents(ordered)
        self._known: set[int] = set()
        self._waiting: dict[int, T | None] = {}
        self._root: T | None = None
        self._late: FixedTree[T] | None = None

    def put(self, place: int, value: T | None) -> None:
        """Give a place its value; None: it stays empty.

        Raises:
            ValueError: if there is no such place, or it is known already.
        """
        if not self.is_open(place):
            if self._late is None:
                raise ValueError(f"place {place} does not exist among {len(self._leaves)}, or is known already")
            self._late.put(place, value)
            return
        self._known.add(place)
        node = self._leaves[place]
        while (parent := self._parents.get(node)) is not None:
            if parent not in self._waiting:
                self._waiting[parent] = value
                return
            other = self._waiting.pop(parent)
            value = self._merged(value, other) if node < parent else self._merged(other, value)
            node = parent
        self._root = value

    def _merged(self, left: T | None, right: T | None) -> T | None:
        if left is None or right is None:
            return right if left is None else left
        return self._merge(left, right)

    def extend(self, places: Iterable[int]) -> None:
        """Let there be more places to the right of all others, once; those that are known already are there again."""
        self._late = FixedTree(places, self._merge)

    def is_open(self, place: int) -> bool:
        """Whether there is such a place, of which nothing is known yet."""
        return place in self._leaves and place not in self._known

    def held(self) -> int:
        """How many values are held."""
        return sum(value is not None for value in self._waiting.values())

    def result(self) -> T | None:
        """The whole tree's value, None if it is empty; places not known by now stay empty."""
        for place in self._leaves:
            if place not in self._known:
                self.put(place, None)
        if self._late is not None:
            self._root, self._late = self._merged(self._root, self._late.result()), None
        return self._root


def _parents(places: Sequence[int]) -> dict[int, int]:
    """The parent of every node but the root: node ``2 i`` is place ``i``, node ``2 i + 1`` parts ``i`` from ``i + 1``.

    So whatever is to the left of a node has a smaller number. Two neighbours are parted by the highest bit in which
    they differ; of all that part a run of places, the one of the highest bit is on top.
    """
    bits = [(left ^ right).bit_length() for left, right in itertools.pairwise(places)]
    parents: dict[int, int] = {}
    path: list[int] = []
    for index, bit in enumerate(bits):
        below = None
        while path and bits[path[-1]] < bit:
            below = path.pop()
        if below is not None:
            parents[2 * below + 1] = 2 * index + 1
        if path:
            parents[2 * index + 1] = 2 * path[-1] + 1
        path.append(index)
    for index in range(len(places)):
        beside = [split for split in (index - 1, index) if 0 <= split < len(bits)]
        if beside:
            parents[2 * index] = 2 * min(beside, key=bits.__getitem__) + 1
    return parents


class _Buffer:
    """One contiguous tensor a number format, and in it a view for each tensor of a reply."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        sizes: dict[torch.dtype, int] = {}
        for tensor in like:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        flats = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        self.flats = list(flats.values())
        self.views: list[Tensor] = []
        taken = dict.fromkeys(sizes, 0)
        for tensor in like:
            begin = taken[tensor.dtype]
            taken[tensor.dtype] = end = begin + tensor.numel()
            self.views.append(flats[tensor.dtype][begin:end].view(tensor.shape))


@dataclass
class _Part:
    """The weighted mean of some places: one reply's own tensors, or a buffer."""

    weight: float
    tensors: Sequence[Tensor]
    buffer: _Buffer | None = None


class TreeMean:
    r"""The weighted mean ``sum_k p_k x_k`` with ``p_k = w_k / sum_j w_j``, in float32 (float64 stays).

    A node holds the mean of its clients and their weight: ``m = m_l + w_r / (w_l + w_r) (m_r - m_l)``, in one pass over
    the memory, in place; so the mean of equal values is that value exactly, and large weights overflow nothing. A
    reply's own tensors are read when its neighbour is there, never written, and not copied before.

    Args:
        places: of the clients there may be, see `FixedTree`.
    """

    def __init__(self, places: int | Iterable[int]) -> None:
        self._tree: FixedTree[_Part] = FixedTree(places, partial(_merge_means, []))
        self._keys: list[str] = []
        self._shapes: list[torch.Size] = []

    def add(self, place: int, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Take a client's tensors in; they must not change until the mean is there.

        Args:
            place: the client's.
            tensors: of the same keys, order and shapes as those of the others.
            weight: ``w_k``, above 0.

        Raises:
            ValueError: if the place is known, or the tensors or the weight are not as they must be.
        """
        values = [at_least_float32(tensor) for tensor in tensors.values()]
        shapes = [tensor.shape for tensor in values]
        if not self._keys:
            self._keys, self._shapes = list(tensors), shapes
        if list(tensors) != self._keys or shapes != self._shapes:
            raise ValueError(f"the tensors for place {place} differ from the others in keys, order or shapes")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights must be positive numbers, got {weight}")
        self._tree.put(place, _Part(weight, values))

    def skip(self, place: int) -> None:
        """Nothing will come for a place."""
        self._tree.put(place, None)

    def extend(self, places: Iterable[int]) -> None:
        """Let there be more places, see `FixedTree`."""
        self._tree.extend(places)

    def is_open(self, place: int) -> bool:
        """Whether there is such a place, for which nothing has been said."""
        return self._tree.is_open(place)

    def result(self) -> tuple[dict[str, Tensor], float]:
        """The mean, in tensors of their own, and the sum of the weights.

        Raises:
            ValueError: if nothing was added.
        """
        part = self._tree.result()
        if part is None:
            raise ValueError("there is no mean of nothing")
        return dict(zip(self._keys, [tensor.clone() for tensor in part.tensors], strict=True)), part.weight


def _merge_means(spare: list[_Buffer], left: _Part, right: _Part) -> _Part:
    """The weighted mean of both, in the buffer of either or a spare one."""
    weight = left.weight + right.weight
    share = right.weight / weight
    if left.buffer is not None and right.buffer is not None:
        for into, other in zip(left.buffer.flats, right.buffer.flats, strict=True):
            into.lerp_(other, share)
        spare.append(right.buffer)
        return _Part(weight, left.tensors, left.buffer)
    buffer = left.buffer or right.buffer or (spare.pop() if spare else _Buffer(left.tensors))
    for one, other, into in zip(left.tensors, right.tensors, buffer.views, strict=True):
        torch.lerp(one, other, share, out=into)
    return _Part(weight, buffer.views, buffer)


@dataclass
class _Products:
    """``sum_k w_k B_k A_k`` of some places: by layer a pair ``B``, ``A`` or, where that is smaller, the matrix."""

    weight: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    matrices: dict[str, Tensor] = field(default_factory=dict)


class TreeProducts:
    """The mean of the products ``M = sum_k p_k B_k A_k`` by layer, in float64, for `errors`.

    A node holds a layer as one stacked pair, or as a matrix once that is smaller: never more than the layer's own size.

    Args:
        layers: the factorised layers.
        places: of the clients there may be, see `FixedTree`.
    """

    def __init__(self, layers: Sequence[FactorisedLayer], places: int | Iterable[int]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._tree: FixedTree[_Products] = FixedTree(places, partial(_merge_products, layers))

    def add(self, place: int, adapter: Mapping[str, Tensor], weight: float) -> None:
        """Take a client's adapter in; a layer whose product one client does not tell is left out.

        Raises:
            ValueError: if the place is known.
        """
        pairs = {}
        for name, layer in self._layers.items():
            if has_product(layer, adapter):
                a, b = as_pair(layer, {key: value.double() for key, value in of(layer, adapter).items()})
                pairs[name] = (b * weight, a)
        self._tree.put(place, _Products(weight, pairs))

    def skip(self, place: int) -> None:
        """Nothing will come for a place."""
        self._tree.put(place, None)

    def extend(self, places: Iterable[int]) -> None:
        """Let there be more places, see `FixedTree`."""
        self._tree.extend(places)

    def errors(self, applied: Mapping[str, Tensor]) -> dict[str, float]:
        """``||M - D||_F / ||M||_F`` for every layer whose products are known; see `aggregation_error`.

        Args:
            applied: the adapter whose product is ``D``.
        """
        whole = self._tree.result()
        if whole is None:
            return {}
        errors = {}
        for name, layer in self._layers.items():
            if not has_product(layer, applied):
                continue
            if name in whole.matrices:
                exact = {layer.delta_key: layer.as_weight(whole.matrices[name] / whole.weight)}
            elif name in whole.pairs:
                b, a = whole.pairs[name]
                exact = {layer.a_key: a, layer.b_key: b / whole.weight}
            else:
                continue
            errors[name] = product_error(layer, exact, applied)
        return errors


def _merge_products(layers: Sequence[FactorisedLayer], left: _Products, right: _Products) -> _Products:
    """The sum of both, of the layers that both know."""
    merged = _Products(left.weight + right.weight, {})
    with single_thread():
        for layer in layers:
            name = layer.name
            one, other = left.pairs.get(name), right.pairs.get(name)
            if one is not None and other is not None:
                rank = len(one[1]) + len(other[1])
                if rank * (layer.out_features + layer.in_features) < layer.out_features * layer.in_features:
                    merged.pairs[name] = (torch.cat([one[0], other[0]], 1), torch.cat([one[1], other[1]]))
                else:
                    merged.matrices[name] = (one[0] @ one[1]).addmm_(*other)
            elif name in left.matrices and name in right.matrices:
                merged.matrices[name] = left.matrices[name].add_(right.matrices[name])
            elif name in left.matrices and other is not None:
                merged.matrices[name] = left.matrices[name].addmm_(*other)
            elif name in right.matrices and one is not None:
                merged.matrices[name] = right.matrices[name].addmm_(*one)
    return merged
