"""The ClientApp: a Trainer around the model."""

from tempfile import TemporaryDirectory

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloru_flwr.clients import LowRankSession  # FedLoRU
from trainerapp.task import get_model, load_data
from trainerapp.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the global model on this client's samples."""
    session = LowRankSession(get_model, msg, context)  # FedLoRU
    model = session.model  # FedLoRU

    node, run = context.node_config, context.run_config
    dataset = load_data(node["partition-id"], node["num-partitions"])
    with TemporaryDirectory() as scratch:
        loss = train_fn(model, dataset, scratch, run["local-epochs"], run["learning-rate"], run["batch-size"])

    metrics = {"train_loss": loss, "num-examples": len(dataset)}
    return session.reply(metrics)  # FedLoRU
