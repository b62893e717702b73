"""Many clients' messages in one process: trained and evaluated as one batch wherever that is possible."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Context, Message
from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.clients.cohort import obstacle, train_cohort
from fedloru_flwr.clients.memory import is_out_of_memory
from fedloru_flwr.clients.method import ClientMethod
from fedloru_flwr.clients.session import Contact, ModelSource, SessionAnswer
from fedloru_flwr.clients.task import LocalTask
from fedloru_flwr.clients.training import LocalOptimisation, scores
from fedloru_flwr.data import ClientData
from fedloru_flwr.models.base import FrozenBase
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.layout import Layout

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Request:
    """One client's message with all it needs: what `LowRankSession` and a training loop would be given."""

    message: Message
    context: Context
    model: ModelSource
    data: ClientData


class Together:
    """Answers the messages of many clients as one.

    Clients of one layout are trained as one batched computation, which gives each what it would have had alone, up to
    rounding. A model that cannot be batched is said so once, and its clients are left to be trained one at a time.
    """

    def __init__(self) -> None:
        self._obstacles: dict[object, str | None] = {}
        self._models: dict[tuple[object, wire.Settings, Layout], FunctionalModel] = {}

    def answer(
        self, requests: Sequence[Request], how: LocalOptimisation, device: torch.device
    ) -> list[Message | Exception | None]:
        """The reply to each request, the exception it ended in, or None where it has to be handled by itself.

        Args:
            requests: of one kind, training or evaluation, and one round.
            how: the optimisation.
            device: where to train.
        """
        answers: list[Message | Exception | None] = [None] * len(requests)
        contacts: dict[int, Contact] = {}
        orders: dict[int, wire.Order] = {}  # clients that lack the same get the same content
        for index, request in enumerate(requests):
            try:
                content = id(request.message.content)
                order = orders[content] = orders.get(content) or wire.read_order(request.message)
                alone = len(requests) == 1
                if order.settings.accumulate_into == "stack" or self._obstacle(request.model, request.data, alone):
                    continue
                contacts[index] = Contact(request.model, request.message, request.context, make=FrozenBase, order=order)
            except SessionAnswer as answer:
                answers[index] = answer.message
            except Exception as error:  # whatever it is, it becomes an error reply
                answers[index] = error
        trains = {index: contact for index, contact in contacts.items() if contact.trains}
        for index, reply in self._train(trains, requests, how, device).items():
            answers[index] = reply
        for index, contact in contacts.items():
            if not contact.trains:
                answers[index] = self._evaluate(contact, requests[index], device)
        return answers

    def _obstacle(self, model: ModelSource, data: ClientData, alone: bool) -> str | None:
        key = (model, alone)
        if key not in self._obstacles:
            module = model if isinstance(model, torch.nn.Module) else model()
            # A client alone is spared the trial, which takes the memory of several models.
            self._obstacles[key] = reason = obstacle(module, None if alone else data.train.inputs[:2])
            if reason is not None:
                _log.info("clients are trained one at a time: %s", reason)
        return self._obstacles[key]

    def _train(
        self,
        contacts: Mapping[int, Contact],
        requests: Sequence[Request],
        how: LocalOptimisation,
        device: torch.device,
    ) -> dict[int, Message | Exception]:
        tasks: dict[int, LocalTask] = {}
        alike: defaultdict[object, list[int]] = defaultdict(list)
        replies: dict[int, Message | Exception] = {}
        for index, contact in contacts.items():
            try:
                task = tasks[index] = contact.task(requests[index].data.train, how.epochs)
            except Exception as error:
                replies[index] = error
                continue
            layout = contact.method.layout(contact.site)
            alike[layout, task.phases, task.proximal_mu, task.control is None].append(index)
        for indices in alike.values():
            first = contacts[indices[0]]
            model = self._functional(first, requests[indices[0]].model, first.method.layout(first.site))
            base = {**first.host.adapted.read_base(), **first.order.statistics}
            try:
                results = train_cohort(model, base, [tasks[index] for index in indices], how, device)
            except Exception as error:
                if is_out_of_memory(error):
                    _log.warning(
                        "not enough memory for a batch of %d clients: they are trained with PEFT", len(indices)
                    )
                else:  # as if each client had met it
                    replies |= dict.fromkeys(indices, error)
                continue
            for index, result in zip(indices, results, strict=True):
                metrics = {"train_loss": result.loss, wire.NUM_EXAMPLES: len(tasks[index].samples)}
                try:
                    replies[index] = contacts[index].train_reply(result, {}, metrics)
                except Exception as error:
                    replies[index] = error
        return replies

    def _functional(self, contact: Contact, source: ModelSource, layout: Layout) -> FunctionalModel:
        """The model of this layout as a function of its tensors."""
        key = (source, contact.order.settings, layout)
        if key not in self._models:
            while len(self._models) >= _MODELS_KEPT:
                self._models.pop(next(iter(self._models)))
            plan = contact.site.plan
            self._models[key] = FunctionalModel(contact.host.adapted.module, plan.adapted, layout, plan.dense_leaves)
        return self._models[key]

    def _evaluate(self, contact: Contact, request: Request, device: torch.device) -> Message | Exception:
        """The global model's and, where there is one, the personal model's scores on the client's held-out samples."""
        try:
            method, site = contact.method, contact.site
            metrics: dict[str, object] = {wire.NUM_EXAMPLES: len(request.data.held_out)}
            plain = ClientMethod()
            shared = (plain.layout(site), plain.start(site)) if method.has_global_model() else None
            for prefix, of in (("", shared), ("personal-", method.personal(site))):
                if of is None:
                    continue
                layout, values = of
                model = self._functional(contact, request.model, layout)
                tensors = {**model.buffers, **contact.host.adapted.read_base(), **contact.order.statistics}
                there = {name: tensor.to(device) for name, tensor in tensors.items()}
                own = {key: values[key].to(device) for key in model.keys}

                def outputs(
                    inputs: Tensor,
                    model: FunctionalModel = model,
                    own: Mapping[str, Tensor] = own,
                    there: Mapping[str, Tensor] = there,
                ) -> Tensor:
                    return model.forward(own, there, inputs)

                metrics |= {f"{prefix}{k}": v for k, v in scores(outputs, request.data.held_out, device).items()}
            return contact.evaluate_reply(metrics)
        except Exception as error:
            return error


_MODELS_KEPT = 8
