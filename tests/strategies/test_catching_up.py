"""Every client ends at the model's lineage, whatever it missed, lost or kept, and is sent no more than it lacks."""

import random
import shutil
from collections import OrderedDict

import pytest
import torch
from toy_federation import (
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    each_its_own,
    federate,
    own_instances,
    own_machines,
    same,
    seeded,
    timeless,
    usual,
)

from fedloru_flwr import wire
from fedloru_flwr.clients import session
from fedloru_flwr.strategies import FedLoRU

NET = seeded(Mlp)
BOTH = pytest.mark.parametrize("into", ["merge", "stack"])


def make(into="merge", net=NET, **more):
    arguments = {"rank": 1, "alpha": 2.0, "target_modules": "hidden", "accumulate_every": 2, **usual(), **more}
    return FedLoRU(net, accumulate_into=into, **arguments)


def late_client_three(server_round):
    """Client 3 takes part in round 1 and then not before round 7, after three accumulations."""
    return {0, 1, 2} if 1 < server_round < 7 else {0, 1, 2, 3}


def machines(tmp_path, app, **more):
    """Each client a machine of its own: own store, own memory."""
    return WatchedGrid(app, 4, node_configs=own_machines(tmp_path, 4), actor=each_its_own, **more)


def looks(seen, server_round):
    return {look.client: look for look in seen if look.server_round == server_round}


def assert_same_model(one, other):
    assert same(one.base, other.base)
    assert torch.equal(one.outputs, other.outputs)


@BOTH
def test_a_client_that_missed_three_accumulations_gets_three_entries_and_the_same_bits(tmp_path, into):
    seen, strategy = [], make(into)
    grid = machines(tmp_path, client_app(NET, seen=seen), present=late_client_three)
    federate(strategy, grid, 7)
    at_seven = looks(seen, 7)
    assert set(at_seven) == {"0", "1", "2", "3"}
    assert_same_model(at_seven["3"], at_seven["0"])
    unmoved = torch.equal(at_seven["3"].base["hidden.weight"], NET().hidden.weight)
    assert unmoved == (into == "stack"), "stacking leaves W as it was"

    (sent,) = grid.to(3, 7)
    assert sent.kind == "work"
    assert sent.entries == len(wire.entries_to_bytes(strategy.state.ledger.entries)) > 0
    (to_others,) = grid.to(0, 7)
    assert to_others.entries == len(wire.entries_to_bytes(strategy.state.ledger.entries[-1:]))
    assert [sum(p.entries > 0 for p in grid.to(0, r)) for r in range(1, 8)] == [0, 0, 1, 0, 1, 0, 1]


@BOTH
def test_entries_above_the_inline_limit_go_ahead_as_one_message(tmp_path, monkeypatch, into):
    models = []
    for limit in (2**20, 10):
        monkeypatch.setattr(wire, "INLINE_LIMIT", limit)
        seen, strategy = [], make(into)
        grid = machines(tmp_path / str(limit), client_app(NET, seen=seen), present=late_client_three)
        federate(strategy, grid, 7)
        models.append(strategy.merged_state_dict())
        assert_same_model(looks(seen, 7)["3"], looks(seen, 7)["0"])
    assert same(*models)
    supply, order = grid.to(3, 7)
    assert (supply.kind, order.kind, order.entries) == ("entries", "work", 0)
    assert [link["digest"] for link in supply.header["chain"]] == [e.digest for e in strategy.state.ledger.entries]
    supply, order = grid.to(0, 7)
    assert [link["digest"] for link in supply.header["chain"]] == [strategy.state.ledger.lineage]
    row = grid.watch.rows[-1]
    assert row["bytes_by_purpose"]["entries"]["down"] == sum(p.size for p in grid.passed[-8:] if p.kind == "entries")


def test_entries_over_a_mebibyte_are_a_supply_and_those_below_are_not(tmp_path):
    class Wide(torch.nn.Module):
        shape = (12,)

        def __init__(self):
            super().__init__()
            self.hidden = torch.nn.Linear(12, 30_000, bias=False)
            self.head = torch.nn.Linear(30_000, 3, bias=False)

        def forward(self, x):
            return self.head(self.hidden(x))

    # An entry of rank 6 holds 6 * 30012 float32: 0.69 MiB; two of them 1.37 MiB. W holds 1.37 MiB and the head.
    grid = machines(tmp_path, client_app(seeded(Wide)), present=lambda r: {0, 1} if r == 2 else None)
    strategy = make(net=seeded(Wide), rank=6, accumulate_every=1, dense_leaves="none", fraction_train=1.0)
    federate(strategy, grid, 3)
    assert [p.kind for p in grid.to(0, 3)] == ["work"]
    assert grid.to(0, 3)[0].entries > 700_000
    assert grid.to(3, 2) == []
    assert [(p.kind, p.entries) for p in grid.to(3, 3)] == [("entries", 0), ("work", 0)]


