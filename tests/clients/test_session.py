"""The drop-in session, message by message: what a user's loop gets and what it sends back."""

import logging
import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedloru_flwr import wire
from fedloru_flwr.clients import LowRankSession, SessionAnswer, session
from fedloru_flwr.clients.memory import ClientOutOfMemoryError
from fedloru_flwr.clients.mods import session_mod
from fedloru_flwr.lowrank import Entry, digest_tensors
from fedloru_flwr.store import Store
from fedloru_flwr.strategies import FedLoRU


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 10)
        self.norm = nn.BatchNorm1d(10, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.hidden(x)))))


def factory():
    torch.manual_seed(3)
    return Net()


X = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 3
DATA = TensorDataset(X, Y)


@pytest.fixture(autouse=True)
def one_thread_in_a_task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    session._hosted.clear()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


class Server:
    """Just enough of one to write orders."""

    def __init__(self, source=factory, **more):
        self.strategy = FedLoRU(source, rank=2, target_modules="hidden", **more)
        self.state = self.strategy.state
        self.entries = ()

    @property
    def lineage(self):
        return self.entries[-1].digest if self.entries else self.state.ledger.root

    def accumulate(self, value=0.1):
        adapter = {"hidden.lora_A": torch.full((2, 12), value), "hidden.lora_B": torch.ones(10, 2)}
        self.entries += (Entry.after(self.lineage, adapter, 2.0),)

    def order(self, kind="train", server_round=1, entries=(), lineage=None, **config):
        template = RecordDict(
            {
                "arrays": wire.to_record(self.state.trainables),
                "config": ConfigRecord({"server-round": server_round, **config}),
            }
        )
        content = wire.order_content(
            template,
            root=self.state.ledger.root,
            lineage=lineage or self.lineage,
            settings=self.strategy.settings,
            entries=wire.entries_to_bytes(entries) if entries else b"",
            statistics=self.state.statistics,
        )
        return Message(content, 7, kind)

    def supply(self, kind, **more):
        common = {"root": self.state.ledger.root, "lineage": self.lineage, "settings": self.strategy.settings}
        return Message(wire.supply_content(kind, **common, **more), 7, "train")


def context(client="5", **node_config):
    config = {"partition-id": client, **node_config}
    return Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})


def begin(message, store, client="5", source=factory):
    return LowRankSession(source, message, context(client), store=store)


def answer_of(message, store, client="5", source=factory):
    with pytest.raises(SessionAnswer) as raised:
        begin(message, store, client, source)
    found = wire.find_answer(raised.value.message)
    assert found == wire.Answer.find(str(raised.value)), "the exception's text says the same as its message"
    return found


def user_loop(low_rank):
    """Shuffling and dropout included."""
    optimiser = torch.optim.Adam([p for p in low_rank.model.parameters() if p.requires_grad], lr=0.01)
    for inputs, labels in DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(low_rank.model(inputs), labels)
        loss.backward()
        optimiser.step()
    return loss.item()


def tensors_of(reply):
    return dict(reply.content["arrays"].to_torch_state_dict())


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_the_model_is_the_users_own_trainable_where_the_run_trains(store):
    low_rank = begin(Server().order(server_round=4), store)
    assert type(low_rank.model) is Net
    assert low_rank.model.training
    assert low_rank.server_round == 4
    assert low_rank.client == "5"
    trainable = {name for name, p in low_rank.model.named_parameters() if p.requires_grad}
    assert not any("base_layer.weight" in name for name in trainable)
    assert {"norm.weight", "norm.bias", "head.weight", "head.bias"} <= trainable
    assert sum(p.numel() for p in low_rank.model.parameters() if p.requires_grad) == 2 * 22 + 10 + 20 + 33


def test_a_users_optimiser_and_loader_train_it_and_the_reply_holds_the_trainables_in_order(store):
    server = Server()
    low_rank = begin(server.order(), store)
    reply = low_rank.reply({"train_loss": user_loop(low_rank), "num-examples": len(DATA)})
    tensors = tensors_of(reply)
    assert list(tensors) == list(server.state.trainables)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    moved = {key for key, sent in server.state.trainables.items() if not torch.equal(tensors[key], sent)}
    assert moved == set(tensors), "Adam moves everything"
    parsed = wire.read_reply(reply.content, trained=True)
    assert list(parsed.statistics) == ["norm.running_mean", "norm.running_var"]
    assert (parsed.client, parsed.lineage) == ("5", server.lineage)


