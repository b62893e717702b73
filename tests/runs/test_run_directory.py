import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedloru_flwr.runs import OutputError, RunDirectory, RunExistsError, directory

SUMMARY = {
    "algorithm": "fedloru",
    "rounds": 2,
    "final_accuracy": 0.5,
    "best_accuracy": 0.75,
    "clients": {},
    "total_bytes_up": 10,
    "total_bytes_down": 20,
    "full_model_bytes": 100,
    "fedavg_bytes": 400,
    "trainable_parameters": 5,
    "model_parameters": 25,
    "seconds": 1.5,
    "status": "finished",
}


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path, "a")


@pytest.fixture
def at_noon(monkeypatch):
    monkeypatch.setattr(directory, "_now", lambda: datetime(2026, 11, 20, 12, 0, 7, tzinfo=UTC))


def entries(path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())


def test_a_run_is_made_with_its_parents_and_named_latest(tmp_path):
    run = RunDirectory.create(tmp_path / "deep" / "runs", "first")
    assert run.path == tmp_path / "deep" / "runs" / "first"
    assert entries(run.path) == ["checkpoints"]
    assert os.readlink(tmp_path / "deep" / "runs" / "latest") == "first"  # noqa: PTH115


def test_latest_moves_to_the_newest_run_and_can_be_opened(tmp_path):
    RunDirectory.create(tmp_path, "first")
    RunDirectory.create(tmp_path, "second")
    assert RunDirectory.open(tmp_path / "latest").path == (tmp_path / "second").resolve()
    assert names_in(tmp_path) == ["first", "latest", "second"]


def test_latest_is_a_text_file_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        RunDirectory.create(tmp_path, "first")
    assert (tmp_path / "latest.txt").read_text() == "first\n"
    assert RunDirectory.open(tmp_path / "latest").path == (tmp_path / "first").resolve()
    RunDirectory.create(tmp_path, "second")
    assert names_in(tmp_path) == ["first", "latest", "second"]


def test_the_default_name_is_the_time_and_a_number_while_taken(tmp_path, at_noon):
    names = [RunDirectory.create(tmp_path).path.name for _ in range(3)]
    assert names == ["20261120-120007", "20261120-120007-2", "20261120-120007-3"]


def test_a_name_in_use_is_refused_with_the_ways_out(tmp_path):
    RunDirectory.create(tmp_path, "a")
    for attempt in (RunDirectory.create, RunDirectory.check):
        with pytest.raises(RunExistsError) as caught:
            attempt(tmp_path, "a")
        assert str(caught.value) == (
            f"run-name = 'a': {tmp_path / 'a'} exists already; "
            f"choose another run-name, or go on with it: resume = '{tmp_path / 'a'}'"
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "path separator"),
        ("/a", "path separator"),
        ("a//", "path separator"),
        ("..", "start with a dot"),
        (".a", "start with a dot"),
        ("a\\b", "path separator"),
        (" ", "start or end with a space"),
        ("a\n", "start or end with a space"),
        ("a\x00b", "control characters"),
        ("latest", "points to the newest run"),
        ("LATEST.txt", "points to the newest run"),
        ("a" * 300, "too long"),
    ],
)
def test_a_name_that_is_no_directory_name_is_refused(tmp_path, name, reason):
    for attempt in (RunDirectory.create, RunDirectory.check):
        with pytest.raises(OutputError, match=reason):
            attempt(tmp_path, name)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("output_dir", ["file", "file/below"])
def test_an_output_directory_that_is_none_is_refused_with_the_reason(tmp_path, output_dir):
    (tmp_path / "file").touch()
    for attempt in (RunDirectory.create, RunDirectory.check):
        with pytest.raises(OutputError, match=r"output-dir = '.*file.*' cannot be written: "):
            attempt(tmp_path / output_dir)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_output_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    for attempt in (RunDirectory.create, RunDirectory.check):
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            attempt(tmp_path / "runs")


def test_a_check_leaves_nothing_behind(tmp_path):
    RunDirectory.check(tmp_path / "not" / "yet", "a")
    RunDirectory.check(tmp_path)
    assert entries(tmp_path) == []


