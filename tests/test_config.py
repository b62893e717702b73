import tomllib
from pathlib import Path

import pytest

from fedloru_flwr.config import ConfigError, RunConfig, parse_overrides, read_config_file
from fedloru_flwr.engines.app_dir import app_table
from fedloru_flwr.registry import ALGORITHMS


def test_defaults_are_valid_and_survive_a_round_trip():
    config = RunConfig()
    assert RunConfig.from_mapping(config.as_mapping()) == config
    assert RunConfig.from_mapping({}) == config
    assert config.as_mapping()["local-epochs"] == config.local_epochs


def test_the_pyproject_declares_the_app_that_the_package_runs():
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    declared = pyproject["tool"]["flwr"]["app"]
    declared.pop("fab-include")
    assert declared == app_table()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algoritm": "fedlora"}, "unknown setting 'algoritm'; did you mean 'algorithm'?"),
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate'; did you mean 'learning-rate'?"),
        (
            {"algorithm": "fedlor"},
            f"algorithm = 'fedlor' is not one of {', '.join(ALGORITHMS)}; did you mean 'fedloru'?",
        ),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rank": 2.5}, "rank = 2.5 must be a whole number"),
        ({"rank": True}, "rank = True must be a whole number"),
        ({"rank": "4"}, "rank = '4' must be a whole number"),
        ({"alpha": 0}, "alpha = 0.0 must be above 0"),
        ({"alpha": float("nan")}, "alpha = nan must be above 0"),
        ({"learning-rate": float("inf")}, "learning-rate = inf must be above 0"),
        ({"accumulate-every": -1}, "accumulate-every = -1 must be at least 0"),
        ({"accumulate-at": "5,x"}, "accumulate-at = '5,x' must be whole numbers separated by commas"),
        ({"accumulate-at": "0,5"}, "accumulate-at = '0,5': every number must be at least 1"),
        ({"accumulate-at": "5,500"}, "lists round 500, but the run has num-server-rounds = 40"),
        ({"fraction-train": 0}, "fraction-train = 0.0 must be above 0 and at most 1"),
        ({"fraction-train": 1.5}, "fraction-train = 1.5 must be above 0 and at most 1"),
        ({"fraction-evaluate": -0.1}, "fraction-evaluate = -0.1 must be at least 0 and at most 1"),
        ({"learning-rate-restart": "yes"}, "learning-rate-restart = 'yes' must be true or false"),
        ({"dataset": "clients"}, "give input-shape and num-classes"),
        ({"min-partition-size": 1}, "min-partition-size = 1 must be at least 2"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_mapping(settings)
    assert message in str(refusal.value)


def test_whole_numbers_stand_for_numbers_and_numbers_for_text():
    config = RunConfig.from_mapping({"alpha": 4, "accumulate-at": 20, "hidden": 64})
    assert config.alpha == 4.0
    assert config.accumulation_rounds == (20,)
    assert config.hidden_widths == (64,)


def test_overrides_are_read_as_toml_or_as_text():
    assert parse_overrides("rank=8 learning-rate=0.05 run-name=first model=\"mlp\" hidden='32,32' a=true") == {
        "rank": 8,
        "learning-rate": 0.05,
        "run-name": "first",
        "model": "mlp",
        "hidden": "32,32",
        "a": True,
    }
    assert parse_overrides("data-path='/a b/c.csv'") == {"data-path": "/a b/c.csv"}


@pytest.mark.parametrize("text", ["rank", "=3", 'run-name="a'])
def test_an_override_that_is_no_pair_is_refused(text):
    with pytest.raises(ConfigError, match="-c"):
        parse_overrides(text)


def test_a_configuration_file_is_flat_toml(tmp_path):
    path = tmp_path / "conf.toml"
    path.write_text("rank = 8\nmodel = 'mlp'\n")
    assert read_config_file(path) == {"rank": 8, "model": "mlp"}
    path.write_text("[fedloru]\nrank = 8\n")
    with pytest.raises(ConfigError, match="'fedloru' must be a plain value, got a dict"):
        read_config_file(path)
    path.write_text("rank = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_config_file(path)
    with pytest.raises(ConfigError, match="there is no configuration file"):
        read_config_file(tmp_path / "missing.toml")
