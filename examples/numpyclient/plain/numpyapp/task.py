"""The model, its data and its loops."""

from collections import OrderedDict
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

TEST_SAMPLES = 360


class Net(nn.Module):
    """Three linear layers for images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 96)
        self.fc2 = nn.Linear(96, 96)
        self.fc3 = nn.Linear(96, 10)

    def forward(self, x):
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))


@cache
def digits():
    """Load scikit-learn's digits, shuffled: some to train on, and the server's test set."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.tensor(bunch.images[order], dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(bunch.target[order]))
    return Subset(dataset, range(TEST_SAMPLES, len(dataset))), Subset(dataset, range(TEST_SAMPLES))


def load_data(partition_id, num_partitions, batch_size):
    """Load one client's share, a fifth of it for evaluation."""
    samples, _ = digits()
    share = Subset(samples, range(partition_id, len(samples), num_partitions))
    cut = int(0.8 * len(share))
    trainset, valset = Subset(share, range(cut)), Subset(share, range(cut, len(share)))
    return DataLoader(trainset, batch_size, shuffle=True), DataLoader(valset, batch_size)


def load_test_data():
    """Load the samples that only the server has."""
    return DataLoader(digits()[1], 128)


def train(net, loader, epochs, lr, device):
    """Train a model and return its mean loss."""
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    total, steps = 0.0, 0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
    return total / steps


def test(net, loader, device):
    """Evaluate a model and return its loss and accuracy."""
    net.to(device).eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs, labels = net(images.to(device)), labels.to(device)
            loss += functional.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)


def get_weights(net):
    """Read a model's weights."""
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, parameters):
    """Write a model's weights."""
    named = zip(net.state_dict(), parameters, strict=True)
    net.load_state_dict(OrderedDict({name: torch.tensor(value) for name, value in named}))
