"""Methods with and without personal models, tuned by the same measure."""

import pytest

from fedloru_flwr.compare.measures import score
from fedloru_flwr.compare.records import Record


def record(clients):
    row = {"round": 1, "accuracy": 0.9, "bytes_up": 10, "bytes_down": 20, "clients": clients}
    row["bytes_by_purpose"] = {"evaluation": {"up": 4, "down": 5}}
    return Record.of_rows({}, [row])


def spread(mean):
    return {"mean": mean, "std": 0.1, "worst_decile": 0.0}


def test_a_method_without_personal_models_is_judged_by_its_clients():
    assert score([[record({"accuracy": spread(0.4)})]], "personal_accuracy", None) == (0.4,)
    both = {"accuracy": spread(0.4), "personal-accuracy": spread(0.7)}
    assert score([[record(both)]], "personal_accuracy", None) == (0.7,)
    assert score([[record({})]], "personal_accuracy", None) is None


def test_what_an_evaluation_moves_is_not_charged():
    assert (record({}).up, record({}).down) == ([6], [15])


@pytest.mark.parametrize("by", ["final_accuracy", "best_accuracy"])
def test_other_measures_are_of_the_global_model(by):
    assert score([[record({"accuracy": spread(0.4)})]], by, None) == (0.9,)