def test_the_global_generators_make_a_users_loop_repeatable_wherever_it_runs(store, tmp_path):
    server = Server()

    def reply_of(store, client="5", server_round=1):
        low_rank = begin(server.order(server_round=server_round), store, client)
        noise = (torch.rand(1).item(), np.random.rand(), random.random())
        return tensors_of(low_rank.reply({"l": user_loop(low_rank), "num-examples": 9})), noise, low_rank.seed

    first = reply_of(store)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    reply_of(store, client="6")  # another client in the same process meanwhile
    session._hosted.clear()
    again = reply_of(Store(tmp_path / "another machine"))
    assert same(first[0], again[0])
    assert first[1:] == again[1:]
    for other in (reply_of(store, client="6"), reply_of(store, server_round=2)):
        assert not same(first[0], other[0])
        assert set(first[1]).isdisjoint(other[1])
        assert first[2] != other[2]


def test_who_trained_in_the_process_before_does_not_matter(store):
    """Counters do not travel, and with ``momentum=None`` a counter decides how fast statistics move."""
    server = Server()

    def statistics(client):
        low_rank = begin(server.order(), store, client)
        low_rank.model(X)
        reply = low_rank.reply({"num-examples": 9})
        return wire.read_reply(reply.content, trained=True).statistics

    first = statistics("1")
    for _ in range(3):
        statistics("2")
    assert same(first, statistics("1"))
    expected = nn.functional.linear(X, factory().hidden.weight, factory().hidden.bias).mean(dim=0)
    torch.testing.assert_close(first["norm.running_mean"], expected)


def test_gradients_and_values_of_the_message_before_are_gone(store):
    server = Server()
    low_rank = begin(server.order(), store)
    user_loop(low_rank)
    again = begin(server.order(), store)
    assert again.model is low_rank.model, "kept in the process"
    assert same(again._adapted.read_trainables(), dict(server.state.trainables))
    assert all(p.grad is None for p in again.model.parameters() if p.requires_grad)


def test_evaluation_gets_the_model_in_eval_mode_and_sends_metrics_only(store):
    server = Server()
    low_rank = begin(server.order(kind="evaluate"), store)
    assert not low_rank.model.training
    reply = low_rank.reply({"accuracy": 0.5, "num-examples": 9})
    assert list(reply.content) == ["metrics", "config"]
    assert dict(reply.content["metrics"]) == {"accuracy": 0.5, "num-examples": 9}
    assert begin(server.order(kind="train"), store).seed != low_rank.seed


def test_the_model_computes_what_the_plain_model_with_merged_weights_computes(store):
    server = Server(alpha=3.0)
    server.accumulate()
    generator = torch.Generator().manual_seed(2)
    server.state.trainables["hidden.lora_B"].copy_(torch.randn(10, 2, generator=generator))
    low_rank = begin(server.order(kind="evaluate", entries=server.entries), store)
    plain = factory().eval()
    with torch.no_grad():
        plain.hidden.weight += 2.0 * torch.full((10, 12), 0.2)
        trained = server.state.trainables
        plain.hidden.weight += 1.5 * trained["hidden.lora_B"] @ trained["hidden.lora_A"]
    torch.testing.assert_close(low_rank.model(X), plain(X))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (0.5, 0.5),
        (True, 1),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(4), 4),
        (np.bool_(True), 1),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([7]), 7),
        (torch.tensor(True), 1),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_numbers_of_any_library_are_metrics(store, value, expected):
    reply = begin(Server().order(), store).reply({"m": value, "num-examples": np.int32(9)})
    metrics = dict(reply.content["metrics"])
    assert metrics == {"m": expected, "num-examples": 9}
    assert type(metrics["m"]) in (int, float)


@pytest.mark.parametrize("value", ["high", None, ["a"], torch.ones(2), np.ones(3), 1j, {"a": 1}])
def test_what_is_no_number_is_refused_by_name(store, value):
    low_rank = begin(Server().order(), store)
    with pytest.raises(ValueError, match="metric 'm' must be a number, got"):
        low_rank.reply({"m": value, "num-examples": 9})


@pytest.mark.parametrize("examples", [..., 0, -1, float("nan"), float("inf"), torch.tensor(0)])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_reply_without_a_positive_number_of_examples_is_refused(store, examples, kind):
    low_rank = begin(Server().order(kind=kind), store)
    metrics = {"loss": 1.0} | ({} if examples is ... else {"num-examples": examples})
    with pytest.raises(ValueError, match="must hold 'num-examples', the number of examples this client used"):
        low_rank.reply(metrics)


