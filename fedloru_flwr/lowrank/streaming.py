r"""Means over many clients that are formed as the replies come, in little memory, whatever the order they come in.

Every client has a place, a number of its own. The numbers are cut into runs of 8, whose clients are merged one after
the other. A binary tree stands over the runs (its nodes are those that share their leading bits); the value of a node
is that of its left half merged with that of its right half, formed as soon as both are known, and whatever nobody
replied in is passed over. So the result is formed by the same operations on the same operands, bit for bit, in whatever
order replies come, and whoever was asked beside those that replied.
"""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedloru_flwr.lowrank.aggregation import of, product_error
from fedloru_flwr.lowrank.factors import FactorisedLayer, as_pair, at_least_float32, has_product, single_thread

T = TypeVar("T")


def place_of(name: str) -> int:
    """A client's place: a number is its own, other names have larger ones, drawn from a hash."""
    if name.isascii() and name.isdecimal() and len(name) < 19:
        return int(name)
    return 2**63 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


class _Fixed(ABC, Generic[T]):
    """What is made of the values of places, each given once, in whatever order they are given.

    Args:
        places: in ascending order, at least one.
    """

    def __init__(self, places: Sequence[int]) -> None:
        if not places:
            raise ValueError("a tree needs at least 1 place")
        if any(right < left for left, right in pairwise(places)):
            raise ValueError("the places must be in ascending order")
        self._known = bytearray(len(places))

    def put(self, index: int, value: T | None) -> None:
        """Give a place its value; None: it stays empty.

        Args:
            index: of the place among all.
            value: to be held.

        Raises:
            ValueError: if there is no such place, or it is known already.
        """
        if not self.is_open(index):
            raise ValueError(f"place {index} of {len(self._known)} does not exist or is known already")
        self._known[index] = 1
        self._take(index, value)

    def is_open(self, index: int) -> bool:
        """Whether there is such a place and it is not known yet."""
        return 0 <= index < len(self._known) and not self._known[index]

    def result(self) -> T | None:
        """What came of all, None if all are empty; places not known by now stay empty."""
        for index, known in enumerate(bytes(self._known)):
            if not known:
                self.put(index, None)
        return self._whole()

    @abstractmethod
    def _take(self, index: int, value: T | None) -> None:
        """Make of a value what can be made of it by now."""

    @abstractmethod
    def _whole(self) -> T | None:
        """What came of all, once all are known."""


class FixedTree(_Fixed[T]):
    """A binary tree over places, whose nodes are merged as soon as both halves are known.

    Where they become known in their order at most as many values are held at once as the tree has levels, about
    ``log2(n) + 1``; in any other, at most about ``2 log2(n)`` for every stretch of places that are known.

    Args:
        places: in ascending order, at least one.
        merge: makes one value of a left and a right one; it may reuse both.
    """

    def __init__(self, places: Sequence[int], merge: Callable[[T, T], T]) -> None:
        super().__init__(places)
        self._merge = merge
        self._values: dict[int, T | None] = {}
        self._root: T | None = None
        # Node i is where the i-th place and the next one part: the higher the bit, the higher the node.
        level = [(left ^ right).bit_length() for left, right in pairwise(places)]
        self._above = [-1] * len(level)
        open_nodes: list[int] = []
        for node, height in enumerate(level):
            below = -1
            while open_nodes and level[open_nodes[-1]] < height:
                below = open_nodes.pop()
            if below >= 0:
                self._above[below] = node
            if open_nodes:
                self._above[node] = open_nodes[-1]
            open_nodes.append(node)
        self._level = level

    def _take(self, index: int, value: T | None) -> None:
        nodes = [node for node in (index - 1, index) if 0 <= node < len(self._level)]
        node = min(nodes, key=self._level.__getitem__, default=-1)
        from_left = node == index
        while node >= 0:
            if node not in self._values:
                self._values[node] = value
                return
            other = self._values.pop(node)
            left, right = (value, other) if from_left else (other, value)
            value = (
                self._merge(left, right) if left is not None and right is not None else left if right is None else right
            )
            from_left, node = node < self._above[node], self._above[node]
        self._root = value

    def held(self) -> int:
        """How many values are held."""
        return sum(value is not None for value in self._values.values())

    def _whole(self) -> T | None:
        return self._root


