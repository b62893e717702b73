"""An analysis's CONF: what it says, and what is refused with file, table, key and remedy."""

import pytest

from fedloru_flwr.config import ConfigError
from fedloru_flwr.rank.spec import parse_rank_spec

GOOD = {
    "seeds": [0, 1],
    "measure": {"rounds": [0, 4], "points": [50, 500], "clients": 4},
    "settings": {"num-clients": 8, "num-server-rounds": 4},
    "trainings": {
        "central": {"algorithm": "fedavg", "num-clients": 1},
        "fedloru": {"label": "FedLoRU", "accumulate-every": 2},
    },
}


def test_trainings_take_the_common_settings_and_clients_are_those_of_the_common_ones():
    spec = parse_rank_spec(GOOD, "some", "some.toml")
    central, fedloru = spec.trainings
    assert (central.label, fedloru.label) == ("central", "FedLoRU")
    assert spec.resolved(central, 1)["num-clients"] == 1
    assert spec.resolved(central, 1)["seed"] == 1
    assert spec.resolved(fedloru, 0)["accumulate-every"] == 2
    assert spec.clients(0)["num-clients"] == 8
    assert spec.measure.points == (50, 500)
    assert spec.measure.spaces == ("full", "adapter")
    assert parse_rank_spec(changed("measure", max_bytes=123), "some", "some.toml").measure.max_bytes == 123


def test_a_flat_conf_is_an_analysis_of_its_run():
    spec = parse_rank_spec({"num-server-rounds": 25, "seed": 3, "rank": 2, "output-dir": "x"}, "flat", "flat.toml")
    assert spec.seeds == (3,)
    assert spec.measure.rounds == (0, 3, 6, 9, 12, 15, 18, 21, 24, 25)
    assert [training.name for training in spec.trainings] == ["fedloru"]
    assert spec.resolved(spec.trainings[0], 3)["rank"] == 2


def changed(table, **values):
    return {**GOOD, table: {**GOOD[table], **{key.replace("_", "-"): value for key, value in values.items()}}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({**GOOD, "trainings": {}}, "there is no training"),
        ({**GOOD, "measures": {}}, "unknown key 'measures'; did you mean 'measure'"),
        ({**GOOD, "seeds": [0, 0]}, "lists a number twice"),
        ({**GOOD, "measure": {"points": [5, 50]}}, "rounds is missing"),
        (changed("measure", rounds=[0, 5]), "rounds lists 5, but the training has num-server-rounds = 4"),
        (changed("measure", points=[50]), "must list two sample sizes"),
        (changed("measure", draws=11), "11 disjoint samples of 50 points do not go into 500"),
        (changed("measure", clients=9), "clients = 9, but .settings. has num-clients = 8"),
        (changed("measure", clients=1), "nobody to compare with"),
        (changed("measure", spaces=["half"]), "must list some of full, adapter"),
        (changed("measure", tolerance=2), "between 0 and 1"),
        (changed("measure", layers=1), "true or false"),
        (changed("measure", max_bytes=0), "max-bytes = 0 must be a whole number from 1 on"),
        (changed("settings", seed=1), "the analysis chooses it"),
        (changed("settings", rnak=1), "unknown key 'rnak'; did you mean 'rank'"),
        (changed("settings", dataset="clients", input_shape="1,8,8", num_classes=10), "needs the data here"),
        (changed("settings", max_total_bytes=9), "would end the training before all is measured"),
        (changed("settings", target_accuracy=0.9), "target-accuracy = 0.9 would end the training before"),
        (changed("settings", init_adapter="none/there"), "is no directory"),
        (changed("trainings", own={"label": "FedLoRU "}), "two trainings have the label 'FedLoRU': give each one"),
        (changed("trainings", FedLoRU={}), "two trainings have the label 'FedLoRU'"),
        (changed("trainings", own={"label": "fedloru"}), "'FedLoRU' and 'fedloru' give their pictures one file name"),
        (changed("trainings", a={"label": "tau = 5"}, b={"label": "Tau 5"}), "one file name, 'tau-5': let them differ"),
        (changed("trainings", own={"algorithm": "fedsa-lora"}), "has no global model"),
        (changed("trainings", own={"algorithm": "fedavg", "accumulate-every": 3}), "means nothing to"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(content, told):
    with pytest.raises(ConfigError, match=f"some.toml: .*{told}"):
        parse_rank_spec(content, "some", "some.toml")