def test_only_a_run_can_be_opened(tmp_path, run):
    run.write_manifest({})
    with pytest.raises(OutputError, match="there is no run at"):
        RunDirectory.open(tmp_path / "b")
    with pytest.raises(OutputError, match=r"is not a run: .* name one of them: a"):
        RunDirectory.open(tmp_path)


def test_a_manifest_comes_back(run):
    with pytest.raises(OutputError, match=r"has no manifest\.json"):
        run.read_manifest()
    run.write_manifest({"seed": 0, "config": {"rank": 4}})
    assert run.read_manifest() == {"seed": 0, "config": {"rank": 4}}


def test_a_row_has_every_key_in_order(run):
    run.append_round({"accuracy": 0.5, "round": 0, "loss": math.nan})
    run.append_round({"round": 1, "bytes_up": 7, "failures": {"3": "timeout"}, "extra": 1})
    first, second = (run.path / "metrics.jsonl").read_text().splitlines()
    assert first == (
        '{"round": 0, "accuracy": 0.5, "loss": null, "train_loss": null, "bytes_up": 0, "bytes_down": 0, '
        '"bytes_by_purpose": {}, "clients_ok": 0, "clients_failed": 0, "failures": {}, "ledger_version": 0, '
        '"accumulated_rank": 0, "seconds": 0.0}'
    )
    assert json.loads(second)["failures"] == {"3": "timeout"}
    assert run.read_rounds()[1]["extra"] == 1


def test_a_row_without_a_round_is_refused(run):
    with pytest.raises(ValueError, match="needs a round"):
        run.append_round({"accuracy": 0.5})


def test_truncation_keeps_the_rows_up_to_a_round(run):
    run.truncate_rounds(0)
    assert run.read_rounds() == []
    for server_round in range(5):
        run.append_round({"round": server_round})
    before = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    run.truncate_rounds(2)
    assert (run.path / "metrics.jsonl").read_text() == "".join(before[:3])
    run.append_round({"round": 3})
    assert [row["round"] for row in run.read_rounds()] == [0, 1, 2, 3]


def test_a_summary_comes_back_once_there_is_one(run):
    assert run.read_summary() is None
    run.write_summary(SUMMARY)
    assert run.read_summary() == SUMMARY
    assert set(SUMMARY) == set(directory.SUMMARY_KEYS)


def test_an_incomplete_summary_is_refused(run):
    with pytest.raises(ValueError, match=r"needs rounds, .*, status"):
        run.write_summary({"algorithm": "fedloru"})


def test_a_file_that_is_not_an_object_is_named(run):
    (run.path / "summary.json").write_text("[]")
    with pytest.raises(OutputError, match=r"summary\.json should hold a JSON object, got list"):
        run.read_summary()
    (run.path / "summary.json").write_text("{")
    with pytest.raises(OutputError, match=r"summary\.json is not JSON"):
        run.read_summary()


def test_the_model_has_the_keys_of_the_plain_one(run):
    model = torch.nn.Linear(2, 1)
    run.write_model(model.state_dict())
    state_dict = load_file(run.path / "model.safetensors")
    assert list(state_dict) == ["bias", "weight"]
    assert torch.equal(state_dict["weight"], model.weight)


def test_a_checkpoint_comes_back_as_it_was(run):
    assert run.latest_checkpoint() is None
    tensors = {"z": torch.ones(2), "a": torch.tensor(3), "m": torch.zeros(0, 2)}
    path = run.write_checkpoint(10, tensors, {"best": -math.inf, "ledger": ["d1", "d2"], "x": 0.1})
    assert path == run.path / "checkpoints" / "round-000010.safetensors"
    server_round, read, state, _ = run.latest_checkpoint()
    assert server_round == 10
    assert list(read) == ["z", "a", "m"]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert state == {"best": -math.inf, "ledger": ["d1", "d2"], "x": 0.1}