class FixedFold(_Fixed[T]):
    """Values of places merged from left to right in runs of 8 places, and the runs' values by a `FixedTree`.

    A run has one value, which grows in place, where a tree has one a level: that is less memory to go through. Where
    values become known in their order about ``log2(n / 8) + 2`` are held, of places one after the other. A value that
    comes before its turn in its run waits: longer runs are faster, and hold more while somebody is late.

    Args:
        places: in ascending order, at least one.
        merge: makes one value of a left and a right one; it may reuse both.
    """

    def __init__(self, places: Sequence[int], merge: Callable[[T, T], T]) -> None:
        super().__init__(places)
        self._merge = merge
        starts = [i for i, place in enumerate(places) if not i or places[i - 1] >> _RUN_BITS != place >> _RUN_BITS]
        self._tree = FixedTree([places[start] >> _RUN_BITS for start in starts], merge)
        self._ends = [*starts[1:], len(places)]
        self._next = starts
        self._values: list[T | None] = [None] * len(starts)
        self._early: dict[int, T | None] = {}

    def _take(self, index: int, value: T | None) -> None:
        run = bisect_right(self._ends, index)
        self._early[index] = value
        while self._next[run] in self._early and self._next[run] < self._ends[run]:
            value, before = self._early.pop(self._next[run]), self._values[run]
            if value is not None:
                self._values[run] = value if before is None else self._merge(before, value)
            self._next[run] += 1
        if self._next[run] == self._ends[run]:
            whole, self._values[run] = self._values[run], None
            self._tree.put(run, whole)

    def held(self) -> int:
        """How many values are held."""
        waiting = [*self._values, *self._early.values()]
        return self._tree.held() + sum(value is not None for value in waiting)

    def _whole(self) -> T | None:
        return self._tree.result()


_RUN_BITS = 3


@dataclass
class _Part:
    """The weighted mean of some places: in one reply's own tensors, or in tensors made for it, to be written into."""

    weight: float
    tensors: list[Tensor]
    is_made: bool = False


class TreeMean:
    r"""The weighted mean ``sum_k p_k x_k`` with ``p_k = w_k / sum_j w_j``, in float32 (float64 stays).

    Merged are the means of clients and their weights: ``m = m_l + w_r / (w_l + w_r) (m_r - m_l)``, in one pass over the
    memory, in place; so the mean of equal values is that value exactly, and large weights overflow nothing. A
    reply's own tensors are read when its neighbour is there, never written, and not copied before.

    Args:
        places: the clients' in ascending order, at least one.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self._fold: FixedFold[_Part] = FixedFold(places, partial(_merge_means, []))
        self._keys: list[str] = []
        self._shapes: list[torch.Size] = []

    def add(self, index: int, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Take a client's tensors in; they must not change until the mean is there.

        Args:
            index: of the client's place among all.
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
            raise ValueError(f"the tensors for place {index} differ from the others in keys, order or shapes")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights must be positive numbers, got {weight}")
        self._fold.put(index, _Part(weight, values))

    def skip(self, index: int) -> None:
        """Nothing will come for a place."""
        self._fold.put(index, None)

    def result(self) -> tuple[dict[str, Tensor], float]:
        """The mean, in tensors of their own, and the sum of the weights.

        Raises:
            ValueError: if nothing was added.
        """
        part = self._fold.result()
        if part is None:
            raise ValueError("there is no mean of nothing")
        tensors = part.tensors if part.is_made else [tensor.clone() for tensor in part.tensors]
        part.is_made = False  # they are the caller's now
        return dict(zip(self._keys, tensors, strict=True)), part.weight


def _merge_means(spare: list[list[Tensor]], left: _Part, right: _Part) -> _Part:
    """The weighted mean of both, in the tensors of either; where both are a reply's, in spare or new ones."""
    weight = left.weight + right.weight
    share = right.weight / weight
    if left.is_made:
        if left.tensors:
            torch._foreach_lerp_(left.tensors, right.tensors, share)
        if right.is_made:
            spare.append(right.tensors)
        return _Part(weight, left.tensors, is_made=True)
    if right.is_made:
        into = right.tensors
    else:
        into = spare.pop() if spare else [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in left.tensors]
    for one, other, mean in zip(left.tensors, right.tensors, into, strict=True):
        torch.lerp(one, other, share, out=mean)
    return _Part(weight, into, is_made=True)


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
        places: the clients' in ascending order, at least one.
    """

    def __init__(self, layers: Sequence[FactorisedLayer], places: Sequence[int]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._tree: FixedTree[_Products] = FixedTree(places, partial(_merge_products, layers))

    def add(self, index: int, adapter: Mapping[str, Tensor], weight: float) -> None:
        """Take a client's adapter in; a layer whose product one client does not tell is left out.

        Raises:
            ValueError: if the place is known.
        """
        pairs = {}
        for name, layer in self._layers.items():
            if has_product(layer, adapter):
                a, b = as_pair(layer, {key: value.double() for key, value in of(layer, adapter).items()})
                pairs[name] = (b * weight, a)
        self._tree.put(index, _Products(weight, pairs))

    def skip(self, index: int) -> None:
        """Nothing will come for a place."""
        self._tree.put(index, None)

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
