import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloru_flwr.clients import LowRankSession
from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()
instance = Net()  # unseeded: another one in every process


def model_of(context):
    return Net if context.run_config["model-from"] == "factory" else instance


@app.train()
def train(msg: Message, context: Context):
    session = LowRankSession(model_of(context), msg, context)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = context.node_config
    trainloader, _ = load_data(config["partition-id"], config["num-partitions"], context.run_config["batch-size"])
    train_loss = train_fn(
        session.model, trainloader, context.run_config["local-epochs"], msg.content["config"]["lr"], device
    )
    return session.reply({"train_loss": train_loss, "num-examples": len(trainloader.dataset)})


@app.evaluate()
def evaluate(msg: Message, context: Context):
    session = LowRankSession(model_of(context), msg, context)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = context.node_config
    _, valloader = load_data(config["partition-id"], config["num-partitions"], context.run_config["batch-size"])
    eval_loss, eval_acc = test_fn(session.model, valloader, device)
    return session.reply({"eval_loss": eval_loss, "eval_acc": eval_acc, "num-examples": len(valloader.dataset)})
