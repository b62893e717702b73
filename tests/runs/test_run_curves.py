import subprocess
import sys

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedloru_flwr.runs import ROUND_DEFAULTS, curves, draw_curves


def row(server_round, accuracy, num_bytes=0, ledger_version=0, loss=None):
    given = {
        "round": server_round,
        "accuracy": accuracy,
        "loss": loss,
        "bytes_up": num_bytes,
        "bytes_down": num_bytes,
        "ledger_version": ledger_version,
    }
    return {**ROUND_DEFAULTS, **given}


ROWS = [row(0, 0.1), row(1, 0.4, 500_000), row(2, None, 500_000, 1), row(3, 0.8, 1_000_000, 1)]


def test_a_curve_is_accuracy_by_round_and_by_what_was_sent():
    curve = curves._curve(0, "a", ROWS, "accuracy")
    assert curve.rounds == [0, 1, 3]
    assert curve.megabytes == [0, 1, 4]
    assert curve.values == [0.1, 0.4, 0.8]
    assert (curve.tick_rounds, curve.tick_megabytes) == ([2], [2])


@pytest.mark.parametrize(
    "runs",
    [
        ROWS,
        [],
        [row(0, 0.1)],
        [row(0, None, loss=2.3), row(1, None, 10, loss=1.0)],
        {"FedLoRU": ROWS, "FedAvg": [row(0, 0.1), row(1, 0.5, 9_000_000)], "not begun": []},
        {str(number): ROWS for number in range(9)},
    ],
    ids=["one", "none", "only the start", "loss", "several", "more than the palette"],
)
def test_a_picture_of_two_panels_is_drawn(tmp_path, runs):
    draw_curves(runs, "title", tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape == (675, 1650, 4)


@pytest.mark.parametrize(("fedavg_bytes", "scale"), [(None, "linear"), (5e6, "linear"), (80e6, "log")])
def test_the_bytes_are_on_a_log_scale_only_if_the_totals_differ_much(fedavg_bytes, scale):
    axes = Figure().subplots()
    curves._scale_bytes(axes, [curves._curve(0, "", ROWS, "accuracy")], fedavg_bytes)
    assert axes.get_xscale() == scale


def test_the_same_rows_give_the_same_picture(tmp_path):
    for name in ("1.png", "2.png"):
        draw_curves(ROWS, "title", tmp_path / name, fedavg_bytes=80e6)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_nothing_of_the_users_matplotlib_is_touched(tmp_path):
    settings = dict(matplotlib.rcParams)
    draw_curves(ROWS, "title", tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == settings
    code = (
        "import sys, fedloru_flwr.runs as runs; assert 'matplotlib' not in sys.modules;"
        "runs.draw_curves([], '', sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "empty.png")], check=True)
