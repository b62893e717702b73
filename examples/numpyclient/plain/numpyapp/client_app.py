"""The ClientApp: a NumPyClient around the model."""

import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context

from numpyapp.task import Net, get_weights, load_data, set_weights, test, train


class FlowerClient(NumPyClient):
    """Trains and evaluates on one client's samples."""

    def __init__(self, net, trainloader, valloader, local_epochs):
        self.net = net
        self.trainloader = trainloader
        self.valloader = valloader
        self.local_epochs = local_epochs
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    def fit(self, parameters, config):
        """Train the global model."""
        set_weights(self.net, parameters)
        loss = train(self.net, self.trainloader, self.local_epochs, config["lr"], self.device)
        return get_weights(self.net), len(self.trainloader.dataset), {"train_loss": loss}

    def evaluate(self, parameters, config):
        """Evaluate the global model."""
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.valloader, self.device)
        return loss, len(self.valloader.dataset), {"accuracy": accuracy}


def client_fn(context: Context):
    """Build the client of a node."""
    net = Net()
    node, run = context.node_config, context.run_config
    trainloader, valloader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    return FlowerClient(net, trainloader, valloader, run["local-epochs"]).to_client()


app = ClientApp(client_fn)
