"""How much memory a client and the server need, told from shapes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr import wire
from fedloru_flwr.clients.method import Site, client_method
from fedloru_flwr.config import RunConfig
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.layout import Layout, shapes
from fedloru_flwr.plan.rehearsal import Rehearsal
from fedloru_flwr.plan.sizes import Sketch
from fedloru_flwr.strategies import FederatedStrategy

_MOMENTS = {"none": 0, "fedavgm": 1, "fedadam": 2, "fedyogi": 2, "fedadagrad": 2}


class _Memory:
    """Bytes by part."""

    @property
    def at_least(self) -> int:
        """All parts that are known."""
        return sum(size or 0 for size in vars(self).values())

    @property
    def total(self) -> int | None:
        """All parts; None where one is not known."""
        return None if None in vars(self).values() else self.at_least


@dataclass(frozen=True)
class ClientMemory(_Memory):
    """Bytes that one client's training needs.

    Attributes:
        weights: the model with its adapters and buffers, in the number formats it is built in.
        gradients: of what is trained at a time.
        optimizer: its moments: one number a trained one for SGD with momentum, two for AdamW.
        corrections: copies that FedProx (one) and SCAFFOLD (two) keep of what is trained; with error feedback the
            layers' residuals.
        received: the arrays of the order, which stay until the reply.
        activations: what a step's forward pass saves for the backward pass, as the operations on the meta device save
            it: an estimate, since kernels of a device may save less or need work space. None: it cannot be told.
    """

    weights: int
    gradients: int
    optimizer: int
    corrections: int
    received: int
    activations: int | None


@dataclass(frozen=True)
class ServerMemory(_Memory):
    """Bytes that the server holds, at the end of the run.

    Attributes:
        model: a plain instance, ``W_0``, and the layers that accumulated entries have changed.
        trainables: the current ones and those after the last whole round.
        moments: of the server's optimiser, and SCAFFOLD's control variates.
        ledger: all accumulated entries.
        replies: of one round, once as bytes and once as tensors.
    """

    model: int
    trainables: int
    moments: int
    ledger: int
    replies: int


def client_memory(
    config: RunConfig,
    strategy: FederatedStrategy,
    rehearsal: Rehearsal,
    model: nn.Module,
    inputs: Tensor,
    known: dict[object, int | str],
) -> ClientMemory:
    """What a client of the highest rank needs.

    Args:
        config: for the optimiser.
        strategy: for what is trained.
        rehearsal: of the run, over.
        model: the plain model, on any device.
        inputs: one batch, on the meta device.
        known: activations told before, or why they cannot be told, by what they depend on; filled.
    """
    plan, settings = strategy.plan, strategy.settings
    method = client_method(settings.method)
    site = Site(plan, settings, wire.Work(), {}, 1, "0")
    layout = method.layout(site)
    own = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    adapters = {
        key: Sketch(shape).nbytes * (2 if _is_double(model, layer.weight_key) else 1)
        for layer in plan.adapted
        for key, shape in shapes(layer, layout)
    }
    sizes = {**own, **adapters}
    phases = method.phases(site, config.local_epochs)
    trained = max(sum(sizes[key] for key in phase.keys) for phase in phases)
    weights = sum(sizes.values()) + sum(buffer.nbytes for buffer in model.buffers())
    if settings.accumulate_into == "stack":
        weights += rehearsal.ledger_bytes
    key = layout, plan.adapted, plan.dense_leaves, frozenset(key for phase in phases for key in phase.keys)
    if key not in known:
        known[key] = activations(model, strategy, layout, {key for phase in phases for key in phase.keys}, inputs)
    residuals = sum(Sketch(layer.weight_shape).nbytes for layer in plan.layers) if plan.form == "compressed" else 0
    moments = 2 if config.optimizer == "adamw" else int(config.momentum > 0)
    return ClientMemory(
        weights=weights,
        gradients=trained,
        optimizer=moments * trained,
        corrections=(bool(config.proximal_mu) + 2 * config.scaffold) * trained + residuals,
        received=rehearsal.received_bytes,
        activations=told if isinstance(told := known[key], int) else None,
    )


def _is_double(model: nn.Module, name: str) -> bool:
    return bool(model.get_parameter(name).dtype == torch.float64)


def activations(
    model: nn.Module, strategy: FederatedStrategy, layout: Layout, trained: set[str], inputs: Tensor
) -> int | str:
    """Bytes that autograd saves in a forward pass and the loss, but for weights; or why they cannot be told.

    The forward pass is run on the meta device, without numbers; a model that decides by values cannot be run so.

    Args:
        model: the plain model, on any device.
        strategy: for its plan.
        layout: of the adapters.
        trained: keys of what has gradients.
        inputs: one batch, on the meta device: samples of a classifier, or token ids ``(batch, length)``.
    """
    plan = strategy.plan
    try:
        hollow = copy.deepcopy(model).to("meta")
        functional_model = FunctionalModel(hollow, plan.adapted, layout, plan.dense_leaves)
        tensors: dict[str, Tensor] = {name: one.detach() for name, one in hollow.named_parameters()}
        tensors |= {key: torch.empty(s, device="meta") for layer in plan.adapted for key, s in shapes(layer, layout)}
        for key in trained & tensors.keys():
            tensors[key].requires_grad_()
        values = {key: tensors[key] for key in functional_model.keys}
        base: Mapping[str, Tensor] = {**functional_model.buffers, **tensors}
        weights = {_storage(one) for one in base.values()}
        # The storages are held, so that none is given the place of another.
        saved: dict[int, Any] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs: Any = functional_model.forward(values, base, inputs)
            logits = getattr(outputs, "logits", outputs)
            logits = logits.flatten(0, -2)
            functional.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long, device="meta"))
    except Exception as error:  # whatever a model does that needs numbers, or other inputs
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return sum(int(storage.nbytes()) for place, storage in saved.items() if place not in weights)


def _storage(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def server_memory(
    config: RunConfig, strategy: FederatedStrategy, rehearsal: Rehearsal, model: nn.Module
) -> ServerMemory:
    """What the server holds at the end of a run.

    Args:
        config: for the server's optimiser.
        strategy: for its state.
        rehearsal: of the run, over.
        model: the plain model.
    """
    state = strategy.state
    plain = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    base = sum(tensor.nbytes for tensor in state.base.values())
    keys = (layer.weight_key for layer in strategy.plan.layers)
    folded = sum(state.base[key].nbytes for key in keys if key in state.base)
    trainables = sum(tensor.nbytes for tensor in state.trainables.values())
    moments = _MOMENTS[config.server_optimizer] + int(config.scaffold)
    return ServerMemory(
        model=plain + base + (folded if rehearsal.ledger_bytes else 0),
        trainables=2 * trainables,
        moments=moments * trainables,
        ledger=rehearsal.ledger_bytes,
        replies=2 * rehearsal.replies_bytes,
    )
