"""The ClientApp: a Trainer around the model."""

from tempfile import TemporaryDirectory

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from trainerapp.task import get_model, load_data
from trainerapp.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the global model on this client's samples."""
    model = get_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())

    node, run = context.node_config, context.run_config
    dataset = load_data(node["partition-id"], node["num-partitions"])
    with TemporaryDirectory() as scratch:
        loss = train_fn(model, dataset, scratch, run["local-epochs"], run["learning-rate"], run["batch-size"])

    metrics = {"train_loss": loss, "num-examples": len(dataset)}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=msg)
