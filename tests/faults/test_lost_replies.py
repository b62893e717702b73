"""Sixty rounds in which three of ten fail, in every way there is, give the model of rounds without the three."""

import pytest
from fault_plan import LOSING, FaultPlan
from faulty_grid import Clock, FaultyGrid
from toy_federation import Mlp, WatchedGrid, client_app, federate, own_machines, same, seeded, usual

from fedloru_flwr.lowrank import choose
from fedloru_flwr.strategies import FedAvg, FedLoRU, PFedLoRU

ROUNDS, CLIENTS, DRAWN, TIMEOUT = 60, 12, 6, 77
NET = seeded(Mlp)
SMALL = {"rank": 1, "alpha": 2.0, "target_modules": "hidden", "accumulate_every": 4}
ALGORITHMS = {
    "fedloru": lambda: FedLoRU(NET, **SMALL, **clients()),
    "fedloru, stack": lambda: FedLoRU(NET, accumulate_into="stack", **SMALL, **clients()),
    "fedloru, SCAFFOLD": lambda: FedLoRU(NET, scaffold=True, **SMALL, **clients()),
    "fedavg, SCAFFOLD": lambda: FedAvg(NET, scaffold=True, **clients()),
    "pfedloru": lambda: PFedLoRU(NET, **SMALL, **clients()),
}
KEEPING = ("fedloru, SCAFFOLD", "fedavg, SCAFFOLD", "pfedloru")
BY_DEFAULT = ("pfedloru",)


def clients():
    return usual(num_clients=CLIENTS, fraction_train=DRAWN / CLIENTS, measure_aggregation=False)


def participants(rounds=ROUNDS, seed=0):
    """Who takes part, by the rule that the protocol states."""
    everybody = [str(client) for client in range(CLIENTS)]
    return {t: choose(seed, "participants", "train", t, items=everybody, count=DRAWN) for t in range(1, rounds + 1)}


def without_them(strategy, plan):
    """The same strategy, which does not draw the clients whose replies a plan loses."""
    draw = strategy._roster.draw

    def draw_others(seed, phase, server_round, *how):
        drawn = draw(seed, phase, server_round, *how)
        return [(client, node) for client, node in drawn if client not in plan.lost[server_round]]

    strategy._roster.draw = draw_others
    return strategy


@pytest.mark.parametrize(
    "algorithm",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS],
)
def test_clients_whose_replies_are_lost_might_as_well_not_have_been_drawn(algorithm, tmp_path, monkeypatch):
    # That a client loses what it has of its own is no fault that others could make good; and entries stacked on
    # another base give the same function, not the same bits.
    forgetting = 0.0 if algorithm in KEEPING or "stack" in algorithm else 0.2
    plan = FaultPlan.drawn(1, participants(), share=0.3, forgetting=forgetting)
    assert plan.kinds() == set(LOSING)

    clock = Clock().installed(monkeypatch)
    grid = FaultyGrid(client_app(NET), CLIENTS, plan, clock, node_configs=own_machines(tmp_path / "faulty", CLIENTS))
    faulty = ALGORITHMS[algorithm]()
    federate(faulty, grid, ROUNDS, timeout=TIMEOUT)
    rows = grid.watch.rows
    assert [set(row["failures"]) for row in rows] == [set(plan.lost[row["round"]]) for row in rows]
    assert [row["clients_ok"] for row in rows] == [DRAWN - len(plan.lost[row["round"]]) for row in rows]
    assert sum(row["clients_failed"] for row in rows) == round(0.3 * DRAWN * ROUNDS)
    assert grid.happened == {(t, client) for t, of_round in plan.lost.items() for client in of_round}
    assert grid.forgotten == {(t, client) for t, of_round in plan.forgetful.items() for client in of_round}
    waited = sum(bool({"stalls", "dies"} & set(of_round.values())) for of_round in plan.lost.values())
    assert 0 < clock.now <= waited * TIMEOUT

    monkeypatch.undo()
    machines = own_machines(tmp_path / "fewer", CLIENTS)
    fewer = WatchedGrid(client_app(NET), CLIENTS, node_configs=machines)
    reference = without_them(ALGORITHMS[algorithm](), plan)
    federate(reference, fewer, ROUNDS)
    assert [row["clients_ok"] for row in fewer.watch.rows] == [row["clients_ok"] for row in rows]
    assert [row["clients_failed"] for row in fewer.watch.rows] == [0] * ROUNDS
    assert same(faulty.merged_state_dict(), reference.merged_state_dict())
    assert same(dict(faulty.state.trainables), dict(reference.state.trainables))
    assert faulty.state.ledger.lineage == reference.state.ledger.lineage
    assert faulty._memory.counted == reference._memory.counted


def test_a_client_that_lost_its_cache_is_served_within_the_round(tmp_path, monkeypatch):
    rounds = 30
    plan = FaultPlan.drawn(2, participants(rounds), share=0.0, forgetting=0.3)
    clock = Clock().installed(monkeypatch)
    grid = FaultyGrid(client_app(NET), CLIENTS, plan, clock, node_configs=own_machines(tmp_path, CLIENTS))
    federate(ALGORITHMS["fedloru"](), grid, rounds, timeout=TIMEOUT)
    assert [(row["clients_ok"], row["failures"]) for row in grid.watch.rows] == [(DRAWN, {})] * rounds
    assert grid.forgotten == {(t, client) for t, of_round in plan.forgetful.items() for client in of_round}
    served = {(passed.server_round, str(passed.node)) for passed in grid.passed}
    asked_twice = {where for where in served if len(grid.to(int(where[1]), where[0])) > 1}
    # Before the first accumulation nothing can be missing; a client never met before holds what it was built with.
    assert {where for where in asked_twice if where[0] > 4} <= grid.forgotten
    assert len(asked_twice) > 30
    assert clock.now == 0.0, "nobody was waited for"
