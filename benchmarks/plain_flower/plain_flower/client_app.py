"""The ClientApp: build the PEFT model, load the adapter, train, send the adapter back."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from plain_flower.task import get_model, kept_model, load, set_weights, train, trained

app = ClientApp()


@app.train()
def fine_tune(msg: Message, context: Context) -> Message:
    """Train the adapter on this client's samples."""
    torch.set_num_threads(int(context.run_config["threads"]))
    path = str(context.run_config["workload"])
    model = kept_model(path) if context.run_config["keep-model"] else get_model(path)
    set_weights(model, msg.content["arrays"].to_torch_state_dict())
    loss, count = train(model, load(path), int(context.node_config["partition-id"]))
    content = {
        "arrays": ArrayRecord(trained(model)),
        "metrics": MetricRecord({"train_loss": loss, "num-examples": count}),
    }
    return Message(RecordDict(content), reply_to=msg)
