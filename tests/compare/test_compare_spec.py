"""What a comparison's CONF.toml may say, and what is said of one that makes no sense."""

import re
import tomllib
from pathlib import Path

import pytest

from fedloru_flwr.compare.spec import BelowBest, describe, parse_spec, read_spec
from fedloru_flwr.config import ConfigError

GOOD = """
title = "Two methods"
seeds = [0, 1]
target-accuracy = 0.9
budgets-mb = [5, 1]
reference = "fedavg"
[settings]
num-server-rounds = 60
[vary]
num-clients = [20, 100]
fraction-train = [0.5, 1]
[methods.fedloru]
algorithm = "fedloru"
label = "FedLoRU, rank 4"
[methods.fedloru.grid]
learning-rate = [1, 2]
[methods.fedavg]
algorithm = "fedavg"
[tuning]
seeds = [100]
settings = { num-server-rounds = 6 }
per = ["num-clients"]
"""


def read(tmp_path, text):
    path = tmp_path / "conf.toml"
    path.write_text(text)
    return read_spec(path)


def test_a_whole_file_is_understood(tmp_path):
    spec = read(tmp_path, GOOD)
    assert (spec.name, spec.title, spec.seeds, spec.targets, spec.budgets_mb) == (
        "conf",
        "Two methods",
        (0, 1),
        (0.9,),
        (1.0, 5.0),
    )
    assert spec.combinations() == [
        {"num-clients": 20, "fraction-train": 0.5},
        {"num-clients": 20, "fraction-train": 1.0},
        {"num-clients": 100, "fraction-train": 0.5},
        {"num-clients": 100, "fraction-train": 1.0},
    ]
    fedloru, fedavg = spec.methods
    assert (fedloru.label, fedavg.label, spec.reference) == ("FedLoRU, rank 4", "fedavg", "fedavg")
    assert fedloru.grid == {"learning-rate": (1.0, 2.0)}
    assert isinstance(fedloru.grid["learning-rate"][0], float)
    assert (spec.tuning.seeds, spec.tuning.by, spec.tuning.widen) == ((100,), "final_accuracy", True)
    assert spec.tuning.per == ("num-clients",)


def test_settings_of_a_run_are_resolved_in_order(tmp_path):
    spec = read(tmp_path, GOOD)
    at, choice = {"num-clients": 20, "fraction-train": 1.0}, {"learning-rate": 2.0}
    final = spec.resolved(spec.methods[0], at, choice, 1)
    tuned = spec.resolved(spec.methods[0], at, choice, 100, tuning=True)
    assert (final["num-server-rounds"], final["learning-rate"], final["num-clients"], final["seed"]) == (60, 2.0, 20, 1)
    assert (tuned["num-server-rounds"], tuned["seed"]) == (6, 100)
    assert final["algorithm"] == "fedloru"
    spec = parse_spec({"settings": {"rank": 2}, "methods": {"a": {"rank": 3}, "b": {}}}, "name", "conf.toml")
    assert [spec.resolved(method, {}, {}, 0)["rank"] for method in spec.methods] == [3, 2]


def test_what_is_left_out_has_defaults():
    spec = parse_spec({"methods": {"a": {}}, "seeds": [7, 8]}, "name", "conf.toml")
    assert (spec.title, spec.targets, spec.budgets_mb, spec.reference) == ("name", (), None, "a")
    assert spec.combinations() == [{}]
    assert spec.tuning.seeds == (7,)
    assert parse_spec({"methods": {"a": {}}}, "name", "conf.toml").seeds == (0,)


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


