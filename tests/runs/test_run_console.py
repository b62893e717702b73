import io

import pytest
from rich.console import Console

from fedloru_flwr.runs import ROUND_DEFAULTS, RoundProgress, closing_table, round_line
from fedloru_flwr.runs.units import format_bytes, format_duration, format_ratio


def row(server_round, **given):
    numbers = {
        "accuracy": 0.912,
        "loss": 0.3014,
        "bytes_up": 660_000,
        "bytes_down": 1_710_000,
        "clients_ok": 50,
    }
    return {**ROUND_DEFAULTS, "round": server_round, **numbers, **given}


SUMMARY = {
    "algorithm": "fedloru",
    "rounds": 60,
    "final_accuracy": 0.912,
    "best_accuracy": 0.9151,
    "total_bytes_up": 40_000_000,
    "total_bytes_down": 60_000_000,
    "full_model_bytes": 300_000,
    "fedavg_bytes": 1_800_000_000,
    "trainable_parameters": 4_120,
    "model_parameters": 74_000,
    "seconds": 192.4,
    "status": "finished",
}


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234, "1.23 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (660_000, "660 kB"),
        (12_345_678, "12.3 MB"),
        (1.08e9, "1.08 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes_have_three_digits_in_si_units(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (40.6, "0:41"), (59.7, "1:00"), (725, "12:05"), (3723, "1:02:03")]
)
def test_times_are_minutes_and_seconds(seconds, text):
    assert format_duration(seconds) == text


def test_ratios_have_three_digits():
    assert [format_ratio(ratio) for ratio in (1, 18.24, 99.97, 1234)] == ["1.00x", "18.2x", "100x", "1234x"]


def test_a_round_is_a_line():
    assert round_line(row(12), 60, 10.25) == (
        "round 12/60  accuracy 0.912  loss  0.301  up  660 kB  down 1.71 MB    50 clients  ETA 0:41"
    )


def test_an_accumulation_and_failures_are_marked():
    grown = row(3, ledger_version=3, accumulated_rank=12, clients_failed=2, clients_ok=1)
    assert round_line(grown, 4, 30, previous=row(2, ledger_version=2)) == (
        "round 3/4  accuracy 0.912  loss  0.301  up  660 kB  down 1.71 MB     1 client   ETA 0:10"
        "  accumulated: ledger 3, rank 12  2 failed"
    )
    assert "ledger" not in round_line(grown, 4, 30, previous=row(2, ledger_version=3))


def test_the_columns_stay_in_their_places():
    lines = [
        round_line(row(1, accuracy=None, loss=None, bytes_up=0, bytes_down=7), 100, 1),
        round_line(row(100, accuracy=1.0, loss=12.5, bytes_up=9_996, clients_ok=1), 100, 1),
        round_line(row(99, loss=-123456.0, bytes_up=999_999_999, clients_ok=1000), 100, 1),
    ]
    for word in ("accuracy", "loss", "up", "down", "client", "ETA"):
        assert len({line.index(word) for line in lines}) == 1, lines


def test_the_evaluation_before_training_is_a_short_line():
    line = round_line({"round": 0, "accuracy": 0.1, "loss": 2.3}, 60, 0.5)
    assert line == "round  0/60  accuracy 0.100  loss  2.300  before training"


def test_the_time_left_counts_the_rounds_of_this_process():
    assert round_line(row(50), 60, 100, first_round=40).endswith("ETA 1:40")
    assert round_line(row(60), 60, 100).endswith("ETA 0:00")


def text_of(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_the_closing_table_compares_with_fedavg():
    lines = text_of(closing_table(SUMMARY))
    assert lines[0].strip() == "fedloru: 60 rounds, finished"
    cells = {" ".join(line.split()) for line in lines}
    assert {
        "this run full-rank FedAvg saving",
        "sent up 40.0 MB 900 MB 22.5x",
        "sent down 60.0 MB 900 MB 15.0x",
        "sent in all 100 MB 1.80 GB 18.0x",
        "trainable parameters 4,120 74,000 18.0x",
        "final accuracy 0.912",
        "best accuracy 0.915",
        "time 3:12",
    } <= cells


def test_a_run_without_results_has_a_table_too():
    nothing = {"final_accuracy": None, "best_accuracy": None, "total_bytes_up": 0, "total_bytes_down": 0}
    cells = {" ".join(line.split()) for line in text_of(closing_table({**SUMMARY, **nothing}))}
    assert {"sent in all 0 B 1.80 GB -", "final accuracy -"} <= cells


def drive(console, **options):
    times = iter(range(1000))
    with RoundProgress(console, num_rounds=2, clock=lambda: next(times), **options) as progress:
        progress.end_round({"round": 0, "accuracy": 0.1, "loss": 2.3})
        for server_round in (1, 2):
            progress.start_round(server_round, num_clients=2)
            progress.client_done()
            progress.client_done()
            progress.end_round(row(server_round, ledger_version=1, accumulated_rank=4))
    return console.file.getvalue()


def test_without_a_terminal_there_are_only_the_lines():
    written = drive(Console(file=io.StringIO(), width=20))
    lines = written.splitlines()
    assert [line[:9] for line in lines] == ["round 0/2", "round 1/2", "round 2/2"]
    assert lines[1].endswith("accumulated: ledger 1, rank 4")
    assert "ledger" not in lines[2]
    assert written.replace("\n", "").isprintable()


def test_on_a_terminal_the_lines_stand_above_a_bar():
    written = drive(Console(file=io.StringIO(), width=150, force_terminal=True, legacy_windows=False))
    for text in ("round 1/2  accuracy 0.912", "rounds", "left"):
        assert text in written


def test_a_resumed_run_goes_on_from_its_row():
    times = iter([0.0, 0.0, 10.0, 10.0])
    console = Console(file=io.StringIO(), width=200)
    resumed_from = row(8, ledger_version=2)
    with RoundProgress(console, 10, resumed_from=resumed_from, clock=lambda: next(times)) as progress:
        progress.start_round(9, num_clients=1)
        progress.end_round(row(9, ledger_version=2))
    assert console.file.getvalue().endswith("ETA 0:10\n")


def test_an_error_closes_the_bar():
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), RoundProgress(console, 2) as progress:
        raise RuntimeError
    assert not progress._progress.live.is_started