def test_layers_without_gradient_are_reported_where_others_have_one(store, caplog):
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(20, 20)

    server = Server()
    server.strategy = FedLoRU(Idle, rank=2, target_modules=["hidden", "unused"])
    server.state = server.strategy.state
    low_rank = begin(server.order(), store, source=Idle)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        user_loop(low_rank)
        reply = low_rank.reply({"num-examples": 9})
    assert wire.read_reply(reply.content, trained=True).silent_layers == ("unused",)
    assert [record.message for record in caplog.records] == [
        "these factorised layers got no gradient in training: unused"
    ]

    untrained = begin(server.order(), store, source=Idle).reply({"num-examples": 9})
    assert wire.read_reply(untrained.content, trained=True).silent_layers == (), "no training is no bug in the model"


def test_outside_a_strategy_of_this_package_the_error_says_so(store):
    content = RecordDict({"arrays": ArrayRecord(factory().state_dict()), "config": ConfigRecord({"server-round": 1})})
    with pytest.raises(wire.WireError, match="does not run a strategy or session of this package"):
        begin(Message(content, 7, "train"), store)


def test_another_model_than_the_servers_is_refused_by_what_differs(store):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(12, 11)

    def same_weights_other_head():
        net = factory()
        net.head = nn.Linear(10, 4)
        return net

    server = Server()
    with pytest.raises(
        ValueError, match=r"'head\.weight' has shape \(3, 10\), expected \(4, 10\).*build the same model"
    ):
        begin(server.order(), store, source=same_weights_other_head)
    answer = answer_of(server.order(), store, source=Wider)
    assert (answer.kind, answer.held) == ("need-base", "")
    answer_of(server.supply("base", base=server.state.base), store, source=Wider)
    with pytest.raises(ValueError, match=r"base tensor 'hidden\.weight' has shape \(10, 12\), expected \(11, 12\)"):
        begin(server.order(), store, source=Wider)


