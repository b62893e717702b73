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
from fedloru_flwr.runs.tracking import (
    Known,
    MlflowTracker,
    TensorBoardTracker,
    TrackedRun,
    Tracker,
    TrackerError,
    Tracking,
    WandbTracker,
    make_trackers,
    scalars_of,
)

__all__ = [
    "ROUND_DEFAULTS",
    "SUMMARY_KEYS",
    "Checkpoint",
    "Known",
    "MlflowTracker",
    "OutputError",
    "RoundProgress",
    "RunDirectory",
    "RunExistsError",
    "TensorBoardTracker",
    "TrackedRun",
    "Tracker",
    "TrackerError",
    "Tracking",
    "WandbTracker",
    "closing_table",
    "draw_curves",
    "make_trackers",
    "round_line",
    "scalars_of",
    "versions",
]
