import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from fedloru_flwr import atomic


def hidden_files(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


@pytest.fixture
def dead_process_id():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_json_keeps_its_order_and_ends_with_a_newline(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"b": 1, "a": {"é": [True, None]}})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "b": 1,\n  "a": {\n    "é": [\n      true,\n      null\n    ]\n  }\n}\n'
    )


def test_json_writes_null_for_what_is_no_number(tmp_path):
    obj = [float("nan"), float("inf"), (np.float32("nan"), np.int64(3)), torch.tensor(0.5)]
    atomic.write_json(tmp_path / "a.json", obj)
    assert json.loads((tmp_path / "a.json").read_text()) == [None, None, [None, 3], 0.5]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    atomic.write_text(tmp_path / "a.txt", "old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert hidden_files(tmp_path) == []


def test_what_cannot_be_json_leaves_the_old_file(tmp_path):
    atomic.write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        atomic.write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_the_next_write_removes_the_leftovers_of_dead_processes_only(tmp_path, dead_process_id):
    def temporary(name, process_id):
        return atomic.temporary_path(tmp_path / name).name.replace(f"-{os.getpid()}.", f"-{process_id}.")

    mine, other_name = temporary("a.txt", dead_process_id), temporary("b.txt", dead_process_id)
    alive, foreign = temporary("a.txt", os.getppid()), ".a.txt.notes.tmp"
    elsewhere = f".a.txt.another0host-{dead_process_id}.tmp"
    for name in (mine, other_name, alive, foreign, elsewhere):
        (tmp_path / name).write_text("half")
    atomic.write_text(tmp_path / "a.txt", "whole")
    assert hidden_files(tmp_path) == sorted([other_name, alive, foreign, elsewhere])
    atomic.remove_leftovers(tmp_path)
    assert hidden_files(tmp_path) == sorted([alive, foreign, elsewhere])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16), "é": torch.tensor(True)},
        {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "count": torch.tensor([7])},
        {"half": torch.ones(1, dtype=torch.float16), "byte": torch.ones(3, dtype=torch.uint8)},
        {
            str(dtype): torch.ones(3, dtype=dtype)
            for dtype in (torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)
        },
        {str(dtype): torch.zeros(2, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
    ],
)
def test_tensor_files_are_those_of_the_library(tmp_path, tensors):
    atomic.write_tensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "t.safetensors").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_tensors_come_back_with_their_metadata(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    tied = {"row": weight[0], "whole": weight, "transposed": weight.T, "again": weight}
    atomic.write_tensors(tmp_path / "t.safetensors", tied, {"b": "2", "a": "1"})
    tensors, metadata = atomic.read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"a": "1", "b": "2"}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "again": [[0, 1, 2], [3, 4, 5]],
        "row": [0, 1, 2],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "whole": [[0, 1, 2], [3, 4, 5]],
    }


def test_the_same_tensors_give_the_same_bytes_whatever_the_order_of_the_metadata(tmp_path):
    tensors = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2)}
    metadata = {letter: letter for letter in "qwertyuiop"}
    atomic.write_tensors(tmp_path / "1", tensors, metadata)
    atomic.write_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    atomic.write_tensors(tmp_path / "t", {"a": torch.ones(1)})
    atomic.append_line(tmp_path / "l", {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'z' is torch\.complex128"):
        atomic.write_tensors(tmp_path / "t", {"z": torch.ones(1, dtype=torch.complex128)})


def test_lines_are_appended_one_an_object(tmp_path):
    atomic.append_line(tmp_path / "l.jsonl", {"b": 1, "a": float("nan")})
    atomic.append_line(tmp_path / "l.jsonl", {"text": "two\nlines"})
    assert (tmp_path / "l.jsonl").read_text() == '{"b": 1, "a": null}\n{"text": "two\\nlines"}\n'
    assert atomic.read_lines(tmp_path / "l.jsonl") == [{"b": 1, "a": None}, {"text": "two\nlines"}]


def test_an_incomplete_last_line_is_not_read_and_not_continued(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert atomic.read_lines(path) == [{"a": 1}]
    atomic.append_line(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_line_without_room_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    atomic.append_line(path, {"a": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    with pytest.raises(OSError, match="no room"):
        atomic.append_line(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n'


def test_lines_of_no_file_are_none(tmp_path):
    assert atomic.read_lines(tmp_path / "l.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"l\.jsonl, line 2: not JSON"):
        atomic.read_lines(tmp_path / "l.jsonl")
