"""A tiny language model and its data, as fixtures."""

import pytest
from small_language import CHAT, TEMPLATE, instructions, save_model, write_rows


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("chatty"), chat=CHAT)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Training and held-out instructions."""
    path = tmp_path_factory.mktemp("instructions")
    write_rows(path / "train.jsonl", instructions(48))
    write_rows(path / "test.jsonl", instructions(8, start=100))
    return str(path)


@pytest.fixture
def settings(llama, folder, tmp_path):
    """Of a run of a few seconds."""
    return {
        "model": f"hf:{llama}",
        "dataset": "local",
        "data-path": folder,
        "prompt-template": TEMPLATE,
        "max-length": 48,
        "num-clients": 4,
        "fraction-train": 0.5,
        "num-server-rounds": 3,
        "accumulate-every": 2,
        "local-epochs": 1,
        "batch-size": 4,
        "optimizer": "adamw",
        "learning-rate": 0.02,
        "rank": 4,
        "alpha": 8.0,
        "output-dir": str(tmp_path / "runs"),
        "run-name": "one",
    }
