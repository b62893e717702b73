"""The ClientApp: local tuning of the adapters."""

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloru_flwr.clients import LowRankSession  # FedLoRU
from flowertune.models import get_model
from flowertune.task import load_data
from flowertune.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Tune the global adapters on this client's instructions."""
    session = LowRankSession(get_model, msg, context)  # FedLoRU
    model = session.model  # FedLoRU
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    node, run = context.node_config, context.run_config
    loader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    loss = train_fn(model, loader, run["local-epochs"], run["learning-rate"], device)

    metrics = {"train_loss": loss, "num-examples": len(loader.dataset)}
    return session.reply(metrics)  # FedLoRU
