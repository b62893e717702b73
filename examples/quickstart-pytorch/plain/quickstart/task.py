"""The model, its data and its loops."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

TEST_SAMPLES = 360


class Net(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


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


def train(model, loader, epochs, lr, device):
    """Train a model and return its mean loss."""
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    total, steps = 0.0, 0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
    return total / steps


def test(model, loader, device):
    """Evaluate a model and return its loss and accuracy."""
    model.to(device).eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs, labels = model(images.to(device)), labels.to(device)
            loss += functional.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
