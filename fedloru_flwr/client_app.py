"""The Flower ClientApp: local low-rank optimisation on the client's own samples."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedloru_flwr import wire
from fedloru_flwr.clients.identity import client_identity
from fedloru_flwr.clients.mods import session_mod
from fedloru_flwr.clients.session import LowRankSession
from fedloru_flwr.clients.together import Request, Together
from fedloru_flwr.clients.training import choose_device
from fedloru_flwr.config import RunConfig
from fedloru_flwr.data import ClientData, DataSpec
from fedloru_flwr.engines.in_process import answers, client_context, handle
from fedloru_flwr.packets import ACTION, Packet, pack_replies, unpack_orders
from fedloru_flwr.workload import client_data, data_config, local_optimisation, local_work, network_factory

app = ClientApp()


@app.query()
def enrol(message: Message, context: Context) -> Message:
    """Tell the server who this client is, and the largest rank it can train (``max-rank`` of its node config)."""
    version = importlib.metadata.version("fedloru-flwr")
    budget = context.node_config.get("max-rank", 0)
    try:
        budget = int(budget)
    except ValueError:
        raise ValueError(f"max-rank = {budget!r} of this SuperNode's node config must be a whole number") from None
    enrolment = wire.Enrolment(client_identity(context), version, budget)
    return Message(wire.enrolment_reply(message.content, enrolment), reply_to=message)


@app.train(mods=[session_mod])
def train(message: Message, context: Context) -> Message:
    """Train the factors and dense leaves on the client's training samples; before that, evaluate them if asked to."""
    if (reply := _as_batch_of_one(message, context)) is not None:
        return reply
    config, data, session = _begin(message, context)
    work = local_work(config)
    how, device = local_optimisation(config, session.server_round), choose_device(config.device)
    generator = torch.Generator().manual_seed(session.seed)
    received = {}
    if config.evaluate_in_training:
        prefix, model = session.received()
        received = {
            f"{wire.RECEIVED}{prefix}{name}": value
            for name, value in work.evaluate(model, data.held_out, device).items()
        }
    losses = [
        work.train(session.model, data.train, replace(how, epochs=epochs), generator, device)
        for epochs in session.phases(how.epochs)
    ]
    return session.reply({"train_loss": losses[0], **received, wire.NUM_EXAMPLES: len(data.train)})


@app.evaluate(mods=[session_mod])
def evaluate_held_out(message: Message, context: Context) -> Message:
    """Evaluate the global model, and the client's own where it has one, on the client's held-out samples."""
    if (reply := _as_batch_of_one(message, context)) is not None:
        return reply
    config, data, session = _begin(message, context)
    work = local_work(config)
    metrics = {
        f"{prefix}{name}": value
        for prefix, model in session.models()
        for name, value in work.evaluate(model, data.held_out, choose_device(config.device)).items()
    }
    return session.reply({**metrics, wire.NUM_EXAMPLES: len(data.held_out)})


_together = Together()


def train_or_evaluate_together(requests: list[tuple[Message, Context]]) -> list[Message | Exception | None]:
    """Handle the messages of one phase of a round as one batch, where that can be done; see `Together`.

    A message that is neither training nor evaluation, or that has to be handled by itself, gets None.
    """
    kinds = {message.metadata.message_type.split(".")[0] for message, _ in requests}
    if len(kinds) != 1 or not kinds <= {"train", "evaluate"}:
        return [None] * len(requests)
    config = RunConfig.from_mapping(requests[0][1].run_config)
    if not config.batched or config.pretrained or (config.evaluate_in_training and "train" in kinds):
        return [None] * len(requests)
    torch.set_num_threads(config.threads)
    server_round = wire.template_round(requests[0][0].content)  # the orders are parsed once, by whom they are for
    answers: list[Message | Exception | None] = [None] * len(requests)
    whole: dict[int, Request] = {}
    of_run, factories = data_config(config), dict[DataSpec, Callable[[], nn.Module]]()
    for index, (message, context) in enumerate(requests):
        try:
            data, spec = client_data(of_run, context)
            if spec not in factories:
                factories[spec] = network_factory(config, spec)
            whole[index] = Request(message, context, factories[spec], data)
        except Exception as error:  # this client's alone
            answers[index] = error
    how, device = local_optimisation(config, server_round), choose_device(config.device)
    for index, answer in zip(whole, _together.answer(list(whole.values()), how, device), strict=True):
        answers[index] = answer
    return answers


@app.query(ACTION)
def enrol_hosted(message: Message, context: Context) -> Message:
    """Tell who the clients are that this SuperNode hosts."""
    return _hosted(message, context)


@app.train(ACTION)
def train_hosted(message: Message, context: Context) -> Message:
    """Train clients that this SuperNode hosts, as one batch where that can be done."""
    return _hosted(message, context)


@app.evaluate(ACTION)
def evaluate_hosted(message: Message, context: Context) -> Message:
    """Evaluate clients that this SuperNode hosts."""
    return _hosted(message, context)


def _hosted(message: Message, context: Context) -> Message:
    """Answer the orders of a packet, each in the context of its client."""
    count = RunConfig.from_mapping(context.run_config).num_clients
    replies: list[Message] = []
    for share in unpack_orders(Packet.from_record_dict(message.content)):
        requests = [(one, client_context(one.metadata.dst_node_id, count, context.run_config)) for one in share]
        replies += answers(partial(handle, app), requests, train_or_evaluate_together)
    return Message(pack_replies(replies).to_record_dict(), reply_to=message)


def _as_batch_of_one(message: Message, context: Context) -> Message | None:
    """Handle a message as a batch would be, without PEFT, whose import alone takes seconds; None where it cannot be."""
    (reply,) = train_or_evaluate_together([(message, context)])
    if isinstance(reply, Exception):
        raise reply
    return Message(reply.content, reply_to=message) if isinstance(reply, wire.ReadyReply) else reply


def _begin(message: Message, context: Context) -> tuple[RunConfig, ClientData, LowRankSession]:
    """What training and evaluation have in common: settings, data, and the model brought up to date."""
    config = RunConfig.from_mapping(context.run_config)
    torch.set_num_threads(config.threads)
    data, spec = client_data(data_config(config), context)
    return config, data, LowRankSession(network_factory(config, spec), message, context)