@BOTH
def test_w_itself_is_sent_where_it_is_smaller_than_the_entries(tmp_path, into):
    """W has 120 numbers, an entry of rank 4 has 4 * 22 = 88: one is smaller, two are not."""
    seen, strategy = [], make(into, rank=4, num_clients=4)
    grid = machines(
        tmp_path, client_app(NET, seen=seen), present=lambda r: {0, 1, 2} if r in (2, 3, 4) else {0, 1, 2, 3}
    )
    federate(strategy, grid, 7)
    assert [(p.kind, p.entries > 0) for p in grid.to(3, 5)] == [("base", False), ("work", False)]
    assert [(p.kind, p.entries > 0) for p in grid.to(0, 5)] == [("work", True)]
    assert grid.watch.rows[4]["bytes_by_purpose"]["base"]["down"] == grid.to(3, 5)[0].size
    assert "repeats" not in grid.watch.rows[4]["bytes_by_purpose"]
    # From there on by entries again.
    assert [(p.kind, p.entries > 0) for p in grid.to(3, 7)] == [("work", True)]
    one, other = looks(seen, 7)["3"], looks(seen, 7)["0"]
    if into == "merge":
        assert_same_model(one, other)
    else:
        torch.testing.assert_close(one.outputs, other.outputs)


@BOTH
@pytest.mark.parametrize("kind", ["factory", "instance"])
def test_a_client_that_lost_its_cache_recovers_within_the_round_and_its_reply_counts(tmp_path, into, kind):
    def run(lose):
        app = client_app(NET if kind == "factory" else own_instances(Mlp, 4))
        watch = Watch()
        grid = machines(tmp_path / str(lose), app, watch=watch)

        def at_end(row):
            if lose and row["round"] == 5:
                shutil.rmtree(tmp_path / str(lose) / "2")
                grid.actors.pop(1002)
                if kind == "instance":  # a fresh process makes its instance anew
                    grid._app = client_app(own_instances(Mlp, 4))
                    grid.actors.clear()
                    for i in (0, 1, 3):
                        shutil.rmtree(tmp_path / str(lose) / str(i))

        watch.at_end = at_end
        strategy = make(into)
        federate(strategy, grid, 7)
        return strategy, grid

    strategy, grid = run(lose=True)
    undisturbed, _ = run(lose=False)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4] * 7
    if into == "merge":
        assert same(strategy.merged_state_dict(), undisturbed.merged_state_dict())
    kinds = [(p.kind, p.entries > 0) for p in grid.to(2, 6)]
    if kind == "factory":
        assert kinds == [("work", False), ("work", True)], "asked, answered that it holds W0, got both entries"
        assert [p.kind for p in grid.to(0, 6)] == ["work"]
    else:
        assert kinds == [("work", False), ("base", False), ("work", False)]
    assert [(p.kind, p.entries > 0) for p in grid.to(2, 7)] == [("work", True)]
    assert grid.watch.rows[5]["bytes_by_purpose"]["repeats"]["down"] > 0
    assert "repeats" not in grid.watch.rows[6]["bytes_by_purpose"]


@BOTH
@pytest.mark.parametrize("shared", [False, True], ids=["own stores", "one store"])
def test_first_contact_of_instances_costs_w0_once_a_client(tmp_path, into, shared):
    grid = WatchedGrid(
        client_app(own_instances(Mlp, 4)),
        4,
        node_configs=None if shared else own_machines(tmp_path, 4),
        actor=each_its_own,
    )
    strategy, reference = make(into), make(into)
    federate(strategy, grid, 5)
    bases = [p for p in grid.passed if p.kind == "base"]
    assert sorted((p.node, p.server_round) for p in bases) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    rows = grid.watch.rows
    assert rows[0]["bytes_by_purpose"]["base"]["down"] == sum(p.size for p in bases) > 4 * 4 * 120
    assert all("base" not in row["bytes_by_purpose"] for row in rows[1:])
    federate(reference, WatchedGrid(client_app(NET), 4), 5)
    assert same(strategy.merged_state_dict(), reference.merged_state_dict())


