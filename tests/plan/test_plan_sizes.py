"""Sizes told from shapes are those of the real records, to the byte."""

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedloru_flwr import wire
from fedloru_flwr.lowrank import Entry
from fedloru_flwr.plan import sizes
from fedloru_flwr.plan.sizes import Blob, Sketch

DIGEST = "ab" * 32


def sketches(tensors):
    return {name: Sketch.of(tensor) for name, tensor in tensors.items()}


CASES = {
    "nothing": {},
    "one": {"a": torch.randn(3, 4)},
    "equal zeros are one": {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "c": torch.zeros(4, 3)},
    "formats": {"a": torch.randn(5).double(), "b": torch.randn(2, 1, 3).half(), "c": torch.randn(7).bfloat16()},
    "a number": {"a": torch.tensor(2.5)},
    "names with other letters": {'ä"b': torch.randn(2), "x\\y": torch.randn(2)},
    "chunks": {"a": torch.randn(1_700_000), "b": torch.zeros(4_000_000), "c": torch.zeros(2, 2_000_000)},
    "ones and zeros": {"a": torch.ones(8), "b": torch.zeros(8), "c": torch.ones(8)},
    "many": {f"layer.{i}.lora_A": torch.randn(4, i + 1) for i in range(30)},
}


@pytest.mark.parametrize("name", CASES)
def test_an_array_record_has_the_bytes_that_its_sketch_says(name):
    tensors = CASES[name]
    assert sizes.arrays_bytes(sketches(tensors)) == wire.content_bytes(wire.to_record(tensors))


def test_arrays_that_are_like_no_other_add_up():
    tensors = {f"x{i}": torch.randn(3, i + 1) for i in range(12)}
    parts = sizes.distinct_arrays_bytes(sketches(tensors).values())
    frame = sizes.array_record_bytes(12, sum(map(sizes.name_characters, tensors)), 12)
    assert parts + frame == wire.content_bytes(wire.to_record(tensors))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": 1},
        {"a": 63, "b": 64, "c": 8192, "d": -5, "e": 0},
        {"a": True, "b": 0.0, "c": "ä" * 100},
        {"a": b"1" * 200},
    ],
)
def test_a_config_record_has_the_bytes_that_are_told(values):
    assert sizes.config_bytes(values) == len(ConfigRecord(values).deflate())


def test_a_blob_counts_as_bytes_of_its_length():
    for length in (0, 1, 127, 128, 20_000, 300_000):
        config = {"head": "x", "blob": b"\0" * length}
        assert sizes.config_bytes({**config, "blob": Blob(length)}) == len(ConfigRecord(config).deflate())


def test_a_metric_record_has_the_bytes_that_are_told():
    metrics = {"train_loss": 0.25, "num-examples": 130}
    assert sizes.metrics_bytes(metrics) == len(MetricRecord(metrics).deflate())


def test_a_content_is_its_own_bytes_and_those_of_its_records():
    records = {"arrays": wire.to_record({"a": torch.randn(4)}), "config": ConfigRecord({"server-round": 3})}
    sized = {name: wire.content_bytes(record) for name, record in records.items()}
    assert sizes.content_bytes(sized) == wire.content_bytes(RecordDict(records))


@pytest.mark.parametrize("name", [name for name in CASES if name != "chunks"])
def test_safetensors_have_the_bytes_that_are_told(name):
    tensors = CASES[name]
    assert sizes.safetensors_bytes(sketches(tensors)) == len(wire._to_bytes(tensors))


def test_ledger_entries_have_the_bytes_that_are_told():
    import json

    entries = []
    for draw in range(12):
        previous = entries[-1].digest if entries else DIGEST
        adapter = {"fc.lora_A": torch.randn(2, 5), "fc.lora_B": torch.randn(7, 2)}
        entries.append(Entry.after(previous, adapter, 2.0, draw))
    tensors, chain = wire._flatten(entries)
    assert sizes.safetensors_bytes(sketches(tensors), json.dumps(chain)) == len(wire.entries_to_bytes(entries))