def test_the_last_checkpoints_are_kept(run):
    for server_round in (1, 2, 3, 1_000_000):
        run.write_checkpoint(server_round, {}, {})
    names = ["round-000003.safetensors", "round-1000000.safetensors"]
    assert names_in(run.path / "checkpoints") == names
    run.write_checkpoint(1_000_001, {}, {}, keep=1)
    assert run.latest_checkpoint() == (1_000_001, {}, {}, {})
    assert names_in(run.path / "checkpoints") == ["round-1000001.safetensors"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run.write_checkpoint(1, {}, {}, keep=0)


def test_checkpoints_of_an_abandoned_course_go(run):
    for server_round in (10, 15, 12):
        run.write_checkpoint(server_round, {}, {})
    assert names_in(run.path / "checkpoints") == [
        "round-000010.safetensors",
        "round-000012.safetensors",
    ]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run):
    run.write_checkpoint(1, {"w": torch.ones(1)}, {})
    damaged = run.write_checkpoint(2, {"w": torch.ones(1)}, {})
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.warns(UserWarning, match=r"round-000002\.safetensors cannot be read .* the one before"):
        assert run.latest_checkpoint()[0] == 1
    (run.path / "checkpoints" / "round-000001.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(OutputError, match=r"no checkpoint in .* can be read"),
    ):
        run.latest_checkpoint()


def test_a_bit_that_flips_in_a_checkpoint_is_noticed(run):
    run.write_checkpoint(1, {"w": torch.ones(1)}, {})
    damaged = run.write_checkpoint(2, {"w": torch.ones(1)}, {})
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="does not match its digest"):
        assert run.latest_checkpoint()[0] == 1


def test_parts_are_written_once_and_come_back_in_order(run):
    first, second = {"x": torch.ones(3)}, {"x": torch.zeros(3), "a": torch.ones(1)}
    run.write_checkpoint(1, {}, {}, {"b1": first})
    part = run.path / "checkpoints" / "parts" / "b1.safetensors"
    written = part.stat().st_mtime_ns, part.stat().st_ino
    run.write_checkpoint(2, {}, {}, {"b1": first, "a2": second})
    assert (part.stat().st_mtime_ns, part.stat().st_ino) == written
    parts = run.latest_checkpoint().parts
    assert list(parts) == ["b1", "a2"]
    assert torch.equal(parts["b1"]["x"], first["x"])
    assert torch.equal(parts["a2"]["a"], second["a"])
    with pytest.raises(ValueError, match=r"letters and digits only, got '\.\./x'"):
        run.write_checkpoint(3, {}, {}, {"../x": first})


def test_a_checkpoint_without_one_of_its_parts_gives_way_to_the_one_before(run):
    run.write_checkpoint(1, {}, {}, {"b1": {"x": torch.ones(3)}})
    run.write_checkpoint(2, {}, {}, {"b1": {"x": torch.ones(3)}, "b2": {"x": torch.ones(3)}})
    part = run.path / "checkpoints" / "parts" / "b2.safetensors"
    content = bytearray(part.read_bytes())
    content[-2] ^= 4
    part.write_bytes(content)
    with pytest.warns(UserWarning, match=r"b2\.safetensors does not match its digest"):
        assert run.latest_checkpoint()[0] == 1
    with pytest.warns(UserWarning, match="cannot be read"):
        assert run.latest_checkpoint()[0] == 1
    run.write_checkpoint(2, {}, {}, {"b1": {"x": torch.ones(3)}, "b2": {"x": torch.ones(3)}})
    assert run.latest_checkpoint()[0] == 2


def test_parts_of_an_abandoned_course_go(run):
    for server_round, parts in ((10, ["a"]), (20, ["a", "b"]), (15, ["a", "c"]), (16, ["a", "c"]), (17, ["a", "c"])):
        run.write_checkpoint(server_round, {}, {}, {name: {"x": torch.ones(1)} for name in parts})
        if server_round == 15:
            assert names_in(run.path / "checkpoints" / "parts") == ["a.safetensors", "c.safetensors"]
    assert run.latest_checkpoint().server_round == 17
    assert list(run.latest_checkpoint().parts) == ["a", "c"]


def test_curves_are_drawn_into_the_run(run):
    run.append_round({"round": 0, "accuracy": 0.1})
    run.append_round({"round": 1, "accuracy": 0.2, "bytes_up": 10, "bytes_down": 20})
    assert run.draw_curves(full_model_bytes_per_round=200) == run.path / "curves.png"
    by_parameter = (run.path / "curves.png").read_bytes()
    assert by_parameter.startswith(b"\x89PNG")
    run.write_summary({**SUMMARY, "algorithm": "", "fedavg_bytes": 200})
    run.draw_curves()
    assert (run.path / "curves.png").read_bytes() == by_parameter