@BOTH
def test_one_instance_shared_by_all_clients_of_a_process_serves_them_all(into):
    """The usual ``net = Net()`` at the top of a client app."""
    instance = seeded(Mlp, 8)()
    instance.shape = Mlp.shape
    strategy, reference = make(into, fraction_train=0.5), make(into, fraction_train=0.5)
    grid = WatchedGrid(client_app(instance), 4)
    federate(strategy, grid, 7)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 7
    bases = [p.node for p in grid.passed if p.kind == "base"]
    assert len(bases) == len(set(bases)), "at most once a client"
    federate(reference, WatchedGrid(client_app(NET), 4), 7)
    torch.testing.assert_close(strategy.merged_state_dict(), reference.merged_state_dict())


@BOTH
def test_with_factories_w0_never_travels(into):
    grid = WatchedGrid(client_app(NET), 4, present=late_client_three)
    federate(make(into, net=Mlp), grid, 1)  # a class whose weights depend on the run's seed alone
    grid = WatchedGrid(client_app(Mlp), 4, present=late_client_three)
    federate(make(into, net=Mlp), grid, 7)
    assert {p.kind for p in grid.passed} == {"work"}
    assert [row["clients_ok"] for row in grid.watch.rows] == [4, 3, 3, 3, 3, 3, 4]


def test_an_instance_on_the_server_and_factories_on_the_clients_cost_w0_once(tmp_path):
    instance = seeded(Mlp, 99)()
    strategy = make(net=instance)
    seen = []
    grid = machines(tmp_path, client_app(NET, seen=seen))
    federate(strategy, grid, 5)
    assert sorted(p.node for p in grid.passed if p.kind == "base") == [0, 1, 2, 3]
    assert same(seen[0].base, {"hidden.weight": instance.hidden.weight.detach()})
    assert torch.equal(strategy._root_base["hidden.weight"], instance.hidden.weight)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4] * 5


def test_the_same_initial_weights_need_not_travel_though_both_sides_have_instances(tmp_path):
    grid = machines(tmp_path, client_app(own_instances(Mlp, 4, seed=3)))
    # Only client 0 has the server's seed, 3; the others' are 4, 5, 6.
    federate(make(net=NET()), grid, 1)
    assert sorted(p.node for p in grid.passed if p.kind == "base") == [1, 2, 3]


class MovingGrid(WatchedGrid):
    """Client 1 comes back under another node id after round 3."""

    def visible(self):
        gone = 1 if self.watch.server_round > 3 else 4
        return [node for i, node in enumerate(self._contexts) if i != gone]


@pytest.mark.parametrize("enrol", [True, False])
def test_a_client_that_comes_back_under_another_node_id_is_the_same_client(tmp_path, enrol):
    configs = own_machines(tmp_path, 4)
    configs = [{**config, "client-id": f"c{i}"} for i, config in enumerate(configs)]
    configs.append(dict(configs[1]))
    grid = MovingGrid(client_app(NET, query=True), 5, node_configs=configs, actor=lambda m: m.metadata.dst_node_id)
    strategy, reference = make(enrol=enrol), make(enrol=enrol)
    federate(strategy, grid, 5)
    assert [(row["clients_ok"], row["clients_failed"]) for row in grid.watch.rows] == [(4, 0)] * 5
    assert set(strategy._memory.held) == {"c0", "c1", "c2", "c3"}
    orders = [p for p in grid.to(4) if p.kind == "work"]
    if enrol:
        assert [p.entries > 0 for p in orders] == [False, True], "it is known to hold the first entry, lacks the second"
    still = [{**config, "client-id": f"c{i}"} for i, config in enumerate(own_machines(tmp_path / "still", 4))]
    federate(reference, WatchedGrid(client_app(NET, query=True), 4, node_configs=still, actor=each_its_own), 5)
    assert same(strategy.merged_state_dict(), reference.merged_state_dict())


