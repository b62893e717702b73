r"""Curvature as an operator: what the Hessian of a loss does to a vector, without the matrix.

For parameters ``theta`` (``n`` numbers) and samples ``(x_i, y_i)``,

.. math:: L(\theta) = \frac{1}{N} \sum_i \ell(f(\theta, x_i), y_i), \quad g = \nabla L, \quad H = \nabla^2 L, \quad
          H v = \nabla (g^T v)

``H v`` costs about one more backward pass through the gradient (Pearlmutter 1994, doi 10.1162/neco.1994.6.1.147).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.plan import AdapterPlan

Outputs = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
MAX_BYTES = 1 << 29  # 512 MiB
_TRIED = (2, 4)  # samples on which the memory of a larger number is reckoned


class SymmetricOperator(Protocol):
    """A symmetric ``n x n`` matrix of which only products are known."""

    @property
    def size(self) -> int:
        """``n``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""

    @property
    def device(self) -> torch.device:
        """Where vectors are."""

    def product(self, vector: Tensor) -> Tensor:
        """``H v`` of ``v (n,)``."""


class LossHessian:
    """The Hessian of a mean loss at given parameters, as an operator on flat vectors.

    What is piecewise linear (ReLU, max pooling) counts with its pieces: kinks have no curvature.

    Args:
        outputs: the model as a function of its values by key, and of inputs ``(batch, ...)``; it gives
            ``(batch, ...)``. It must treat samples independently: no batch statistics, no dropout.
        values: the tensors to differentiate at, all of one dtype; float64 for exact work.
        inputs: ``(N, ...)``, any dtype; floating-point ones are brought to the values' dtype.
        targets: ``(N, ...)``.
        loss: of ``(outputs, targets)``, the *mean* over the batch; twice differentiable. Default: cross-entropy.
            It must be the plain mean of one term a sample wherever samples are taken in chunks: class weights and
            ignored targets need all samples in one chunk, which ``max_bytes`` decides.
        keys: which values are parameters; the rest is held fixed. None: all.
        device: where to compute; None: where the values are.
        max_bytes: about how much memory the graph of a product may take; samples are taken in as many chunks as that
            needs. Where one chunk suffices, its graph is kept and products cost about half.

    Raises:
        ValueError: there are no samples, inputs and targets differ in number, keys name no value, or values are neither
            float32 nor float64; at the first product or gradient, the loss is no plain mean and samples are taken in
            chunks.
    """

    def __init__(
        self,
        outputs: Outputs,
        values: Mapping[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        *,
        loss: Loss = functional.cross_entropy,
        keys: Sequence[str] | None = None,
        device: torch.device | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if len(inputs) != len(targets) or not len(targets):
            raise ValueError(
                f"inputs and targets must be the same number of samples, at least one: got {len(inputs)} and "
                f"{len(targets)}"
            )
        self.keys = tuple(values if keys is None else keys)
        if not self.keys or (odd := [key for key in self.keys if key not in values]):
            told = f"{odd[0]!r} is none of them" if self.keys else "none was named"
            raise ValueError(f"keys must name values to differentiate: {told}; there are {', '.join(values)}")
        first = values[self.keys[0]]
        self.device = first.device if device is None else device
        self.dtype = first.dtype
        check_precision(self.dtype)
        self._outputs, self._loss, self._max_bytes = outputs, loss, max_bytes
        self._values = {key: value.detach().to(self.device, self.dtype) for key, value in values.items()}
        self._parameters = {key: self._values[key].clone().requires_grad_() for key in self.keys}
        self._inputs, self._targets = inputs, targets
        self._shapes = {key: self._values[key].shape for key in self.keys}
        self._chunk = 0
        self._kept: list[Tensor] | None = None

    @property
    def size(self) -> int:
        """``n``, the number of parameters."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def points(self) -> int:
        """``N``, the number of samples."""
        return len(self._targets)

    @property
    def points_at_once(self) -> int:
        """Samples in a chunk; 0 before the first product or gradient."""
        return self._chunk

    def restricted(self, keys: Sequence[str]) -> "LossHessian":
        """The diagonal block of ``H`` that belongs to some of the values, at the same point on the same samples."""
        block = LossHessian(
            self._outputs,
            self._values,
            self._inputs,
            self._targets,
            loss=self._loss,
            keys=keys,
            device=self.device,
            max_bytes=self._max_bytes,
        )
        block._chunk = self._chunk if self._chunk < self.points else 0
        return block

    def layers(self) -> dict[str, tuple[str, ...]]:
        """The parameters by layer: those whose keys have all but their last part in common."""
        found: dict[str, tuple[str, ...]] = {}
        for key in self.keys:
            layer = key.rpartition(".")[0]
            found[layer] = (*found.get(layer, ()), key)
        return found

    def gradient(self) -> dict[str, Tensor]:
        """``g`` by key, in the parameters' shapes."""
        total = {key: torch.zeros_like(value) for key, value in self._parameters.items()}
        for loss in self._losses():
            found = torch.autograd.grad(
                loss, list(self._parameters.values()), allow_unused=True, materialize_grads=True
            )
            for key, part in zip(self.keys, found, strict=True):
                total[key] += part
        return total

    def product(self, vector: Tensor) -> Tensor:
        """``H v`` of a flat ``v (n,)``, flat, in the order of `keys`.

        Raises:
            ValueError: the vector has another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        parameters = list(self._parameters.values())
        parts = torch.split(vector, [parameter.numel() for parameter in parameters])
        directions = [part.reshape(one.shape) for part, one in zip(parts, parameters, strict=True)]
        total = torch.zeros_like(vector)
        for gradients in self._gradients():
            curved = [(g, v) for g, v in zip(gradients, directions, strict=True) if g.requires_grad]
            if not curved:
                continue  # the loss is linear in all of them
            found = torch.autograd.grad(
                [g for g, _ in curved],
                parameters,
                [v for _, v in curved],
                retain_graph=self._kept is not None,
                allow_unused=True,
                materialize_grads=True,
            )
            total += torch.cat([part.reshape(-1) for part in found])
        return total

    def dense(self) -> Tensor:
        """The matrix ``H (n, n)``, by ``n`` products: for small ones and for tests."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self.product(column) for column in eye])

    def _gradients(self) -> Iterator[Sequence[Tensor]]:
        """For each chunk its part of the gradient, with the graph to differentiate it once more."""
        if self._kept is not None:
            yield self._kept
            return
        parameters = list(self._parameters.values())
        for loss in self._losses():
            gradients = torch.autograd.grad(
                loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            if self._chunk >= self.points:
                self._kept = list(gradients)
            yield gradients

    def _losses(self) -> Iterator[Tensor]:
        """Each chunk's part of the mean loss."""
        if not self._chunk:
            self._chunk = self._affordable()
            if self._chunk < self.points:
                self._check_plain_mean()
        for start in range(0, self.points, self._chunk):
            yield self._loss_of(start, min(start + self._chunk, self.points))

    def _loss_of(self, start: int, end: int) -> Tensor:
        return self._mean(self._outputs_of(start, end), start, end) * ((end - start) / self.points)

    def _outputs_of(self, start: int, end: int) -> Tensor:
        inputs = self._there(self._inputs[start:end])
        # Of attention's kernels only this one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return self._outputs({**self._values, **self._parameters}, inputs)

    def _there(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _mean(self, outputs: Tensor, start: int, end: int) -> Tensor:
        """The loss of these samples, as it is."""
        mean = self._loss(outputs, self._there(self._targets[start:end]))
        if mean.numel() != 1:
            raise ValueError(
                f"the loss must be a single number, the mean over the batch; it has shape {tuple(mean.shape)}: leave "
                "its reduction at 'mean'"
            )
        return mean

    def _check_plain_mean(self) -> None:
        """Compare the loss of all samples with what its chunks make of it."""
        starts = range(0, self.points, self._chunk)
        ends = [min(start + self._chunk, self.points) for start in starts]
        with torch.no_grad():
            outputs = [self._outputs_of(start, end) for start, end in zip(starts, ends, strict=True)]
            whole = float(self._mean(torch.cat(outputs), 0, self.points))
            parts = [
                float(self._mean(one, start, end)) * ((end - start) / self.points)
                for one, start, end in zip(outputs, starts, ends, strict=True)
            ]
        joined, size = math.fsum(parts), max(abs(whole), math.fsum(map(abs, parts)))
        # A loss that has diverged is told of by whoever uses the products.
        if math.isfinite(whole) and not abs(whole - joined) <= math.sqrt(torch.finfo(self.dtype).eps) * size:
            raise ValueError(
                f"the loss of all {self.points} samples is {whole:.8g}, but chunks of {self._chunk} give {joined:.8g}: "
                "taken in chunks it must be the plain mean of one term a sample, without class weights or ignored "
                f"targets; use such a loss, or raise max_bytes = {self._max_bytes} until one chunk holds all samples"
            )

    def _affordable(self) -> int:
        """How many samples' graphs of the gradient, and of a product, fit into the memory allowed."""
        few, more = (min(tried, self.points) for tried in _TRIED)
        if few == more:
            return self.points
        small, large = self._graph_bytes(few), self._graph_bytes(more)
        of_one = max((large - small) / (more - few), 1.0)
        fixed = max(small - few * of_one, 0.0)
        # As much again for what the pass of a product holds.
        return min(self.points, max(1, int((self._max_bytes - fixed) / (2 * of_one))))

    def _graph_bytes(self, count: int) -> int:
        """The memory that the gradient's graph of the first samples keeps."""
        held: dict[int, Tensor] = {}
        known = {tensor.untyped_storage().data_ptr() for tensor in (*self._values.values(), *self._parameters.values())}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = tensor  # held, so that its place is not taken by another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss_of(0, count)
            torch.autograd.grad(
                loss, list(self._parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def check_precision(dtype: torch.dtype) -> None:
    """Refuse numbers too coarse for curvature.

    Args:
        dtype: of the parameters.

    Raises:
        ValueError: it is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the values to differentiate at are {str(dtype).removeprefix('torch.')}, in which products with the "
            "Hessian are mostly rounding: expected float32 or float64; convert the model first, such as by "
            "model.float()"
        )


def module_hessian(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = functional.cross_entropy,
    parameters: Sequence[str] | None = None,
    device: torch.device | None = None,
    max_bytes: int = MAX_BYTES,
) -> LossHessian:
    """The Hessian of a module's mean loss with respect to its parameters, in eval mode.

    Args:
        model: any module; it is copied, and not changed.
        inputs: ``(N, ...)``.
        targets: ``(N, ...)``.
        loss: see `LossHessian`.
        parameters: names, or prefixes that end at a dot (``"fc1"``); None: all that require gradients.
        device: where to compute; None: where the model is.
        max_bytes: see `LossHessian`.

    Raises:
        ValueError: nothing is trainable, a name matches nothing, or see `LossHessian`.
    """
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    chosen = list(trainable) if parameters is None else _matching(trainable, parameters)
    if not chosen:
        raise ValueError("the model has no trainable parameter: every one has requires_grad = False")
    module = copy.deepcopy(model).eval().requires_grad_(False)
    held = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
    if device is not None:
        held = {name: value.to(device) for name, value in held.items()}
    fixed = {name: value for name, value in held.items() if name not in trainable}

    def outputs(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, {**fixed, **values}, (x,))  # type: ignore[no-any-return]  # torch's is untyped

    values = {name: held[name] for name in trainable}
    return LossHessian(outputs, values, inputs, targets, loss=loss, keys=chosen, device=device, max_bytes=max_bytes)


def adapter_hessian(
    model: nn.Module,
    plan: AdapterPlan,
    values: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = functional.cross_entropy,
    dense_leaves: bool = False,
    device: torch.device | None = None,
    max_bytes: int = MAX_BYTES,
) -> LossHessian:
    """The Hessian with respect to the factors that are trained: ``theta`` is ``A`` and ``B`` in ``W + s B A``.

    Args:
        model: the plain module, in its shape and settings; it is not changed.
        plan: its factorised layers.
        values: the adapter, a one-sided method's ``A`` included, and the dense leaves.
        base: the frozen parameters, and running statistics where they differ from the model's.
        inputs: ``(N, ...)``.
        targets: ``(N, ...)``.
        loss: see `LossHessian`.
        dense_leaves: whether dense leaves are parameters too.
        device: where to compute; None: where the values are.
        max_bytes: see `LossHessian`.

    Raises:
        ValueError: the plan has no adapters, a tensor is missing, or see `LossHessian`.
    """
    if not plan.adapted:
        raise ValueError("the plan has no adapters to differentiate: use the full parameters, or a factor-based method")
    function = FunctionalModel(model, plan.adapted, plan.layout(), plan.dense_leaves, training=False)
    lacking = [key for key in function.keys if key not in values]
    lacking += [key for key in function.base_keys if key not in base]
    if lacking:
        raise ValueError(f"values and base lack {', '.join(lacking[:5])}: give the whole adapter and every parameter")
    where = values[plan.factor_keys[0]].device if device is None else device
    shared = {name: tensor.to(where) for name, tensor in {**function.buffers, **base}.items()}

    def outputs(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return function.forward(tensors, shared, x)

    keys = plan.trainable_keys if dense_leaves else plan.factor_keys
    own = {key: values[key] for key in function.keys}
    return LossHessian(outputs, own, inputs, targets, loss=loss, keys=keys, device=device, max_bytes=max_bytes)


def _matching(names: Mapping[str, Tensor], wanted: Sequence[str]) -> list[str]:
    for prefix in wanted:
        if not any(name == prefix or name.startswith(f"{prefix}.") for name in names):
            raise ValueError(f"parameters: {prefix!r} matches none of the trainable ones: {', '.join(names)}")
    return [name for name in names if any(name == one or name.startswith(f"{one}.") for one in wanted)]
