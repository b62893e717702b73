import hashlib
import struct
from dataclasses import replace

import pytest
import torch

from fedloru_flwr.lowrank import Entry, Ledger, digest_tensors

ADAPTER = {"fc.lora_A": torch.tensor([[1.0, 2.0]]), "fc.lora_B": torch.tensor([[3.0], [4.0]])}
OTHER = {"fc.lora_A": torch.tensor([[1.0, 2.5]]), "fc.lora_B": torch.tensor([[3.0], [4.0]])}


def test_a_digest_is_the_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    content = b"w\x1ftorch.float32\x1f(2,)\x1e" + struct.pack("<2f", 1.0, 2.0)
    assert digest_tensors({"w": torch.tensor([1.0, 2.0])}) == hashlib.sha256(content).hexdigest()
    assert digest_tensors({"w": torch.tensor([1.0, 2.0])}, salt=b"s") == hashlib.sha256(b"s" + content).hexdigest()


def test_a_digest_does_not_depend_on_the_dicts_order_or_the_memory_layout() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    digest = digest_tensors({"a": square, "b": torch.ones(1)})
    assert digest == digest_tensors({"b": torch.ones(1), "a": square})
    assert digest == digest_tensors({"a": square.T.contiguous().T, "b": torch.ones(1, requires_grad=True)})
    assert digest_tensors({"a": torch.arange(6.0)[::2]}) == digest_tensors({"a": torch.tensor([0.0, 2.0, 4.0])})


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.tensor([1.0, 2.0000002])},
        {"w": torch.tensor([2.0, 1.0])},
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([1.0, 2.0]), "x": torch.zeros(0)},
        {},
    ],
    ids=["value", "places", "dtype", "dtype of the same bytes", "shape", "name", "an empty tensor more", "nothing"],
)
def test_a_digest_changes_with_whatever_is_in_it(changed: dict[str, torch.Tensor]) -> None:
    assert digest_tensors(changed) != digest_tensors({"w": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_and_scalars_have_a_digest(dtype: torch.dtype) -> None:
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    assert digest_tensors({"n": one}) != digest_tensors({"n": zero})


def test_a_ledger_starts_at_its_root_and_is_never_changed() -> None:
    empty = Ledger("root")
    longer = empty.append(ADAPTER, 2.0)
    assert (empty.lineage, empty.version) == ("root", 0)
    assert longer.version == 1
    assert longer.entries[0].previous == "root"
    assert longer.lineage == longer.entries[0].digest != "root"
    assert longer.entries[0].scale == 2.0
    assert longer.entries[0].adapter is ADAPTER


def test_entries_are_chained() -> None:
    ledger = Ledger("root").append(ADAPTER, 2.0).append(OTHER, 2.0).append(ADAPTER, 2.0)
    first, second, third = ledger.entries
    assert (second.previous, third.previous) == (first.digest, second.digest)
    assert len({first.digest, second.digest, third.digest}) == 3


@pytest.mark.parametrize(
    "other",
    [
        Ledger("root").append(ADAPTER, 2.0).append(OTHER, 2.5),
        Ledger("root").append(ADAPTER, 2.5).append(OTHER, 2.0),
        Ledger("root").append(OTHER, 2.0).append(ADAPTER, 2.0),
        Ledger("root").append(ADAPTER, 2.0).append(ADAPTER, 2.0),
        Ledger("root").append(ADAPTER, 2.0),
        Ledger("roof").append(ADAPTER, 2.0).append(OTHER, 2.0),
        Ledger("root").append({key: value.double() for key, value in ADAPTER.items()}, 2.0).append(OTHER, 2.0),
    ],
    ids=["scale", "earlier scale", "order", "factor", "length", "root", "dtype"],
)
def test_the_last_digest_names_the_whole_past(other: Ledger) -> None:
    same = Ledger("root").append({key: value.clone() for key, value in ADAPTER.items()}, 2.0).append(OTHER, 2.0)
    ledger = Ledger("root").append(ADAPTER, 2.0).append(OTHER, 2.0)
    assert ledger.lineage == same.lineage
    assert ledger.lineage != other.lineage


def test_missing_are_the_entries_after_what_is_held() -> None:
    ledger = Ledger("root").append(ADAPTER, 2.0).append(OTHER, 2.0).append(ADAPTER, 1.0)
    first, second, third = ledger.entries
    assert ledger.missing("root") == (first, second, third)
    assert ledger.missing(first.digest) == (second, third)
    assert ledger.missing(third.digest) == ()
    assert ledger.missing("elsewhere") is None
    assert Ledger("root").missing("root") == ()


def test_an_honest_entry_verifies() -> None:
    Entry.after("root", ADAPTER, 2.0).verify()


@pytest.mark.parametrize(
    "forged",
    [{"scale": 2.5}, {"previous": "roof"}, {"adapter": OTHER}, {"digest": "0" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_an_entry_of_other_content_than_its_digest_says_is_refused(forged: dict[str, object]) -> None:
    entry = replace(Entry.after("root", ADAPTER, 2.0), **forged)
    with pytest.raises(ValueError, match=f"{entry.digest[:12]} does not match its content"):
        entry.verify()
