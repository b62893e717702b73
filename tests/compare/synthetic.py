"""Runs that never took place, with numbers chosen by hand."""

from fedloru_flwr.compare.records import Record
from fedloru_flwr.compare.results import Results, Row
from fedloru_flwr.config import RunConfig


def rows(accuracies, up, down=0, personal=None, errors=None):
    """Rows of a metrics.jsonl: round 0 sends nothing, every other one ``up`` and ``down`` bytes."""
    found = []
    for number, accuracy in enumerate(accuracies):
        row = {
            "round": number,
            "accuracy": accuracy,
            "bytes_up": up if number else 0,
            "bytes_down": down if number else 0,
            "seconds": 1.5,
        }
        if number and personal is not None:
            row["clients"] = {
                "accuracy": {"mean": accuracy, "std": 0.1, "worst_decile": 0.25},
                "personal-accuracy": {"mean": personal[number], "std": 0.05, "worst_decile": 0.5},
            }
        if number and errors is not None:
            row["aggregation_error"] = errors[number]
        found.append(row)
    return found


def record(accuracies, up=1_000_000, down=0, personal=None, errors=None, **settings):
    keys = {key.replace("_", "-"): value for key, value in settings.items()}
    full = RunConfig.from_mapping({"num-server-rounds": max(len(accuracies) - 1, 1), "num-clients": 10, **keys})
    return Record.of_rows(full.as_mapping(), rows(accuracies, up, down, personal, errors))


def results(by_method, *, axes=None, at=None, targets=(0.5,), budgets=None, reference=None, **more):
    """Results of methods at one place, from their runs by seed."""
    return Results(
        title=more.pop("title", "Synthetic"),
        origins=[{"directory": "/data/synthetic", "command": "fedloru compare synthetic.toml", "conf": "seeds = [0]"}],
        seeds=sorted({seed for runs in by_method.values() for seed in runs}),
        targets=list(targets),
        budgets_mb=budgets,
        reference=reference or next(iter(by_method)),
        axes=axes or {},
        labels={name: name for name in by_method},
        rows=[Row(name, at or {}, {}, runs) for name, runs in by_method.items()],
        **more,
    )