FAULTS = {
    "unknown top key": (changed("title", "titel"), "unknown key 'titel'; did you mean 'title'?"),
    "unknown setting": (changed("num-server-rounds = 60", "num-rounds = 6"), "[settings] unknown key 'num-rounds'"),
    "unknown setting of a method": (
        changed('algorithm = "fedavg"', "lerning-rate = 0.1"),
        "[methods.fedavg] unknown key 'lerning-rate'; did you mean 'learning-rate'?",
    ),
    "unknown axis": (changed("num-clients = [20", "num-client = [20"), "[vary] unknown key 'num-client'"),
    "unknown in a grid": (changed("learning-rate = [1", "rnk = [1"), "[methods.fedloru.grid] unknown key 'rnk'"),
    "unknown in tuning": (changed("per =", "pro ="), "[tuning] unknown key 'pro'; did you mean 'per'?"),
    "seed in settings": (changed("num-server-rounds = 60", "seed = 1"), "[settings] seed = 1 cannot be set here"),
    "seed of a method": (changed('algorithm = "fedavg"', "seed = 1"), "[methods.fedavg] seed = 1 cannot be set here"),
    "run name": (changed("num-server-rounds = 60", 'run-name = "x"'), "run-name = 'x' cannot be set here"),
    "both varied and of a method": (
        changed('algorithm = "fedavg"', "num-clients = 5"),
        "[methods.fedavg] num-clients = 5 stands in [vary] too",
    ),
    "both varied and in the settings": (
        changed("num-server-rounds = 60", "num-clients = 5"),
        "[settings] num-clients = 5 stands in [vary] too",
    ),
    "both in a grid and of the method": (
        changed('label = "FedLoRU, rank 4"', "learning-rate = 0.1"),
        "[methods.fedloru.grid] learning-rate = [1.0, 2.0] stands in [methods.fedloru] too",
    ),
    "both in a grid and of tuning": (
        changed("{ num-server-rounds = 6 }", "{ learning-rate = 0.1 }"),
        "[tuning.settings] learning-rate = 0.1 stands in [methods.fedloru.grid] too",
    ),
    "both an axis to choose for and of tuning": (
        changed("{ num-server-rounds = 6 }", "{ num-clients = 5 }"),
        "[tuning.settings] num-clients = 5 stands in [tuning.per] too",
    ),
    "no method": ("seeds = [0]\n", "there is no method"),
    "value of a method": (changed('algorithm = "fedavg"', "rank = 0"), "[methods.fedavg] rank = 0 must be at least 1"),
    "value on an axis": (
        changed("fraction-train = [0.5, 1]", "fraction-train = [0.5, 2]"),
        "[vary] fraction-train = 2",
    ),
    "value in a grid": (
        changed("learning-rate = [1, 2]", "learning-rate = [1, 0]"),
        "learning-rate = 0.0 must be above",
    ),
    "value of tuning": (
        changed("num-server-rounds = 6 }", "num-server-rounds = 0 }"),
        "[tuning.settings] num-server-r",
    ),
    "algorithm": (changed('"fedavg"\n[tun', '"fedavgg"\n[tun'), "did you mean 'fedavg'?"),
    "an empty axis": (changed("[20, 100]", "[]"), "[vary] num-clients = [] must be a list of values"),
    "an axis that is no list": (changed("[20, 100]", "20"), "num-clients = 20 must be a list of values, such as [20]"),
    "a value twice": (changed("[20, 100]", "[20, 20]"), "lists a value twice"),
    "a list as a setting": (changed("num-server-rounds = 60", "rank = [4]"), "rank = [4] must be a plain value"),
    "seeds": (changed("seeds = [0, 1]", "seeds = 3"), "seeds = 3 must be a list of whole numbers"),
    "seeds twice": (changed("seeds = [0, 1]", "seeds = [1, 1]"), "lists a seed twice"),
    "target": (
        changed("target-accuracy = 0.9", "target-accuracy = 90"),
        "target-accuracy = [90] must be numbers above 0",
    ),
    "target of nobody": (
        changed("target-accuracy = 0.9", 'target-accuracy = { best-of = "fedavgg", minus = 0.01 }'),
        "[target-accuracy] best-of = 'fedavgg' is not a method: fedloru, fedavg; did you mean 'fedavg'?",
    ),
    "target of a list": (
        changed("target-accuracy = 0.9", 'target-accuracy = { best-of = ["fedavg"] }'),
        "[target-accuracy] best-of = ['fedavg'] is not a method",
    ),
    "target without a method": (
        changed("target-accuracy = 0.9", "target-accuracy = [0.9, { minus = 0.01 }]"),
        "[target-accuracy] best-of = None is not a method",
    ),
    "target too far below": (
        changed("target-accuracy = 0.9", 'target-accuracy = [{ best-of = "fedavg", minus = 1 }]'),
        "[target-accuracy] minus = 1 must be a number of at least 0 and below 1",
    ),
    "target with more": (
        changed("target-accuracy = 0.9", 'target-accuracy = { best-of = "fedavg", points = 1 }'),
        "[target-accuracy] unknown key 'points'",
    ),
    "target of a run": (
        changed("num-server-rounds = 60", "target-accuracy = 0.5"),
        "[settings] target-accuracy = 0.5 cannot be set here: runs go to their end",
    ),
    "budgets": (changed("budgets-mb = [5, 1]", "budgets-mb = [0]"), "budgets-mb = [0] must be numbers above 0"),
    "reference": (changed('reference = "fedavg"', 'reference = "fedavgg"'), "reference = 'fedavgg' is not a method"),
    "by": (changed("seeds = [100]", 'by = "accuracy"'), "[tuning] by = 'accuracy' is not one of final_accuracy"),
    "per": (changed('per = ["num-clients"]', 'per = ["rank"]'), "per names 'rank', which is no axis"),
    "labels": (changed('"FedLoRU, rank 4"', '"fedavg"'), "2 methods have the label 'fedavg'"),
    "clients only": (
        changed("num-server-rounds = 60", 'dataset = "clients"\ninput-shape = "2"\nnum-classes = 2'),
        "dataset = 'clients' is for a deployment",
    ),
    "no toml": ("seeds = [", "is not TOML"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_told_with_file_table_key_and_value(case, tmp_path):
    text, message = FAULTS[case]
    with pytest.raises(ConfigError) as fault:
        read(tmp_path, text)
    assert message in str(fault.value)
    assert str(tmp_path / "conf.toml") in str(fault.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        read_spec(tmp_path / "none.toml")


def test_bytes_to_a_target_need_a_target():
    content = {"methods": {"a": {}}, "tuning": {"by": "bytes_up_to_target"}}
    with pytest.raises(ConfigError, match="needs target-accuracy"):
        parse_spec(content, "name", "conf.toml")


def test_bytes_to_a_target_cannot_be_tuned_for_one_that_the_results_set():
    content = {"methods": {"a": {}}, "tuning": {"by": "bytes_up_to_target"}, "target-accuracy": {"best-of": "a"}}
    with pytest.raises(ConfigError, match="needs target-accuracy to have a number: a target below a method's best is"):
        parse_spec(content, "name", "conf.toml")


def test_targets_may_be_numbers_and_below_a_methods_best():
    below = {"best-of": "a", "minus": 0.01}
    content = {"methods": {"a": {}}, "target-accuracy": [0.9, below, 0.5, {"best-of": "a"}, below]}
    spec = parse_spec(content, "name", "conf.toml")
    assert spec.targets == (0.5, 0.9)
    assert spec.below_best == (BelowBest("a", 0.01), BelowBest("a", 0.0))
    assert parse_spec({**content, "target-accuracy": below}, "name", "conf.toml").below_best == (BelowBest("a", 0.01),)


def test_values_are_shown_as_in_toml():
    assert describe({"num-clients": 20, "widen": True, "rank": 4}) == "num-clients = 20, widen = true, rank = 4"


def test_the_example_of_the_documentation_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    spec = parse_spec(tomllib.loads(block), "compare", "docs/compare.md")
    assert [method.name for method in spec.methods] == ["fedavg", "fedlora", "fedloru"]
    for key in ("title", "seeds", "target-accuracy", "budgets-mb", "reference", "tuning.widen", "tuning.per"):
        assert f"| `{key}` |" in page
