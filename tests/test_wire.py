"""Every record makes the round trip, and whatever else comes is refused by `WireError` alone."""

import contextlib
import json
import math
import string

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloru_flwr import wire
from fedloru_flwr.lowrank import Entry
from fedloru_flwr.wire import Answer, Enrolment, Settings, WireError, Work

ROOT, LINEAGE = "0" * 64, "f" * 64
OPTIONS = (("nested_scale", 0.5), ("personal_rank", 3.0))
SETTINGS = Settings("plain", "factors", 2, 4.0, ("hidden", "conv"), "all", 7, "merge", "num-examples", OPTIONS)
WORK = Work(rank=3, draw=5, half="b", run="0a", counted=4, keep_from=2, proximal_mu=0.25, scaffold=True)
TENSORS = {"z.lora_A": torch.arange(6.0).reshape(2, 3), "a.lora_B": torch.ones(4, 2), "bias": torch.zeros(3).double()}
STATISTICS = {"norm.running_var": torch.ones(3), "after.running_mean": torch.arange(2.0)}


@pytest.fixture(autouse=True)
def task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def entry(previous=ROOT, value=1.0):
    return Entry.after(previous, {"z.lora_A": torch.full((2, 3), value), "z.lora_B": torch.ones(4, 2)}, 0.5)


def template(**config):
    return RecordDict({"weights": wire.to_record(TENSORS), "settings": ConfigRecord({"lr": 0.1, **config})})


def order(**more):
    arguments = {"root": ROOT, "lineage": LINEAGE, "settings": SETTINGS, **more}
    return wire.order_content(template(**{"server-round": 9}), **arguments)


def sent(content, kind="train"):
    return Message(content, 1, kind)


def same(one, other):
    return list(one) == list(other) and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def reply_content(to, *, tensors=None, **parts):
    """The records of a reply to an order, as a client sends them."""
    keys = {"arrays_key": to.arrays_key, "config_key": to.config_key}
    reply = wire.make_reply(to, tensors=tensors, **parts)
    return wire.ReadyReply(reply, trained=tensors is not None, reply_to=sent(order()), **keys).content


def test_an_order_makes_the_round_trip_and_keeps_the_users_settings():
    entries = (entry(), entry(entry().digest, 2.0))
    content = order(entries=wire.entries_to_bytes(entries), statistics=STATISTICS)
    read = wire.read_order(sent(content))
    assert (read.kind, read.root, read.lineage, read.server_round) == ("work", ROOT, LINEAGE, 9)
    assert read.settings == SETTINGS
    assert same(read.tensors, TENSORS)
    assert [e.digest for e in read.entries] == [e.digest for e in entries]
    assert same(dict(sorted(read.entries[1].adapter.items())), dict(sorted(entries[1].adapter.items())))
    assert same(read.statistics, dict(sorted(STATISTICS.items())))
    assert (read.arrays_key, read.config_key) == ("weights", "settings")
    assert content["settings"]["lr"] == 0.1
    assert len(content.array_records) == len(content.config_records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (16, 4, 3, 3)])
def test_arrays_are_the_bytes_that_flower_makes(dtype, shape):
    tensors = {"x": (torch.arange(math.prod(shape)) % 2).reshape(shape).to(dtype)}
    assert wire.to_record(tensors)["x"].data == ArrayRecord(tensors)["x"].data
    assert wire.to_record(tensors).object_id == ArrayRecord(tensors).object_id
    assert torch.equal(wire.to_tensors(wire.to_record(tensors))["x"], tensors["x"])


def test_an_order_carries_the_clients_work_its_own_arrays_and_extras():
    own, extras = {"z.lora_A": torch.ones(1, 3)}, {"control/b": torch.arange(3.0), "control/a": torch.zeros(2, 2)}
    content = order(work=WORK, arrays=wire.to_record(own), extras=wire.extras_to_bytes(extras))
    read = wire.read_order(sent(content))
    assert (read.work, list(read.tensors), read.settings.option("personal_rank")) == (WORK, ["z.lora_A"], 3.0)
    assert same(read.extras, dict(sorted(extras.items())))
    plain = wire.read_order(sent(order()))
    assert (plain.work, plain.extras, plain.settings.option("unheard of", 7.0)) == (Work(), {}, 7.0)


def test_a_replys_extras_make_the_round_trip_and_are_weighed():
    extras = {"control/b": torch.arange(3.0)}
    parts = {"client": "1", "metrics": MetricRecord({"num-examples": 1}), "tensors": TENSORS}
    without = reply_content(wire.read_order(sent(order())), **parts)
    content = reply_content(wire.read_order(sent(order())), **parts, extras=extras)
    assert same(wire.read_reply(content, trained=True).extras, extras)
    assert wire.extras_bytes(without) == 0
    assert wire.extras_bytes(content) > 12
    assert wire.content_bytes(content) - wire.content_bytes(without) == pytest.approx(
        wire.extras_bytes(content), abs=64
    )


