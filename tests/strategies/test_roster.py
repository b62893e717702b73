"""Who is there, under which name, and who is drawn."""

import random
from types import SimpleNamespace

import pytest
from toy_federation import (
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    federate,
    own_instances,
    own_machines,
    same,
    seeded,
    timeless,
    usual,
)

from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedLoRU, RosterError, roster
from fedloru_flwr.strategies.roster import Roster, participants

NET = seeded(Mlp)


def make(**more):
    arguments = {"rank": 1, "target_modules": "hidden", "accumulate_every": 2, **usual(), **more}
    return FedLoRU(NET, **arguments)


class SlowGrid:
    """Its nodes appear one by one, one at each look."""

    def __init__(self, *counts):
        self.counts = list(counts)

    def get_node_ids(self):
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return range(count)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(roster, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(roster, "_SETTLE_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("total", "fraction", "at_least", "expected"),
    [
        (100, 0.29, 1, 29),
        (100, 0.57, 1, 57),
        (10, 0.3, 1, 3),
        (10, 0.39, 1, 3),
        (3, 0.5, 1, 1),
        (100, 0.001, 1, 1),
        (100, 0.001, 5, 5),
        (4, 0.5, 9, 4),
        (100, 1.0, 2, 100),
        (100, 0.0, 2, 0),
        (0, 0.5, 2, 0),
    ],
)
def test_the_number_of_participants_is_the_floor_of_the_fraction(total, fraction, at_least, expected):
    assert participants(total, fraction, at_least) == expected


def test_waiting_lasts_until_all_expected_nodes_are_there(quick):
    grid = SlowGrid(0, 1, 2, 2, 2, 2, 3, 7)
    Roster().wait(grid, 3, 1, timeout=60)
    assert grid.counts == [7], "it went on as soon as the third was there"


def test_without_a_number_waiting_lasts_until_no_more_are_coming(quick):
    grid = SlowGrid(0, 0, 1, 2, 3, 4, 5)
    Roster().wait(grid, None, 2, timeout=60)
    assert grid.counts == [5]


def test_without_a_number_too_few_nodes_are_waited_for(quick):
    with pytest.raises(RosterError, match="1 of 2 SuperNodes are connected after 0 s"):
        Roster().wait(SlowGrid(0, 1), None, 2, timeout=0.1)


def test_nodes_that_do_not_come_are_an_error_that_says_what_to_do(quick):
    with pytest.raises(RosterError, match=r"2 of 4 SuperNodes are connected.*set num-clients to the number"):
        Roster().wait(SlowGrid(1, 2), 4, 1, timeout=0.05)


def test_nodes_that_come_and_go_without_pause_do_not_keep_a_run_from_starting(quick):
    class Restless:
        count = 5

        def get_node_ids(self):
            self.count = 11 - self.count
            return range(self.count)

    Roster().wait(Restless(), None, 2, timeout=0.1)


def test_a_run_starts_when_its_clients_have_come(monkeypatch):
    monkeypatch.setattr(roster, "_POLL_SECONDS", 0.001)
    looked = []

    class Late(WatchedGrid):
        def get_node_ids(self):
            looked.append(None)
            return super().get_node_ids()[: len(looked)]

        def get_nodes(self):
            return super().get_nodes()[: len(looked)]

    grid = Late(client_app(NET), 4)
    federate(make(), grid, 1)
    assert grid.watch.drawn == [4]


def node(node_id, registered_at):
    return SimpleNamespace(node_id=node_id, registered_at=registered_at)


def listing(*nodes):
    return SimpleNamespace(get_nodes=lambda: list(nodes))


def met(*names, ids=None):
    """A roster of confirmed clients."""
    ids = ids or range(100, 100 + len(names))
    known = Roster()
    known.refresh(listing(*[node(node_id, str(i)) for i, node_id in enumerate(ids)]))
    for node_id, name in zip(ids, names, strict=True):
        known.confirm(node_id, name)
    return known


def test_nodes_go_by_the_order_of_their_registration_until_they_say_who_they_are():
    known = Roster()
    assert known.refresh(listing(node(7, "b"), node(9, "a"), node(8, "c"))) == [9, 7, 8]
    assert [known.client(node_id) for node_id in (9, 7, 8)] == ["0", "1", "2"]
    assert known.refresh(listing(node(7, "b"), node(9, "a"), node(8, "c"))) == []
    known.confirm(8, "0")
    assert [known.client(node_id) for node_id in (9, 7, 8)] == ["node-9", "1", "0"]


def test_draws_depend_on_logical_clients_only():
    names = [f"c{i}" for i in range(20)]
    shuffled = list(range(500, 520))
    random.Random(4).shuffle(shuffled)
    one = met(*names).draw(3, "train", 7, 0.3, 1)
    other = met(*names, ids=shuffled).draw(3, "train", 7, 0.3, 1)
    assert [client for client, _ in one] == [client for client, _ in other]
    assert len(one) == 6
    assert [client for client, _ in one] == sorted(client for client, _ in one)
    assert [names.index(client) + 100 for client, _ in one] == [node_id for _, node_id in one]


def test_draws_differ_from_round_to_round_phase_to_phase_and_seed_to_seed():
    known = met(*[f"c{i}" for i in range(20)])
    draws = {
        tuple(known.draw(seed, phase, server_round, 0.3, 1))
        for seed in (1, 2)
        for phase in ("train", "evaluate")
        for server_round in range(5)
    }
    assert len(draws) == 20


def test_every_client_is_drawn_about_as_often():
    known = met(*[f"c{i}" for i in range(10)])
    counts = dict.fromkeys((f"c{i}" for i in range(10)), 0)
    for server_round in range(400):
        for client, _ in known.draw(0, "train", server_round, 0.5, 1):
            counts[client] += 1
    assert sum(counts.values()) == 2000
    assert all(150 < count < 250 for count in counts.values())


def test_two_nodes_of_one_identity_are_refused():
    known = met("a", "b")
    known.refresh(listing(node(100, "0"), node(101, "1"), node(102, "2")))
    with pytest.raises(RosterError, match=r"two SuperNodes \(100 and 102\) say they are client 'a'"):
        known.confirm(102, "a")
    assert known.client(100) == "a"


def test_a_client_keeps_its_identity_for_the_run():
    known = met("a", "b")
    known.confirm(100, "a")
    with pytest.raises(RosterError, match="is client 'a', and now says it is client 'c'"):
        known.confirm(100, "c")


def test_an_identity_is_free_again_when_its_node_has_gone():
    known = met("a", "b")
    known.refresh(listing(node(101, "1"), node(102, "2")))
    known.confirm(102, "a")
    assert known.client(102) == "a"
    assert known.client(100) == "node-100"


@pytest.mark.parametrize("enrol", [True, False])
def test_duplicates_are_refused_before_a_run_or_left_out_of_it(enrol):
    configs = [{"partition-id": i, "client-id": name} for i, name in enumerate(["a", "b", "a", "c"])]
    grid = WatchedGrid(client_app(NET, query=True), 4, node_configs=configs)
    if enrol:
        with pytest.raises(RosterError, match=r"two SuperNodes \(1000 and 1002\) say they are client 'a'"):
            federate(make(enrol=True), grid, 1)
        assert {p.kind for p in grid.passed} == {"enrol"}, "nothing was trained"
        return
    federate(make(), grid, 2)
    for row in grid.watch.rows:
        assert row["clients_ok"] == 3
        assert list(row["failures"].values()) == [
            "two SuperNodes (1000 and 1002) say they are client 'a': give each its own client-id (or partition-id) in "
            "its node config"
        ]


def test_a_duplicate_that_turns_up_later_does_not_stop_the_run():
    """A client that came back may be listed under its old node id for a while."""
    configs = [{"partition-id": i, "client-id": name} for i, name in enumerate(["a", "b", "c", "a"])]

    def visible(server_round):
        return {1: {0, 1, 2}, 2: {0, 1, 2, 3}}.get(server_round, {1, 2, 3})

    grid = WatchedGrid(client_app(NET, query=True), 4, node_configs=configs, present=visible)
    federate(make(num_clients=3, enrol=True), grid, 3)
    assert [(row["clients_ok"], row["clients_failed"]) for row in grid.watch.rows] == [(3, 0), (3, 1), (3, 0)]


def test_a_client_of_another_protocol_version_stops_the_run_by_name(monkeypatch):
    from fedloru_flwr import wire

    def older(message, context):
        reply = wire.enrolment_reply(message.content, wire.Enrolment("0", "0.0.1"))
        config = next(iter(reply.config_records.values()))
        config[wire.HEADER] = config[wire.HEADER].replace(f'"protocol": {wire.PROTOCOL_VERSION}', '"protocol": 0')
        return reply

    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def enrol(message, context):
        return Message(older(message, context), reply_to=message)

    with pytest.raises(RosterError, match=r"node 1000 cannot take part: protocol-version is 0, this side speaks 4"):
        federate(make(enrol=True), WatchedGrid(app, 4), 1)


def test_the_same_clients_are_drawn_whatever_nodes_they_run_on(tmp_path):
    """Client ids in two orders of registration: the same run, but for the order of sums of equal numbers."""
    books, models = [], []
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 4, 1, 2]):
        stores = own_machines(tmp_path / str(len(books)), 6)
        configs = [{**stores[i], "client-id": f"c{i}"} for i in order]
        watch = Watch()
        strategy = make(enrol=True, num_clients=6, fraction_train=0.5, fraction_evaluate=0.5)
        federate(strategy, WatchedGrid(client_app(NET, query=True), 6, node_configs=configs, watch=watch), 5)
        books.append(timeless(watch.rows))
        models.append(strategy.merged_state_dict())
    assert books[0] == books[1]
    assert same(*models)


