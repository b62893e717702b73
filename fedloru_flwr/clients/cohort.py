"""Local training of many clients as one batched computation."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedloru_flwr.clients.memory import keep_freed_memory
from fedloru_flwr.clients.task import LocalResult, LocalTask, Phase
from fedloru_flwr.clients.training import LocalOptimisation, random_order
from fedloru_flwr.data import Samples
from fedloru_flwr.models.functional import FunctionalModel

_MAX_BYTES_CPU, _MAX_BYTES = 1 << 27, 1 << 30  # on the CPU, groups that nearly fit its caches are as fast or faster
_COPIES = 6  # of a client's values: themselves, gradients, two moments, corrections


def train_cohort(
    model: FunctionalModel,
    base: Mapping[str, Tensor],
    tasks: Sequence[LocalTask],
    how: LocalOptimisation,
    device: torch.device,
    max_bytes: int | None = None,
) -> list[LocalResult]:
    """Train every client as if by itself, all at once; the results are in the order of ``tasks``.

    With ``w`` stacked over clients, one backward pass of the sum of the clients' mean losses gives each client its own
    gradient. Clients that have taken all their steps leave the batch.

    Args:
        model: the clients' model; `obstacle` says what cannot be trained so.
        base: parameters that the clients share and, where they differ from the model's own, buffers.
        tasks: with equal keys and shapes of values, equal phases and ``proximal_mu``, and all or none with SCAFFOLD.
        how: the optimisation; the epochs are those of the phases.
        device: where to train.
        max_bytes: about how much memory to use: clients are trained in as many groups as it takes. By default 128 MiB
            on the CPU, else 1 GiB.

    Raises:
        ValueError: if a tensor is missing, or the tasks do not agree.
    """
    if not tasks:
        return []
    _check(model, base, tasks)
    if device.type == "cpu":
        keep_freed_memory()
    if max_bytes is None:
        max_bytes = _budget(device)
    shared = {name: tensor.to(device) for name, tensor in {**model.buffers, **base}.items()}
    order = sorted(range(len(tasks)), key=lambda i: -_steps(tasks[i].samples, how.batch_size))
    fit = 1
    if len(tasks) > 1:
        task = tasks[order[0]]
        like = (task.samples.inputs[: how.batch_size].shape, device)
        if like not in model.step_bytes:
            model.step_bytes[like] = _bytes_of_one(model, shared, task, how.batch_size, device)
        fit = max(1, max_bytes // model.step_bytes[like])
    groups = -(-len(tasks) // fit)
    bounds = [len(tasks) * group // groups for group in range(groups + 1)]
    results: dict[int, LocalResult] = {}
    for start, end in itertools.pairwise(bounds):
        chosen = order[start:end]
        group = _Group(model, shared, [tasks[i] for i in chosen], how, device)
        results |= dict(zip(chosen, group.train(), strict=True))
    return [results[i] for i in range(len(tasks))]


def _check(model: FunctionalModel, base: Mapping[str, Tensor], tasks: Sequence[LocalTask]) -> None:
    missing = [name for name in model.base_keys if name not in base]
    if missing:
        raise ValueError(f"the base lacks {', '.join(missing[:6])}")
    first = _likeness(tasks[0])
    if set(first["values"]) != set(model.keys):
        odd = sorted(set(first["values"]) ^ set(model.keys))
        raise ValueError(f"the clients' values are not the model's: {', '.join(odd[:6])} only on one side")
    for task in tasks:
        for what, mine in _likeness(task).items():
            if mine != first[what]:
                raise ValueError(f"clients trained as one batch must agree in {what}: {first[what]} and {mine}")
        if not len(task.samples):
            raise ValueError("a client has no samples to train on")


def _likeness(task: LocalTask) -> dict[str, Any]:
    return {
        "values": {key: (tuple(value.shape), value.dtype) for key, value in task.values.items()},
        "phases": task.phases,
        "proximal_mu": task.proximal_mu,
        "control": task.control is None,
    }


def _steps(samples: Samples, batch_size: int) -> int:
    """Steps an epoch."""
    return -(-len(samples) // batch_size)


def _bytes_of_one(
    model: FunctionalModel, shared: Mapping[str, Tensor], task: LocalTask, batch_size: int, device: torch.device
) -> int:
    """About the memory that one client's training takes: its values, and what a step keeps for the backward pass."""
    values = {key: value.to(device) for key, value in task.values.items()}
    kept = _kept_bytes(model, shared, values, task.samples.inputs[:batch_size].to(device))
    return 1 + _COPIES * sum(value.nbytes for value in values.values()) + 2 * kept