def test_an_order_does_not_change_the_template_it_was_made_from():
    made_from = template()
    wire.order_content(made_from, root=ROOT, lineage=LINEAGE, settings=SETTINGS, statistics=STATISTICS)
    assert list(made_from["settings"]) == ["lr"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_a_base_makes_the_round_trip_in_its_own_dtype(dtype):
    base = {"z": torch.arange(6).reshape(2, 3).to(dtype), "a": torch.ones(2, dtype=torch.float32), "e": torch.empty(0)}
    content = wire.supply_content("base", root=ROOT, lineage=LINEAGE, settings=SETTINGS, base=base)
    read = wire.read_order(sent(content))
    assert (read.kind, read.lineage, read.entries) == ("base", LINEAGE, ())
    assert same(read.tensors, base)


def test_a_supply_of_entries_makes_the_round_trip():
    entries = (entry(), entry(entry().digest, 2.0))
    content = wire.supply_content("entries", root=ROOT, lineage=LINEAGE, settings=SETTINGS, entries=entries)
    read = wire.read_order(sent(content))
    assert read.kind == "entries"
    for one, other in zip(read.entries, entries, strict=True):
        assert (one.digest, one.previous, one.scale) == (other.digest, other.previous, other.scale)
        assert same(one.adapter, other.adapter)


@pytest.mark.parametrize("trained", [True, False])
def test_a_reply_makes_the_round_trip(trained):
    read_order = wire.read_order(sent(order()))
    content = reply_content(
        read_order,
        client="ö/1",
        metrics=MetricRecord({"loss": 0.5, "num-examples": 3}),
        tensors=TENSORS if trained else None,
        statistics=STATISTICS if trained else None,
        silent_layers=("z",),
    )
    assert list(content) == (["weights"] if trained else []) + ["metrics", "settings"]
    reply = wire.read_reply(content, trained=trained)
    assert (reply.client, reply.lineage, reply.silent_layers) == ("ö/1", LINEAGE, ("z",))
    assert reply.metrics == {"loss": 0.5, "num-examples": 3}
    assert same(reply.tensors, TENSORS if trained else {})
    assert same(reply.statistics, dict(sorted(STATISTICS.items())) if trained else {})

    clean = wire.clean_content(reply.tensors if trained else None, reply.metrics, "weights")
    assert list(clean) == (["weights"] if trained else []) + ["metrics"]
    assert dict(clean["metrics"]) == {"loss": 0.5, "num-examples": 3}
    if trained:
        assert same(wire.to_tensors(clean["weights"]), TENSORS)


@pytest.mark.parametrize("kind", ["need-base", "stored"])
@pytest.mark.parametrize("client", ["3", "client-é /.= held=00", ""])
@pytest.mark.parametrize("held", ["", LINEAGE])
def test_an_answer_is_found_in_its_own_reply_and_in_any_error(kind, client, held):
    answer = Answer(kind, client, held)
    message = sent(order())
    reply = Message(wire.answer_content(wire.read_order(message), answer), reply_to=message)
    assert wire.find_answer(reply) == answer
    traceback = f'Traceback ...\n  File "x.py", line 3\nfedloru_flwr.SessionAnswer: {answer}\nMore'
    for reason in (str(answer), traceback, f"<class 'x.SessionAnswer'>:<'{answer}'>"):
        assert wire.find_answer(Message(Error(2, reason), reply_to=message)) == answer


def test_what_is_no_answer_is_not_taken_for_one():
    message = sent(order())
    assert wire.find_answer(Message(Error(2, "the disk is full"), reply_to=message)) is None
    assert wire.find_answer(Message(Error(2), reply_to=message)) is None
    assert wire.find_answer(message) is None
    assert Answer.find(f"fedloru-answer kind=dance client=1 held={LINEAGE}.") is None


def test_an_enrolment_makes_the_round_trip():
    for told in (Enrolment("c-7", "0.1.0"), Enrolment("c-7", "0.1.0", rank=8)):
        assert wire.read_enrolment(wire.enrolment_reply(wire.enrolment_query(), told)) == told


@pytest.mark.parametrize("rank", ["8", 2.0, True, -1, 2**31, None])
def test_an_enrolments_rank_is_a_whole_number(rank):
    reply = wire.enrolment_reply(wire.enrolment_query(), Enrolment("1"))
    with pytest.raises(WireError, match="largest rank must be a whole number"):
        wire.read_enrolment(change_header(reply, rank=rank))


def change_header(content, **changes):
    (config,) = content.config_records.values()
    header = {**json.loads(config[wire.HEADER]), **changes}
    config[wire.HEADER] = json.dumps({key: value for key, value in header.items() if value is not ...})
    return content


def test_another_protocol_version_is_refused_by_name_on_both_sides():
    told = r"protocol-version is 1, this side speaks 4: install the same version of fedloru-flwr"
    with pytest.raises(WireError, match=told):
        wire.read_order(sent(change_header(order(), protocol=1)))
    reply = reply_content(wire.read_order(sent(order())), client="1", metrics=MetricRecord({"num-examples": 1}))
    with pytest.raises(WireError, match=told):
        wire.read_reply(change_header(reply, protocol=1), trained=False)
    with pytest.raises(WireError, match=told):
        wire.enrolment_reply(change_header(wire.enrolment_query(), protocol=1), Enrolment("1"))
    enrolment = wire.enrolment_reply(wire.enrolment_query(), Enrolment("1"))
    with pytest.raises(WireError, match=told):
        wire.read_enrolment(change_header(enrolment, protocol=1))
    with pytest.raises(WireError, match="'fedloru' header does not parse"):
        wire.read_order(sent(change_header(order(), protocol=...)))


def test_a_message_of_another_strategy_is_told_apart():
    with pytest.raises(WireError, match="does not run a strategy or session of this package"):
        wire.read_order(sent(template()))


BAD_SETTINGS = [
    {"rank": "2"},
    {"rank": 2.0},
    {"seed": None},
    {"alpha": "x"},
    {"method": 1},
    {"method": ...},
    {"form": True},
    {"form": "cube"},
    {"options": "nested_scale"},
    {"options": [3]},
    {"options": [["nested_scale"]]},
    {"options": [["nested_scale", "x"]]},
    {"options": [["nested_scale", 10**400]]},
    {"target_modules": "hidden"},
    {"target_modules": [["hidden"]]},
    {"dense_leaves": ["all"]},
    {"weighted_by": 3},
    {"surplus": 1},
    {"rank": ...},
]


@pytest.mark.parametrize("change", BAD_SETTINGS, ids=lambda change: str(change)[:40])
def test_settings_of_other_types_or_names_are_refused(change):
    (config,) = order().config_records.values()
    raw = {**json.loads(config[wire.HEADER])["settings"], **change}
    content = change_header(order(), settings={key: value for key, value in raw.items() if value is not ...})
    with pytest.raises(WireError, match="header lacks or mistypes"):
        wire.read_order(sent(content))


@pytest.mark.parametrize(
    "work",
    [
        {"rank": -1},
        {"rank": 2.0},
        {"rank": True},
        {"rank": 2**31},
        {"draw": -1},
        {"counted": "3"},
        {"keep_from": -2},
        {"half": "c"},
        {"run": "../.."},
        {"run": "0" * 65},
        {"proximal_mu": 1},
        {"proximal_mu": math.nan},
        {"scaffold": 1},
        {"surplus": 1},
        7,
        "work",
    ],
    ids=str,
)
def test_work_of_other_types_or_names_is_refused(work):
    with pytest.raises(WireError, match="header lacks or mistypes"):
        wire.read_order(sent(change_header(order(), work=work)))


@pytest.mark.parametrize("key", ["root", "lineage"])
@pytest.mark.parametrize("value", ["", "../../etc/passwd", "F" * 64, "0" * 63, 5, None, ["0" * 64], ...])
def test_what_is_no_digest_is_refused(key, value):
    with pytest.raises(WireError, match="header lacks or mistypes"):
        wire.read_order(sent(change_header(order(), **{key: value})))


def test_an_unknown_kind_of_order_is_refused():
    with pytest.raises(WireError, match="unknown kind of order 'dance'"):
        wire.read_order(sent(change_header(order(), kind="dance")))


def test_entries_that_do_not_match_their_digest_are_refused_in_both_forms():
    good = entry()
    forged = Entry(good.digest, good.previous, good.scale, {**good.adapter, "z.lora_B": torch.zeros(4, 2)})
    scaled = Entry(good.digest, good.previous, 0.6, good.adapter)
    moved = Entry(good.digest, LINEAGE, good.scale, good.adapter)
    for bad in (forged, scaled, moved):
        with pytest.raises(WireError, match="does not match its content"):
            wire.entries_from_bytes(wire.entries_to_bytes([bad]))
        content = wire.supply_content("entries", root=ROOT, lineage=LINEAGE, settings=SETTINGS, entries=[bad])
        with pytest.raises(WireError, match="does not match its content"):
            wire.read_order(sent(content))


def test_a_huge_scale_or_a_wrong_link_is_refused():
    for link in (
        {"digest": LINEAGE, "previous": ROOT, "scale": 10**400},
        {"digest": LINEAGE, "previous": "elsewhere", "scale": 1.0},
        {"digest": LINEAGE, "scale": 1.0},
        "link",
        None,
    ):
        content = wire.supply_content("entries", root=ROOT, lineage=LINEAGE, settings=SETTINGS, entries=[entry()])
        with pytest.raises(WireError, match="ledger entries do not parse"):
            wire.read_order(sent(change_header(content, chain=[link])))
    with pytest.raises(WireError, match="ledger entries do not parse"):
        wire.read_order(sent(change_header(content, chain=7)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (RecordDict(), "exactly one ArrayRecord, got 0"),
        (RecordDict({"a": ArrayRecord(), "b": ArrayRecord()}), "exactly one ArrayRecord, got 2"),
        (RecordDict({"a": ArrayRecord()}), "exactly one ConfigRecord, got 0"),
        (RecordDict({"a": ArrayRecord(), "b": ConfigRecord({wire.HEADER: 3})}), "has no 'fedloru' header"),
        (RecordDict({"a": ArrayRecord(), "b": ConfigRecord({wire.HEADER: b"{}"})}), "has no 'fedloru' header"),
    ],
)
def test_a_content_of_another_make_is_refused(content, told):
    with pytest.raises(WireError, match=told):
        wire.read_order(sent(content))


def test_bytes_are_the_same_for_the_same_entries():
    """Else two runs of one seed would differ."""
    assert wire.entries_to_bytes([entry()]) == wire.entries_to_bytes([entry()])
    one, other = (wire.content_bytes(order(statistics=STATISTICS)) for _ in range(2))
    assert one == other


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase, max_size=6), inner),
    max_leaves=8,
)
KNOWN = ["protocol", "kind", "root", "lineage", "settings", "work", "chain", "client", "silent", "bfloat16", "version"]
KNOWN += ["rank"]
HEADERS = st.one_of(
    st.text(max_size=30),
    JSON.map(json.dumps),
    st.dictionaries(st.sampled_from(KNOWN), JSON).map(lambda h: json.dumps({"protocol": wire.PROTOCOL_VERSION, **h})),
    # Nearly right: one key of a right header with another value.
    st.tuples(st.sampled_from(KNOWN), JSON).map(
        lambda change: json.dumps(
            {
                **json.loads(next(iter(order().config_records.values()))[wire.HEADER]),
                **{"client": "1", "chain": []},
                change[0]: change[1],
            }
        )
    ),
    st.tuples(st.sampled_from(list(SETTINGS.__dict__)), JSON).map(
        lambda change: json.dumps(
            {
                "protocol": wire.PROTOCOL_VERSION,
                "kind": "work",
                "root": ROOT,
                "lineage": LINEAGE,
                "settings": {**SETTINGS.__dict__, change[0]: change[1]},
            }
        )
    ),
    st.tuples(st.sampled_from(list(WORK.__dict__)), JSON).map(
        lambda change: json.dumps(
            {
                "protocol": wire.PROTOCOL_VERSION,
                "kind": "work",
                "root": ROOT,
                "lineage": LINEAGE,
                "settings": SETTINGS.__dict__,
                "work": {**WORK.__dict__, change[0]: change[1]},
            }
        )
    ),
)
GOOD_BYTES = wire.entries_to_bytes([entry(), entry(entry().digest, 3.0)])