def test_a_failure_in_the_middle_leaves_no_half_moved_model(store):
    """A base of another shape is refused; the model is still at the lineage it says."""
    server = Server()
    begin(server.order(), store)
    (host,) = session._hosted.values()
    before = {name: tensor.clone() for name, tensor in host.adapted.read_base().items()}
    other = "b" * 64
    store.put_base(other, {"hidden.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="expected"):
        host.bring_to(other, store, server.state.ledger.root, server.state.ledger.root)
    assert host.lineage == server.state.ledger.root
    assert same({name: tensor.clone() for name, tensor in host.adapted.read_base().items()}, before)


def test_entries_that_do_not_fit_leave_the_model_at_the_base_it_says(store):
    server = Server(accumulate_into="stack")
    server.accumulate()
    low_rank = begin(server.order(kind="evaluate", entries=server.entries), store)
    (host,) = session._hosted.values()
    other = "b" * 64
    store.put_base(other, {"hidden.weight": torch.ones(10, 12)})
    odd = Entry.after(other, {"elsewhere.lora_A": torch.ones(2, 12)}, 1.0)
    store.put_entry(odd)
    with pytest.raises(KeyError):
        host.bring_to(odd.digest, store, server.state.ledger.root, other)
    assert host.lineage == host.base_lineage == other
    plain = factory().eval()
    with torch.no_grad():
        plain.hidden.weight.fill_(1.0)
    torch.testing.assert_close(low_rank.model(X), plain(X))


@pytest.mark.parametrize("into", ["merge", "stack"])
def test_entries_that_came_with_the_order_are_used_and_kept(store, into):
    server = Server(accumulate_into=into)
    server.accumulate()
    server.accumulate(0.2)
    low_rank = begin(server.order(entries=server.entries), store)
    assert store.holdings(server.state.ledger.root, "5").lineage == server.lineage
    assert [store.entry(e.digest) is not None for e in server.entries] == [True, True]
    assert store.has_base(server.lineage) == (into == "merge"), "a fresh process need not fold again"
    # Once noted they need not come again, in whatever process.
    with torch.no_grad():
        outputs = low_rank.model.eval()(X)
        session._hosted.clear()
        assert torch.equal(begin(server.order(), store).model.eval()(X), outputs)


def test_more_entries_than_are_lacked_do_no_harm(store):
    server = Server()
    server.accumulate()
    begin(server.order(entries=server.entries), store)
    server.accumulate(0.2)
    low_rank = begin(server.order(entries=server.entries), store)
    assert low_rank._adapted.read_base()["hidden.weight"].sum() == pytest.approx(
        factory().hidden.weight.sum().item() + 2.0 * 120 * (0.2 + 0.4), rel=1e-4
    )


def test_a_client_without_the_base_says_what_it_can_really_be_brought_to(store):
    server = Server()
    server.accumulate()
    assert answer_of(server.order(), store) == wire.Answer("need-base", "5", server.state.ledger.root)
    begin(server.order(entries=server.entries), store)
    server.accumulate(0.2)
    assert answer_of(server.order(), store).held == server.entries[0].digest
    # What it noted is gone, and this process cannot rebuild it.
    session._hosted.clear()
    for path in store.path.glob("*/*.safetensors"):
        path.unlink()
    assert answer_of(server.order(), store).held == server.state.ledger.root
    # What another client of this machine has received, it has not.
    begin(server.order(entries=server.entries), store, client="6")
    assert answer_of(server.order(), store, client="7").held == server.state.ledger.root


def test_an_instance_with_other_weights_needs_the_base_and_gets_on_with_it(store):
    server = Server()
    instance = Net()
    assert not torch.equal(instance.hidden.weight, factory().hidden.weight)
    assert answer_of(server.order(), store, source=instance) == wire.Answer("need-base", "5", "")
    stored = answer_of(server.supply("base", base=server.state.base), store, source=instance)
    assert stored == wire.Answer("stored", "5", server.lineage)
    low_rank = begin(server.order(), store, source=instance)
    assert low_rank.model is instance
    assert same(low_rank._adapted.read_base(), dict(server.state.base))
    # Another client of this process has the file on its disk but has not been sent it.
    assert answer_of(server.order(), store, client="6", source=instance).held == ""


def test_a_base_that_does_not_match_its_digest_is_refused(store):
    server = Server()
    forged = {name: tensor + 1 for name, tensor in server.state.base.items()}
    with pytest.raises(wire.WireError, match="does not match its digest: it is corrupt or forged"):
        begin(server.supply("base", base=forged), store)
    assert not store.has_base(server.lineage)
    assert digest_tensors(server.state.base) == server.lineage


def test_a_supply_of_entries_is_stored_and_answered(store):
    server = Server()
    server.accumulate()
    assert answer_of(server.supply("entries", entries=server.entries), store).kind == "stored"
    low_rank = begin(server.order(), store)
    assert low_rank._adapted.read_base()["hidden.weight"].sum() != factory().hidden.weight.sum()


def test_an_instance_serves_one_run_and_says_so(store):
    instance = Net()
    server = Server()
    answer_of(server.order(), store, source=instance)
    with pytest.raises(ValueError, match=r"already serves another run.*pass a factory"):
        begin(Server(alpha=8.0).order(), store, source=instance)


def test_models_are_kept_by_factory_and_settings_and_not_too_many_of_them(store):
    servers = [Server(seed=seed) for seed in range(6)]
    for server in servers:
        begin(server.order(), store)
    assert len(session._hosted) == 4
    model = begin(servers[5].order(), store).model
    assert begin(servers[5].order(), store).model is model
    assert begin(servers[4].order(), store).model is not model


def test_the_store_is_the_node_configs_or_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORU_STORE", str(tmp_path / "environment"))
    server = Server()
    LowRankSession(factory, server.order(), context())
    assert (tmp_path / "environment" / "clients").is_dir()
    LowRankSession(factory, server.order(), context(**{"store-path": str(tmp_path / "configured")}))
    assert (tmp_path / "configured" / "clients").is_dir()


def test_the_mod_turns_an_answer_into_a_reply(store):
    server = Server()
    server.accumulate()

    def app(message, context):
        return begin(message, store).reply({"num-examples": 1})

    reply = session_mod(server.order(), context(), app)
    assert wire.find_answer(reply) == wire.Answer("need-base", "5", server.state.ledger.root)
    trained = session_mod(server.order(entries=server.entries), context(), app)
    assert wire.find_answer(trained) is None
    assert trained.has_content()


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=["Python's", "a device's", "the CPU's", "another"],
)
def test_a_client_without_enough_memory_says_what_to_lower(error, out_of_memory):
    def app(message, context):
        raise error

    if not out_of_memory:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            session_mod(None, None, app)
        return
    with pytest.raises(ClientOutOfMemoryError, match=r"not enough memory on this client .*: lower batch-size") as told:
        session_mod(None, None, app)
    assert told.value.__cause__ is error
    assert "\n" not in str(told.value)


def test_a_model_moved_to_another_dtype_or_device_by_the_user_still_serves_the_next_message(store):
    """As ``model.to("cuda")`` does, this replaces buffers."""
    server = Server()
    low_rank = begin(server.order(), store)
    low_rank.model.double()
    low_rank.model(X.double())
    statistics = wire.read_reply(low_rank.reply({"num-examples": 9}).content, trained=True).statistics
    assert statistics["norm.running_mean"].abs().sum() > 0, "what the moved model measured"
    low_rank.model.float()
    again = begin(server.order(), store)
    again.model(X)
    torch.testing.assert_close(
        wire.read_reply(again.reply({"num-examples": 9}).content, trained=True).statistics["norm.running_mean"],
        statistics["norm.running_mean"].float(),
    )


def test_what_is_drawn_after_the_reply_does_not_follow_from_the_runs_seed(store):
    server = Server()

    def noise_after(outer_seed, failing_loop_first=False):
        np.random.seed(outer_seed)
        torch.manual_seed(outer_seed)
        random.seed(outer_seed)
        if failing_loop_first:
            begin(server.order(), store)  # its loop raised: no reply
        begin(server.order(), store).reply({"num-examples": 1})
        return np.random.normal(), float(torch.rand(())), random.random()

    fresh = np.random.RandomState(7).normal()
    assert noise_after(7)[0] == fresh
    assert noise_after(7) == noise_after(7, failing_loop_first=True)
    assert noise_after(7) != noise_after(8)


def test_a_loop_that_trains_the_frozen_base_is_told_and_the_base_is_as_it_was(store):
    server = Server()
    before = begin(server.order(), store)
    expected = before.model(X).detach()
    before.reply({"num-examples": 1})
    low_rank = begin(server.order(), store)
    low_rank.model.requires_grad_(True)
    user_loop(low_rank)
    with pytest.raises(ValueError, match=r"parameters that are frozen in this run: hidden\.weight"):
        low_rank.reply({"num-examples": 1})
    again = begin(server.order(), store)
    assert torch.equal(again.model(X).detach(), expected)


def test_a_base_that_a_failing_loop_has_written_to_does_not_reach_the_next_client(store):
    server = Server()
    expected = begin(server.order(), store, client="1").model(X).detach()
    low_rank = begin(server.order(), store)
    low_rank.model.requires_grad_(True)
    user_loop(low_rank)
    low_rank.model.zero_grad()  # nothing is left of the gradients, and the loop raises before its reply
    innocent = begin(server.order(), store, client="1")
    assert torch.equal(innocent.model(X).detach(), expected)
    innocent.reply({"num-examples": 1})

    low_rank = begin(server.order(), store)
    low_rank.model.requires_grad_(True)
    user_loop(low_rank)
    low_rank.model.zero_grad()
    with pytest.raises(ValueError, match="frozen in this run"):
        low_rank.reply({"num-examples": 1})


def test_a_model_rounded_by_a_users_loop_is_whole_again_for_the_next_client(store):
    server = Server()
    expected = begin(server.order(), store, client="1").model(X).detach()
    low_rank = begin(server.order(), store)
    low_rank.model.bfloat16()
    low_rank.model.float()
    low_rank.reply({"num-examples": 1})
    assert torch.equal(begin(server.order(), store, client="1").model(X).detach(), expected)
    low_rank = begin(server.order(), store)
    low_rank.model.double()
    assert all(t.dtype == torch.float32 for t in tensors_of(low_rank.reply({"num-examples": 1})).values())
    assert torch.equal(begin(server.order(), store, client="1").model(X).detach(), expected)


def test_an_instance_can_be_saved_and_copied_by_the_user(store, tmp_path):
    import copy

    net = Net()
    server = Server(net)
    user_loop(begin(server.order(), store, source=net))
    torch.save(net, tmp_path / "net.pt")
    copied = copy.deepcopy(net)
    assert torch.equal(copied.eval()(X), net.eval()(X))
    with pytest.raises(ValueError, match="pass a factory"):
        begin(server.order(), store, source=copied)


def test_a_supply_has_the_users_own_settings_too(store):
    server = Server()
    message = server.order(lr=0.25)
    template = RecordDict({"arrays": ArrayRecord(), "mine": ConfigRecord({"lr": 0.25})})
    content = wire.supply_content(
        "entries",
        root=server.state.ledger.root,
        lineage=server.lineage,
        settings=server.strategy.settings,
        template=template,
    )
    assert content["mine"]["lr"] == message.content["config"]["lr"] == 0.25
    assert wire.read_order(Message(content, 7, "train")).kind == "entries"


def test_lists_of_numbers_are_metrics_too(store):
    reply = begin(Server().order(), store).reply({"num-examples": 2, "recall": [np.float32(0.5), 1], "hits": (1, 2)})
    assert dict(reply.content["metrics"]) == {"num-examples": 2, "recall": [0.5, 1.0], "hits": [1, 2]}
