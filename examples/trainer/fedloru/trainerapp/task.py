"""The model, its data and the Trainer."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

TEST_SAMPLES = 360
disable_progress_bar()


def get_model():
    """Build the model; a real project loads it by ``from_pretrained``."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


class Digits(Dataset):
    """Scikit-learn's digits, shuffled, as a Trainer wants them."""

    def __init__(self):
        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))
        self.images = torch.tensor(bunch.images[order], dtype=torch.float32).unsqueeze(1) / 8 - 1
        self.labels = torch.tensor(bunch.target[order])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


digits = cache(Digits)


def load_data(partition_id, num_partitions):
    """Load one client's share."""
    return Subset(digits(), range(TEST_SAMPLES + partition_id, len(digits()), num_partitions))


def load_test_data():
    """Load the samples that only the server has."""
    return Subset(digits(), range(TEST_SAMPLES))


def arguments(output_dir, **more):
    """Settings of a Trainer that tells nobody."""
    return TrainingArguments(output_dir=output_dir, report_to="none", disable_tqdm=True, use_cpu=True, **more)


def train(model, dataset, output_dir, epochs, lr, batch_size):
    """Train a model, saving it on the way, and return its mean loss."""
    args = arguments(
        output_dir,
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=batch_size,
        optim="adamw_torch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
    )
    return Trainer(model=model, args=args, train_dataset=dataset).train().training_loss


def test(model, dataset, output_dir):
    """Evaluate a model and return its loss and accuracy."""
    args = arguments(output_dir, per_device_eval_batch_size=120)
    found = Trainer(model=model, args=args).predict(dataset)
    return found.metrics["test_loss"], float((found.predictions.argmax(1) == found.label_ids).mean())
