"""The Flower ClientApp: local low-rank optimisation on the client's own samples."""

import importlib.metadata

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloru_flwr import wire
from fedloru_flwr.clients.identity import client_identity
from fedloru_flwr.clients.mods import session_mod
from fedloru_flwr.clients.session import LowRankSession
from fedloru_flwr.clients.training import LocalOptimisation, choose_device, evaluate, train_locally
from fedloru_flwr.config import RunConfig
from fedloru_flwr.data import ClientData
from fedloru_flwr.workload import client_data, learning_rate, network_factory

app = ClientApp()


@app.query()
def enrol(message: Message, context: Context) -> Message:
    """Tell the server who this client is."""
    enrolment = wire.Enrolment(client_identity(context), importlib.metadata.version("fedloru-flwr"))
    return Message(wire.enrolment_reply(message.content, enrolment), reply_to=message)


@app.train(mods=[session_mod])
def train(message: Message, context: Context) -> Message:
    """Train the factors and dense leaves on the client's training samples."""
    config, data, session = _begin(message, context)
    how = LocalOptimisation(
        epochs=config.local_epochs,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        learning_rate=learning_rate(config, session.server_round),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    loss = train_locally(session.model, data.train, how, session.seed, choose_device(config.device))
    return session.reply({"train_loss": loss, wire.NUM_EXAMPLES: len(data.train)})


@app.evaluate(mods=[session_mod])
def evaluate_held_out(message: Message, context: Context) -> Message:
    """Evaluate the global model on the client's held-out samples."""
    config, data, session = _begin(message, context)
    metrics = evaluate(session.model, data.held_out, choose_device(config.device))
    return session.reply({**metrics, wire.NUM_EXAMPLES: len(data.held_out)})


def _begin(message: Message, context: Context) -> tuple[RunConfig, ClientData, LowRankSession]:
    """What training and evaluation have in common: settings, data, and the model brought up to date."""
    config = RunConfig.from_mapping(context.run_config)
    torch.set_num_threads(config.threads)
    data, spec = client_data(config, context)
    return config, data, LowRankSession(network_factory(config, spec), message, context)
