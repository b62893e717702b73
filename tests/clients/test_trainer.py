"""The Trainer of transformers around a session's model: what it moves, wraps, saves and loads again."""

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn
from torch.utils.data import Dataset

from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.strategies import FedLoRU

transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """What a Trainer wants of a model: the loss comes with the outputs."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, inputs, labels=None):
        logits = self.out(torch.relu(self.hidden(inputs)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Samples(Dataset):
    def __init__(self, client):
        generator = torch.Generator().manual_seed(client)
        self.inputs = torch.randn(24, 12, generator=generator)
        self.labels = self.inputs[:, :3].argmax(1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


def train(model, client, directory, **more):
    args = transformers.TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=2,
        learning_rate=0.02,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
        logging_strategy="no",
        **more,
    )
    data = Samples(client)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    return trainer.train().training_loss


def run(tmp_path, rows_of, *, base_by_value=False, rounds=3, **more):
    """A run whose clients train by a Trainer; the rows of its rounds, and the merged model."""
    client_app, server_app, kept = ClientApp(), ServerApp(), {}

    @client_app.train()
    def fit(msg, context):
        session = LowRankSession(Net, msg, context, base_by_value=base_by_value)
        client = context.node_config["partition-id"]
        loss = train(session.model, client, tmp_path / "trainer" / str(client), **more)
        return session.reply({"train_loss": loss, "num-examples": 24})

    @server_app.main()
    def main(grid, context):
        kept["strategy"] = strategy = FedLoRU(
            Net, rank=2, accumulate_every=1, fraction_evaluate=0.0, run_dir=tmp_path / "run", max_failure_fraction=1.0
        )
        strategy.start(grid, strategy.initial_arrays(), num_rounds=rounds)

    run_in_process(server_app, client_app, num_supernodes=2)
    return rows_of(tmp_path / "run"), kept["strategy"]


@pytest.fixture(autouse=True)
def surroundings(fresh_process, quick_books):
    """What every test here has."""


def test_a_trainer_that_saves_leaves_the_session_as_it_is(tmp_path, rows_of):
    rows, strategy = run(tmp_path, rows_of)
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows] == [(2, 0)] * 3
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"]
    assert all(set(row["bytes_by_purpose"]) <= {"trainables", "entries"} for row in rows)
    assert strategy.state.ledger.version == 3


def test_a_trainer_that_loads_its_best_model_wants_the_base_compared_by_value(tmp_path, rows_of):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    rows, _ = run(tmp_path / "by-value", rows_of, base_by_value=True, **best)
    assert [row["clients_failed"] for row in rows] == [0, 0, 0]
    rows, _ = run(tmp_path / "by-writes", rows_of, rounds=1, **best)
    (reason,) = set(rows[0]["failures"].values())
    assert "frozen in this run: hidden.weight" in reason
    assert "base_by_value=True" in reason
