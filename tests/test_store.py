"""The store: whole or absent files by digest, healed where damaged, trimmed where too many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedloru_flwr.lowrank import Entry
from fedloru_flwr.store import Holdings, Store, default_store

ROOT, OTHER = "0" * 64, "a" * 64


def entry(value=1.0, previous=ROOT):
    return Entry.after(previous, {"l.lora_A": torch.full((2, 3), value), "l.lora_B": torch.ones(4, 2)}, 0.1)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def files(store):
    return sorted(str(path.relative_to(store.path)) for path in store.path.rglob("*") if path.is_file())


def test_an_entry_comes_back_as_it_was(store):
    put = entry()
    store.put_entry(put)
    got = store.entry(put.digest)
    assert (got.digest, got.previous, got.scale) == (put.digest, put.previous, put.scale)
    assert all(torch.equal(got.adapter[key], put.adapter[key]) for key in put.adapter)
    assert files(store) == [f"entries/{put.digest}.safetensors"]


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 1e-300, 2.0])
def test_a_scale_comes_back_to_the_last_bit(store, scale):
    put = Entry.after(ROOT, {"a": torch.ones(1)}, scale)
    store.put_entry(put)
    assert store.entry(put.digest).scale == scale


def test_a_base_comes_back_as_it_was(store):
    base = {"z": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    assert not store.has_base(ROOT)
    assert store.base(ROOT) is None
    store.put_base(ROOT, base)
    assert store.has_base(ROOT)
    got = store.base(ROOT)
    assert {k: (v.dtype, v.tolist()) for k, v in got.items()} == {k: (v.dtype, v.tolist()) for k, v in base.items()}
    assert files(store) == [f"bases/{ROOT}.safetensors"]


def test_what_is_there_is_not_written_again(store):
    store.put_base(ROOT, {"a": torch.ones(2)})
    store.put_base(ROOT, {"a": torch.zeros(2)})
    assert torch.equal(store.base(ROOT)["a"], torch.ones(2))
    put = entry()
    store.put_entry(put)
    path = store.path / "entries" / f"{put.digest}.safetensors"
    inode = path.stat().st_ino
    store.put_entry(put)
    assert path.stat().st_ino == inode


def test_nothing_is_written_before_something_is_put(store):
    store.holdings(ROOT, "1")
    store.base(ROOT)
    store.entry(OTHER)
    assert not store.path.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "nonsense"])
@pytest.mark.parametrize("kind", ["entries", "bases"])
def test_a_damaged_file_counts_as_absent_and_is_removed_so_that_it_can_be_put_again(store, kind, damage):
    put = entry()
    store.put_entry(put)
    store.put_base(put.digest, {"w": torch.ones(50)})
    path = store.path / kind / f"{put.digest}.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    damaged = {"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "nonsense": b"x" * 100}[damage]
    path.write_bytes(damaged)
    read = store.entry if kind == "entries" else store.base
    assert read(put.digest) is None
    assert not path.exists()
    store.put_entry(put)
    store.put_base(put.digest, {"w": torch.ones(50)})
    assert read(put.digest) is not None


def test_a_renamed_entry_is_not_taken_for_another(store):
    put, other = entry(), entry(2.0)
    store.put_entry(put)
    (store.path / "entries" / f"{put.digest}.safetensors").rename(
        store.path / "entries" / f"{other.digest}.safetensors"
    )
    assert store.entry(other.digest) is None


def test_an_entry_whose_header_lacks_what_is_needed_counts_as_absent(store):
    put = entry()
    store.put_entry(put)
    from fedloru_flwr import atomic

    path = store.path / "entries" / f"{put.digest}.safetensors"
    for metadata in ({}, {"previous": ROOT}, {"previous": ROOT, "scale": "much"}):
        atomic.write_tensors(path, put.adapter, metadata)
        assert store.entry(put.digest) is None
        assert not path.exists()


@pytest.mark.parametrize("name", ["", "../../outside", "0" * 63, "A" * 64, "0" * 64 + "/..", "0" * 63 + "\n"])
def test_only_digests_name_files(store, name):
    for use in (
        lambda: store.put_base(name, {"a": torch.ones(1)}),
        lambda: store.base(name),
        lambda: store.has_base(name),
        lambda: store.entry(name),
        lambda: store.put_entry(Entry(name, ROOT, 1.0, {})),
    ):
        with pytest.raises(ValueError, match="expected a SHA-256 digest"):
            use()
    assert not store.path.exists()


def test_what_a_client_holds_is_kept_by_run_and_client(store):
    store.set_holdings(ROOT, "1", Holdings(OTHER, ROOT))
    store.set_holdings(ROOT, "2", Holdings(ROOT, OTHER))
    assert store.holdings(ROOT, "1").lineage == OTHER
    assert store.holdings(ROOT, "1").base == ROOT
    assert store.holdings(ROOT, "2").base == OTHER
    assert store.holdings(OTHER, "1").lineage is None
    assert store.holdings(OTHER, "1").base == OTHER, "who was sent no base stands on the run's own"
    store.set_holdings(ROOT, "1", Holdings(ROOT, ROOT))
    assert store.holdings(ROOT, "1").lineage == ROOT


@pytest.mark.parametrize("client", ["../../outside", "a/b", "", "ö" * 300, "con", ".", "\x00"])
def test_no_clients_name_leaves_the_directory(store, client):
    store.set_holdings(ROOT, client, Holdings(OTHER, ROOT))
    assert store.holdings(ROOT, client).lineage == OTHER
    (name,) = files(store)
    assert name.startswith("clients/")
    assert len(name) == len("clients/") + 64 + len(".txt")


@pytest.mark.parametrize("text", ["", "x", f"{ROOT}", f"{ROOT} {ROOT} {ROOT}", f"{ROOT} nothing", "\udcff"])
def test_a_damaged_note_says_nothing(store, text):
    store.set_holdings(ROOT, "1", Holdings(OTHER, ROOT))
    (path,) = (store.path / "clients").iterdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert store.holdings(ROOT, "1").lineage is None
    assert store.holdings(ROOT, "1").base == ROOT


def test_the_least_recently_used_files_go_first(tmp_path):
    size = 4000
    store = Store(tmp_path / "store", max_bytes=3 * (size + 500))
    names = [f"{index:064x}" for index in range(5)]
    for index, name in enumerate(names[:3]):
        store.put_base(name, {"w": torch.full((size // 4,), float(index))})
        os.utime(store.path / "bases" / f"{name}.safetensors", (1000 + index, 1000 + index))
    assert store.base(names[0]) is not None, "and using it makes it recent"
    store.put_base(names[3], {"w": torch.zeros(size // 4)})
    assert [store.has_base(name) for name in names[:4]] == [True, False, True, True]


@pytest.mark.parametrize(("numbers", "kept"), [(2000, 3), (500, 5), (100, 6)])
def test_of_the_ends_of_chains_the_newest_three_stay_and_what_fits_into_a_quarter(tmp_path, numbers, kept):
    store = Store(tmp_path, max_bytes=44_000)
    names = [f"{index:064x}" for index in range(6)]
    for index, name in enumerate(names):
        store.put_followed(name, {"w": torch.full((numbers,), float(index))})
        os.utime(tmp_path / "chains" / f"{name}.safetensors", (1000 + index, 1000 + index))
        there = [store.followed(one) is not None for one in names[: index + 1]]
        for age, one in enumerate(names[: index + 1]):  # who looks makes them recent
            if there[age]:
                os.utime(tmp_path / "chains" / f"{one}.safetensors", (1000 + age, 1000 + age))
        assert there == [False] * (index + 1 - min(index + 1, kept)) + [True] * min(index + 1, kept)


def test_what_was_just_put_stays_even_if_it_is_too_large(tmp_path):
    store = Store(tmp_path / "store", max_bytes=100)
    store.put_base(ROOT, {"w": torch.zeros(1000)})
    store.put_base(OTHER, {"w": torch.zeros(1000)})
    assert not store.has_base(ROOT)
    assert store.has_base(OTHER)


def test_states_of_runs_long_since_over_make_room(tmp_path):
    tensors = {"b": torch.ones(1000)}
    store = Store(tmp_path, max_bytes=10_000)
    for run in ("first", "second", "third"):
        store.put_state(run, "north", 3, tensors)
    store.put_state("first", "north", 4, tensors)
    assert store.state("second", "north", 3) is not None, "all are of this month"
    month = 31 * 24 * 3600
    for age, path in enumerate(sorted((tmp_path / "states").rglob("*.safetensors"))):
        os.utime(path, (path.stat().st_mtime - month - age,) * 2)
    assert store.state("second", "north", 3) is not None, "what is read counts as touched"
    store.put_state("fourth", "north", 3, tensors)
    left = [run for run in ("first", "second", "third", "fourth") if store.state(run, "north", 3)]
    assert left == ["second", "fourth"]

    shared = Store(tmp_path / "simulation", max_bytes=1, durable=False)
    shared.put_state("run", "0", 1, tensors)
    for path in (tmp_path / "simulation").rglob("*.safetensors"):
        os.utime(path, (0, 0))
    shared.put_state("run", "1", 1, tensors)
    assert shared.state("run", "0", 1) is not None, "a simulation's clients all belong to one run"


def test_notes_are_not_trimmed(tmp_path):
    store = Store(tmp_path / "store", max_bytes=1)
    store.set_holdings(ROOT, "1", Holdings(ROOT, ROOT))
    store.put_base(ROOT, {"w": torch.zeros(1000)})
    store.put_base(OTHER, {"w": torch.zeros(1000)})
    assert store.holdings(ROOT, "1").lineage == ROOT


def test_the_store_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORU_STORE", str(tmp_path / "mine"))
    assert default_store().path == tmp_path / "mine"
    monkeypatch.delenv("FEDLORU_STORE")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    assert default_store().path == tmp_path / "flower" / "fedloru"
    monkeypatch.delenv("FLWR_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store().path == Path(tmp_path) / ".flwr" / "fedloru"


WRITER = """
import sys
import torch
from pathlib import Path
from fedloru_flwr.store import Store
store = Store(Path(sys.argv[1]))
sys.stdin.readline()
for turn in range(30):
    (store.path / "bases" / ("0" * 64 + ".safetensors")).unlink(missing_ok=True)
    store.put_base("0" * 64, {"w": torch.arange(20_000.0)})
    got = store.base("0" * 64)
    assert got is None or torch.equal(got["w"], torch.arange(20_000.0))
"""


def test_several_processes_may_write_and_read_the_same_file(store):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(store.path)], stdin=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.stdin.close()
        assert writer.wait() == 0
    assert torch.equal(store.base(ROOT)["w"], torch.arange(20_000.0))
    assert files(store) == [f"bases/{ROOT}.safetensors"], "nothing temporary is left"