@BOTH
@pytest.mark.parametrize("kind", ["factory", "instance"])
@pytest.mark.parametrize("diverge", [False, True], ids=["later", "abandoned"])
def test_clients_that_hold_a_later_or_abandoned_lineage_come_back_to_the_servers(tmp_path, into, kind, diverge):
    """The server is put back from round 6 to round 3; the clients keep what they have."""

    def go_on(source, rate, stores, actors):
        app = client_app(source, rate=rate)
        grid = WatchedGrid(app, 4, node_configs=own_machines(stores, 4), actor=each_its_own)
        grid.actors = actors
        strategy = make(into, run_dir=tmp_path / "run", resume="auto", checkpoint_every=1)
        federate(strategy, grid, 6)
        return strategy, grid

    source = NET if kind == "factory" else own_instances(Mlp, 4)
    actors: dict[int, OrderedDict] = {}
    grid = machines(tmp_path / "stores", client_app(source))
    grid.actors = actors
    grid.watch.at_end = lambda row: row["round"] == 4 and shutil.copytree(tmp_path / "run", tmp_path / "copy")
    federate(make(into, run_dir=tmp_path / "run", checkpoint_every=1), grid, 7)

    def put_back():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "copy", tmp_path / "run")

    put_back()
    assert len(list((tmp_path / "run" / "checkpoints").glob("round-*.safetensors"))) == 2, "rounds 2 and 3"
    returned, grid = go_on(source, 0.5 if diverge else 0.2, tmp_path / "stores", actors)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4, 4, 4]
    assert [row["round"] for row in grid.watch.rows] == [4, 5, 6]

    put_back()
    fresh, _ = go_on(NET, 0.5 if diverge else 0.2, tmp_path / "new", {})
    if into == "merge":
        assert same(returned.merged_state_dict(), fresh.merged_state_dict())
    else:
        torch.testing.assert_close(returned.merged_state_dict(), fresh.merged_state_dict())


@BOTH
@pytest.mark.parametrize("kind", ["factory", "instance", "the server's instance"])
@pytest.mark.parametrize("rank", [1, 4], ids=["entries are sent", "bases as well"])
def test_actors_with_memories_of_any_age_serve_clients_of_one_store_as_if_each_were_a_machine(
    tmp_path, into, kind, rank
):
    """Eight clients, half of them a round, on three actors chosen at random, one of which is replaced now and then."""
    count, rounds = 8, 9
    choose = random.Random(3)
    instances = {}

    def on_actor(context):  # an instance lives in a process, whichever client it serves
        return instances.setdefault(id(session._hosted), seeded(Mlp, 70 if kind == "instance" else 3)())

    on_actor.by_client, on_actor.shape = True, Mlp.shape
    shared = WatchedGrid(client_app(NET if kind == "factory" else on_actor), count, actor=lambda _: choose.randrange(3))

    def replace_an_actor(row):
        if row["round"] % 4 == 0:
            shared.actors.pop(choose.randrange(3), None)

    shared.watch.at_end = replace_an_actor
    strategy = make(into, rank=rank, num_clients=count, fraction_train=0.5)
    federate(strategy, shared, rounds)
    assert [(row["clients_ok"], row["clients_failed"]) for row in shared.watch.rows] == [(4, 0)] * rounds

    apart = WatchedGrid(
        client_app(
            NET
            if kind == "factory"
            else own_instances(Mlp, count)
            if kind == "instance"
            else own_instances(Mlp, count, seed=3, step=0)
        ),
        count,
        node_configs=own_machines(tmp_path, count),
        actor=each_its_own,
    )
    reference = make(into, rank=rank, num_clients=count, fraction_train=0.5)
    federate(reference, apart, rounds)
    assert timeless(shared.watch.rows) == timeless(apart.watch.rows)
    assert any(p.kind == "base" for p in apart.passed) == (kind == "instance" or rank == 4)
    assert same(strategy.merged_state_dict(), reference.merged_state_dict())


@BOTH
def test_evaluation_brings_clients_up_to_date_as_training_does(tmp_path, into):
    grid = machines(tmp_path, client_app(NET))
    strategy = make(into, fraction_train=0.25, fraction_evaluate=1.0, min_evaluate_nodes=1, accumulate_every=1)
    federate(strategy, grid, 3)
    for node in range(4):
        assert sum(p.entries > 0 for p in grid.to(node)) == 3, "each entry once, at the next contact"


def test_a_base_that_is_damaged_in_the_store_is_built_anew_from_entries(tmp_path):
    watch, actors = Watch(), {}
    grid = machines(tmp_path, client_app(NET), watch=watch)
    grid.actors = actors

    def damage(row):
        if row["round"] == 4:
            actors.clear()  # so that it is read again
            for path in tmp_path.glob("*/bases/*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(bytes(content))

    watch.at_end = damage
    strategy, reference = make(), make()
    federate(strategy, grid, 6)
    federate(reference, WatchedGrid(client_app(NET), 4), 6)
    assert same(strategy.merged_state_dict(), reference.merged_state_dict())
    assert {p.kind for p in grid.passed} == {"work"}
    assert "repeats" not in watch.rows[4]["bytes_by_purpose"], "the client helps itself"