@st.composite
def payloads(draw):
    """Random bytes, safetensors with a random header, or good bytes with a few changed."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        header = json.dumps(draw(JSON | st.fixed_dictionaries({"__metadata__": JSON}))).encode()
        return len(header).to_bytes(8, "little") + header + draw(st.binary(max_size=8))
    changed = bytearray(GOOD_BYTES)
    for position, value in draw(st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), max_size=3)):
        changed[position] = value
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.booleans()) else changed)


ARRAYS = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "object", "nonsense", ""]),
    shape=st.just((2,)),
    stype=st.sampled_from(["numpy.ndarray", "else"]),
    data=st.binary(max_size=200) | st.just(Array(torch.ones(2).numpy()).data),
)
ARRAY_RECORDS = st.just(wire.to_record(TENSORS)) | st.dictionaries(st.text(max_size=3), ARRAYS, max_size=2).map(
    ArrayRecord
)
CONFIG_RECORDS = st.builds(
    lambda header, entries, statistics, extras, more: ConfigRecord(
        {
            **({wire.HEADER: header} if header is not None else {}),
            **({wire.ENTRIES: entries} if entries is not None else {}),
            **({wire.STATISTICS: statistics} if statistics is not None else {}),
            **({wire.EXTRAS: extras} if extras is not None else {}),
            **more,
        }
    ),
    HEADERS | HEADERS | st.none() | st.integers(),
    st.none() | payloads() | st.text(max_size=3),
    st.none() | payloads() | st.just([1, 2]),
    st.none() | payloads() | st.just("extras"),
    st.just({}) | st.just({"server-round": "nine"}),
)
METRIC_RECORDS = st.dictionaries(st.text(max_size=3), st.integers() | st.floats(), max_size=2).map(MetricRecord)
CONTENTS = st.one_of(
    st.tuples(ARRAY_RECORDS, CONFIG_RECORDS, METRIC_RECORDS),
    st.tuples(ARRAY_RECORDS, CONFIG_RECORDS),
    st.lists(ARRAY_RECORDS | CONFIG_RECORDS | METRIC_RECORDS, max_size=4),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(CONTENTS)
def test_anything_malformed_raises_wire_error_only(records):
    content = RecordDict({str(index): record for index, record in enumerate(records)})
    message = sent(content)
    for read in (
        lambda: wire.read_order(message),
        lambda: wire.read_reply(content, trained=True),
        lambda: wire.read_reply(content, trained=False),
        lambda: wire.read_enrolment(content),
        lambda: wire.enrolment_reply(content, Enrolment("1")),
    ):
        with contextlib.suppress(WireError):
            read()
    wire.find_answer(message)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(payloads())
def test_malformed_entries_raise_wire_error_only_and_what_parses_is_what_its_digest_says(payload):
    try:
        entries = wire.entries_from_bytes(payload)
    except WireError:
        return
    for one in entries:
        one.verify()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=300))
def test_no_text_makes_an_error_reply_unreadable(text):
    message = sent(order())
    reply = Message(Error(2, text), reply_to=message)
    wire.find_answer(reply)
    line = wire.error_reason(reply)
    assert "\n" not in line
    assert len(line) <= 403


def test_the_reason_of_an_error_is_its_exceptions_kind_and_text_wherever_it_came_from():
    message = sent(order())
    deployed = "<class 'fedloru_flwr.data.DataError'>:<'no such\nfile'>"
    simulated = (
        "\x1b[36mray::Actor()\x1b[39m (pid=12, ip=1.2.3.4)\n  File ...\nfedloru_flwr.data.DataError: no such file\n"
        "\nDuring handling\nClientAppException occurred. Message: no such file'>"
    )
    for reason in (deployed, simulated):
        assert wire.error_reason(Message(Error(2, reason), reply_to=message)) == "DataError: no such file"
    assert wire.error_reason(Message(Error(2), reply_to=message)) == "no reason given"
    assert wire.error_reason(Message(Error(2, "x" * 900), reply_to=message)) == "x" * 400 + "..."


def test_numbers_that_are_not_finite_travel_as_they_are():
    """Judging is the server's part."""
    metrics = MetricRecord({"num-examples": 1, "loss": math.nan})
    reply = reply_content(wire.read_order(sent(order())), client="1", metrics=metrics, tensors=TENSORS)
    assert math.isnan(wire.read_reply(reply, trained=True).metrics["loss"])


def test_lent_tensors_are_those_of_a_copy_and_lie_in_the_message():
    tensors = {
        "float": torch.randn(3, 5),
        "double": torch.randn(7, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 2),
        "half": torch.randn(4).half(),
        "whole": torch.arange(3),
    }
    record = wire.to_record(tensors)
    lent = wire.lent_tensors(record)
    assert list(lent) == list(tensors)
    for name, tensor in tensors.items():
        assert (lent[name].dtype, lent[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(lent[name], tensor)
    again = wire.lent_tensors(record)
    assert [name for name in tensors if lent[name].data_ptr() == again[name].data_ptr()] == [
        "float", "double", "scalar", "empty",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY of no use",
        wire.to_record({"x": torch.ones(3)})["x"].data[:-1],
        wire.to_record({"x": torch.ones(3)})["x"].data.replace(b"(3,)", b"(9,)"),
        wire.to_record({"x": torch.ones(3)})["x"].data.replace(b"'<f4'", b"'|O4'"),
    ],
)
def test_bytes_that_are_no_array_are_not_lent(data):
    with pytest.raises(wire.WireError, match="an array does not parse"):
        wire.lent_tensors(ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", data)}))
