"""The ClientApp: local tuning of the adapters."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.models import get_model
from flowertune.task import load_data
from flowertune.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Tune the global adapters on this client's instructions."""
    model = get_model()
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    node, run = context.node_config, context.run_config
    loader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    loss = train_fn(model, loader, run["local-epochs"], run["learning-rate"], device)

    metrics = {"train_loss": loss, "num-examples": len(loader.dataset)}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=msg)