def test_clients_come_and_go_between_rounds():
    there = {1: {0, 1, 2, 3}, 2: {0, 1}, 3: {2, 3, 4}, 4: {0, 1, 2, 3, 4}, 5: {4}, 6: {0, 1, 2, 3, 4}}
    grid = WatchedGrid(client_app(NET), 5, present=lambda server_round: there.get(server_round))
    strategy = make()
    federate(strategy, grid, 6)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4, 2, 3, 5, 1, 5]
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 6
    assert strategy.state.ledger.version == 3


def test_when_all_clients_have_gone_the_run_waits_then_stops_with_its_state_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "_POLL_SECONDS", 0.001)
    gone = WatchedGrid(client_app(NET), 4, present=lambda r: set() if r == 3 else None)
    with pytest.raises(RosterError, match="0 of 1 SuperNodes are connected"):
        federate(make(run_dir=tmp_path / "run"), gone, 5, timeout=0.1)
    run = RunDirectory(tmp_path / "run")
    assert run.latest_checkpoint()[0] == 2
    assert run.read_summary()["status"] == "failed"

    looks = []

    def back_after_a_while(server_round):
        if server_round == 3:
            looks.append(None)
            return set() if len(looks) < 20 else None
        return None

    again = WatchedGrid(client_app(NET), 4, present=back_after_a_while)
    federate(make(run_dir=tmp_path / "run", resume="auto"), again, 5)
    assert [row["clients_ok"] for row in run.read_rounds()] == [4] * 5


