"""A run on disk, in pictures and on the terminal."""

from fedloru_flwr.runs.checkpoints import Checkpoint
from fedloru_flwr.runs.console import RoundProgress, closing_table, round_line
from fedloru_flwr.runs.curves import draw_curves
from fedloru_flwr.runs.directory import (
    ROUND_DEFAULTS,
    SUMMARY_KEYS,
    OutputError,
    RunDirectory,
    RunExistsError,
    versions,
)

__all__ = [
    "ROUND_DEFAULTS",
    "SUMMARY_KEYS",
    "Checkpoint",
    "OutputError",
    "RoundProgress",
    "RunDirectory",
    "RunExistsError",
    "closing_table",
    "draw_curves",
    "round_line",
    "versions",
]