def _kept_bytes(
    model: FunctionalModel, shared: Mapping[str, Tensor], values: Mapping[str, Tensor], inputs: Tensor
) -> int:
    """The memory that a client's step keeps for its backward pass."""
    own = {key: value.detach()[None].requires_grad_() for key, value in values.items()}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own.values(), *shared.values())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.forward_stacked(own, shared, inputs[None])
    return sum(kept.values())


def clients_that_fit(module: nn.Module, inputs: Tensor, device: torch.device) -> int:
    """About how many clients of this model are trained at once by default; 1 where they cannot be batched.

    Args:
        module: the plain model; it is not changed.
        inputs: of one step.
        device: where clients train.
    """
    if obstacle(module) is not None:
        return 1
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    kept = _kept_bytes(
        FunctionalModel(module, dense_leaves=tuple(values)), dict(module.named_buffers()), values, inputs
    )
    return max(1, _budget(device) // (1 + 2 * kept))


def _budget(device: torch.device) -> int:
    """About how much memory a batch of clients uses by default."""
    return _MAX_BYTES_CPU if device.type == "cpu" else _MAX_BYTES


class _Schedule:
    """Which samples each client takes at each step of a phase; step-major, clients sorted by steps, most first.

    Attributes:
        active: clients that take step ``t``: the first ``active[t]``.
        width: samples of the largest batch of step ``t``.
        index: ``(steps, clients, batch)``, into the samples of all clients one after the other; a batch that is
            smaller is filled up with its first sample.
        weight: ``(steps, clients, batch)``: one over the batch's size, 0 for samples filled in.
        share: ``(steps, clients)``: in the last epoch the batch's share of the client's samples, else 0.
        steps: ``(clients,)``.
    """

    def __init__(
        self,
        counts: Sequence[int],
        generators: Sequence[torch.Generator],
        epochs: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        size = min(batch_size, max(counts))
        count = torch.tensor(counts)[:, None]
        per_epoch = -(-count // batch_size)
        total = int(per_epoch.max()) * epochs
        index = torch.zeros(len(counts), total * size, dtype=torch.long)
        start = 0
        for own, row, steps, generator in zip(counts, index, per_epoch[:, 0].tolist(), generators, strict=True):
            if epochs:
                orders = torch.stack([random_order(own, generator) for _ in range(epochs)])
                row[: epochs * steps * size].view(epochs, -1)[:, :own] = orders + start
            start += own
        index = index.view(len(counts), total, size)
        step = torch.arange(total)
        is_taken = step < per_epoch * epochs
        is_last = is_taken & (step >= per_epoch * (epochs - 1))
        length = (count - step % per_epoch * batch_size).clamp(max=size) * is_taken
        share = length.double() / count * is_last
        there = torch.arange(size) < length[..., None]
        weight = there / length.clamp(min=1)[..., None].to(dtype)
        self.steps = per_epoch[:, 0] * epochs
        self.active = [int((self.steps > step).sum()) for step in range(total)]
        self.width = length.amax(0).tolist()
        self.index = torch.where(there, index, index[..., :1]).transpose(0, 1).contiguous().to(device)
        self.weight = weight.transpose(0, 1).contiguous().to(device)
        self.share = share.to(dtype).T.contiguous().to(device)


_Outputs = Callable[[Tensor], Tensor]
_WHOLE = ""  # the key of all that a client trains, as one tensor


class _Group:
    """Clients trained at once, sorted by steps, most first; tensors have a leading client axis."""

    def __init__(
        self,
        model: FunctionalModel,
        shared: Mapping[str, Tensor],
        tasks: Sequence[LocalTask],
        how: LocalOptimisation,
        device: torch.device,
    ) -> None:
        self._model, self._shared, self._tasks, self._how, self._device = model, shared, tasks, how, device
        self._inputs = torch.cat([task.samples.inputs for task in tasks]).to(device)
        self._labels = torch.cat([task.samples.labels for task in tasks]).to(device)
        self._values = {key: self._stack([task.values[key] for task in tasks]) for key in tasks[0].values}
        self._generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
        self._seen: set[str] = set()

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(self._device)

    def train(self) -> list[LocalResult]:
        """Go through the phases and hand the results out."""
        first, *others = self._tasks[0].phases
        controls = [task.control for task in self._tasks if task.control is not None]
        control = {key: self._stack([one[key] for one in controls]) for key in first.keys} if controls else None
        is_proximal = self._tasks[0].proximal_mu != 0.0
        origin = {key: self._values[key].clone() for key in first.keys} if is_proximal else None
        losses, means = self._run(first, origin, control)
        for phase in others:
            self._run(phase)
        values = {key: value.cpu() for key, value in self._values.items()}
        gradients = {key: mean.cpu() for key, mean in means.items()} if controls else None
        silent = self._silent()
        return [
            LocalResult(
                {key: value[i].clone() for key, value in values.items()},
                loss,
                None if gradients is None else {key: mean[i].clone() for key, mean in gradients.items()},
                silent,
            )
            for i, loss in enumerate(losses.tolist())
        ]

    def _silent(self) -> tuple[str, ...]:
        trained = {key for phase in self._tasks[0].phases for key in phase.keys}
        if not self._seen:
            return ()
        own = {layer.name: {key for key in trained if _is_of(key, layer.name)} for layer in self._model.layers}
        return tuple(name for name, keys in own.items() if keys and not keys & self._seen)

    def _run(
        self, phase: Phase, origin: Mapping[str, Tensor] | None = None, control: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train for one phase; return the mean loss of its last epoch and, with a control, the mean raw gradients."""
        dtype = next(iter(self._values.values())).dtype
        counts = [len(task.samples) for task in self._tasks]
        plan = _Schedule(counts, self._generators, phase.epochs, self._how.batch_size, self._device, dtype)
        losses = torch.zeros(len(counts), device=self._device, dtype=dtype)
        sums = {} if control is None else {key: torch.zeros_like(self._values[key]) for key in phase.keys}
        is_alone = len(counts) == 1 and len({self._values[key].dtype for key in phase.keys}) == 1
        alone = _Alone(self._values, phase.keys) if is_alone else None
        if alone is not None:
            origin, control, sums = alone.spread(origin), alone.spread(control), alone.spread(sums) or {}
        optimizer = _Optimizer(self._how)
        trained: Mapping[str, Tensor] = {}
        count = 0
        with ExitStack() as held:
            for step, (active, width) in enumerate(zip(plan.active, plan.width, strict=True)):
                if active != count:
                    count = active
                    held.close()
                    if alone is None:
                        trained, outputs_of = self._hold_stacked(held, phase.keys, count)
                    else:
                        trained, outputs_of = self._hold_alone(held, alone)
                index, weight = plan.index[step, :count, :width], plan.weight[step, :count, :width]
                outputs = self._how.outputs(partial(outputs_of, self._inputs[index]), self._device)
                each = functional.cross_entropy(outputs.flatten(0, 1), self._labels[index].flatten(), reduction="none")
                means = (each.view(count, width) * weight).sum(1)
                for value in trained.values():
                    value.grad = None
                means.sum().backward()  # type: ignore[no-untyped-call]  # torch's is untyped
                losses[:count] += means.detach() * plan.share[step, :count]
                gradients = {key: value.grad for key, value in trained.items() if value.grad is not None}
                self._seen |= gradients.keys()
                targets = trained
                if alone is not None:
                    targets, gradients = alone.targets, alone.gathered(gradients, optimizer)
                for key, total in sums.items():
                    if key in gradients:
                        total[:count] += gradients[key]
                # Never in place: two tensors' gradients may lie in the same memory.
                gradients = self._corrected(gradients, targets, origin, control)
                if self._how.max_grad_norm > 0:
                    gradients = _clipped(gradients, self._how.max_grad_norm)
                optimizer.step(targets, gradients)
        if alone is not None:
            self._values |= alone.parts(alone.whole)
        steps = plan.steps.to(self._device).clamp(min=1)
        return losses, {key: sums[key] / _over(steps, sums[key]) for key in phase.keys if key in sums}

    def _hold_stacked(self, held: ExitStack, keys: Sequence[str], count: int) -> tuple[dict[str, Tensor], _Outputs]:
        """Have the model hold the first clients' tensors; what is trained of them, and the outputs' function."""
        here = {key: value[:count] for key, value in self._values.items()}
        trained = {key: here[key].requires_grad_() for key in keys}
        return trained, held.enter_context(self._model.holding_clients(here, self._shared, count))

    def _hold_alone(self, held: ExitStack, alone: "_Alone") -> tuple[dict[str, Tensor], _Outputs]:
        """The same for one client, whose tensors have no client axis then."""
        here = {key: value[0] for key, value in self._values.items()} | alone.leaves
        outputs_of = held.enter_context(self._model.holding(here, self._shared))
        return alone.leaves, lambda x: outputs_of(x[0])[None]

    @torch.no_grad()
    def _corrected(
        self,
        gradients: dict[str, Tensor],
        trained: Mapping[str, Tensor],
        origin: Mapping[str, Tensor] | None,
        control: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """The gradients with FedProx's and SCAFFOLD's terms."""
        mu = self._tasks[0].proximal_mu
        if origin is not None:
            gradients = {key: one + mu * (trained[key] - origin[key][: len(one)]) for key, one in gradients.items()}
        if control is not None:
            gradients = {key: one + control[key][: len(one)] for key, one in gradients.items()}
        return gradients


class _Alone:
    """What a client that is alone trains, in one piece of memory, so that it is corrected, clipped and stepped as one.

    Mappings have the whole of it, ``(1, numbers)``, at `_WHOLE`, and by key the parts ``(1, *shape)`` that lie in it.

    Args:
        values: with a client axis of one.
        keys: of what is trained.

    Attributes:
        whole: all of it.
        leaves: the parts without a client axis, which gradients are of.
        targets: the whole and the parts, to be changed in place.
    """

    def __init__(self, values: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        self._shapes = {key: values[key].shape for key in keys}
        self.whole = self._joined(values)
        self.targets = {_WHOLE: self.whole, **self.parts(self.whole)}
        self.leaves = {key: part[0].requires_grad_() for key, part in self.parts(self.whole).items()}
        self._is_whole = True

    def _joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[key].reshape(1, -1) for key in self._shapes], dim=1)

    def parts(self, whole: Tensor) -> dict[str, Tensor]:
        """The parts that lie in a whole."""
        pieces = torch.split(whole, [shape.numel() for shape in self._shapes.values()], dim=1)
        return {key: piece.view(shape) for (key, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    def spread(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The same numbers as a whole and as parts that lie in it; nothing of nothing."""
        if not tensors:
            return None
        whole = self._joined(tensors)
        return {_WHOLE: whole, **self.parts(whole)}

    def gathered(self, gradients: Mapping[str, Tensor], optimizer: "_Optimizer") -> dict[str, Tensor]:
        """The gradients as a whole; where something has none, by key from then on, since it must not be stepped."""
        if self._is_whole and len(gradients) < len(self.leaves):
            self._is_whole = False
            optimizer.divide(self.parts)
        if self._is_whole:
            return {_WHOLE: self._joined(gradients)}
        return {key: gradient[None] for key, gradient in gradients.items()}


class _Optimizer:
    """torch's own update of stacked tensors, fused, without `torch.optim.Optimizer`, whose first use takes seconds.

    Clients may leave at the end: state is kept for those that began and used for those that are still there.
    """

    def __init__(self, how: LocalOptimisation) -> None:
        self._how = how
        self._first: dict[str, Tensor] = {}  # SGD's momentum, AdamW's first moment
        self._second: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}

    def divide(self, parts: Callable[[Tensor], dict[str, Tensor]]) -> None:
        """Keep the state of the whole by its parts."""
        for state in (self._first, self._second):
            if _WHOLE in state:
                state |= parts(state.pop(_WHOLE))
        if _WHOLE in self._steps:
            taken = self._steps.pop(_WHOLE)
            self._steps = {key: taken.clone() for key in self._first}

    @torch.no_grad()
    def step(self, trained: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Update in place what has a gradient."""
        keys = list(gradients)
        tensors = [trained[key].detach() for key in keys]
        if not keys:
            return
        count = len(tensors[0])
        one_kind = len({tensor.dtype for tensor in tensors}) == 1  # which the fused update needs
        fused = True if one_kind and tensors[0].device.type in ("cpu", "cuda") else None
        how = self._how
        if how.optimizer == "adamw":
            for key, tensor in zip(keys, tensors, strict=True):
                if key not in self._first:
                    self._first[key], self._second[key] = torch.zeros_like(tensor), torch.zeros_like(tensor)
                    self._steps[key] = torch.zeros((), device=tensor.device, dtype=torch.float32)
            adamw(
                tensors,
                [gradients[key] for key in keys],
                [self._first[key][:count] for key in keys],
                [self._second[key][:count] for key in keys],
                [],
                [self._steps[key] for key in keys],
                fused=fused,
                amsgrad=False,
                beta1=how.momentum,
                beta2=0.999,
                lr=how.learning_rate,
                weight_decay=how.weight_decay,
                eps=1e-8,
                maximize=False,
            )
            return
        buffers = [self._first[key][:count] if key in self._first else None for key in keys]
        sgd(
            tensors,
            [gradients[key] for key in keys],
            buffers,
            fused=fused,
            weight_decay=how.weight_decay,
            momentum=how.momentum,
            lr=how.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for key, buffer in zip(keys, buffers, strict=True):
            if buffer is not None:  # torch fills them in at the first step, where there is momentum
                self._first.setdefault(key, buffer)


def _is_of(key: str, layer: str) -> bool:
    """Whether a key is of the layer's adapter."""
    owner, _, local = key.rpartition(".")
    return owner == layer and local.startswith(("lora_", "hada_", "personal_"))


def _over(per_client: Tensor, like: Tensor) -> Tensor:
    """``(clients,)`` to ``(clients, 1, ...)``, to be broadcast over ``like``."""
    return per_client.view(-1, *(1,) * (like.dim() - 1))


def _clipped(gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Each client's gradients times ``min(1, limit / (norm + 1e-6))``, as ``clip_grad_norm_`` does for one client."""
    matrices = [one.reshape(len(one), -1) for one in gradients.values()]
    norms = torch.stack([torch.linalg.vector_norm(matrix, dim=1) for matrix in matrices])
    scale = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    if bool((scale == 1.0).all()):
        return gradients
    return {key: one * _over(scale, one) for key, one in gradients.items()}


def obstacle(module: nn.Module, inputs: Tensor | None = None) -> str | None:
    """Why clients of this model cannot be trained as one batch, or None.

    Args:
        module: the plain model; it is not changed.
        inputs: two samples or more, to try it on; without them, only the kinds of layers are looked at.
    """
    for name, part in module.named_modules():
        reason = _obstacle_of_layer(part)
        if reason is not None:
            return f"{name or type(part).__name__}: {reason}"
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            return f"{name}: it is not initialised yet"
        if parameter.dtype not in (torch.float32, torch.float64):
            return f"{name}: its dtype is {parameter.dtype}"
    return None if inputs is None else _try(copy.deepcopy(module).train(), inputs)


def _obstacle_of_layer(part: nn.Module) -> str | None:
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return "batch normalisation mixes a batch's samples"
    if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
        return "it keeps running statistics"
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
        return f"dropout draws at random (p = {part.p})"
    if isinstance(part, nn.RNNBase):
        return "a recurrent layer reads its weights by itself"
    if isinstance(part, nn.Embedding | nn.EmbeddingBag) and (
        part.sparse or part.scale_grad_by_freq or part.max_norm is not None
    ):
        return "an embedding with sparse or rescaled gradients, or renormalised rows"
    return None


def _try(module: nn.Module, inputs: Tensor) -> str | None:
    """Compare two clients at once with one after the other, outputs and gradients, on a model of our own."""
    noise = torch.Generator().manual_seed(0)
    base = dict(module.named_buffers())
    before = {name: buffer.clone() for name, buffer in base.items()}
    stacked = {
        name: torch.stack([one, one + 0.01 * torch.randn(one.shape, generator=noise, dtype=one.dtype)]).requires_grad_()
        for name, one in ((name, parameter.detach().cpu()) for name, parameter in module.named_parameters())
    }
    x = torch.stack([inputs, inputs.flip(0)])
    # By `torch.func`, which refuses what depends on more than one sample, a branch for example.
    model = FunctionalModel(module, dense_leaves=tuple(stacked), side_by_side=False)
    try:
        outputs = model.forward_clients(stacked, {}, x)
        direction = torch.randn(outputs.shape, generator=noise, dtype=outputs.dtype)
        gradients = _gradients((outputs * direction).sum(), stacked)
        for client in range(2):
            own = {name: value[client].detach().requires_grad_() for name, value in stacked.items()}
            alone = functional_call(module, {**own, **base}, (x[client],))
            if any(not torch.equal(value, before[name]) for name, value in base.items()):
                return "its forward pass changes buffers"
            if _differ(functional_call(module, {**own, **base}, (x[client, :1],)), alone[:1]):
                return "its outputs for a sample depend on the batch"
            if _differ(outputs[client], alone):
                return "its outputs differ where clients are batched"
            for one, expected in zip(gradients, _gradients((alone * direction[client]).sum(), own), strict=True):
                if _differ(one[client], expected):
                    return "its gradients differ where clients are batched"
    except Exception as error:
        return f"it cannot be batched: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _gradients(loss: Tensor, of: Mapping[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tuple(of.values()), allow_unused=True, materialize_grads=True))


def _differ(one: Tensor, other: Tensor) -> bool:
    return not bool((one - other).norm() <= 1e-3 * other.norm() + 1e-6)