def test_provisional_names_that_are_other_clients_real_ones_do_not_mix_up_what_they_hold(tmp_path):
    """Nodes registered in the order 1, 0: each goes by the other's name until its first reply."""
    configs = [{**config, "client-id": str(1 - i)} for i, config in enumerate(own_machines(tmp_path, 2))]
    grid = WatchedGrid(client_app(NET), 2, node_configs=configs)
    strategy = make(num_clients=2, accumulate_every=1)
    federate(strategy, grid, 3)
    assert set(strategy._memory.held) == {"0", "1"}
    assert [[p.entries > 0 for p in grid.to(0, r)] for r in (1, 2, 3)] == [[False], [True], [True]]
    assert len({p.entries for p in grid.passed if p.entries}) == 1, "one entry each time, never two"


def test_the_names_clients_went_by_before_they_said_who_they_are_are_forgotten():
    """Even where something was noted under such a name: here, that it had to be sent the base."""
    configs = [{"partition-id": i, "client-id": f"c{i}"} for i in range(4)]
    grid = WatchedGrid(client_app(own_instances(Mlp, 4)), 4, node_configs=configs)
    strategy = make()
    federate(strategy, grid, 1)
    assert grid.watch.rows[0]["clients_ok"] == 4
    assert strategy._memory.held == dict.fromkeys(["c0", "c1", "c2", "c3"], strategy.state.ledger.lineage)
