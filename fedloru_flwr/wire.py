"""The only code, with `packets`, that builds or parses Flower records; every key name lives here.

Server to client, an **order**: one ArrayRecord with the Trainables and one ConfigRecord, which holds the user's own
settings and, under this package's keys, a JSON header, the ledger entries the client lacks and the running statistics
(both as safetensors bytes). What would exceed `INLINE_LIMIT`, and whole bases, go ahead of it as a **supply**: a
message of the same type whose one ArrayRecord holds them. So every message has exactly one ArrayRecord, as Flower's
mods expect.

Client to server, a **reply**: one ArrayRecord with the Trainables (training only), one MetricRecord, one ConfigRecord
with a JSON header, the statistics and, both ways, what else a method exchanges, such as control variates. A client that
cannot or need not train gives an **answer** instead: a line of text, in a ConfigRecord or in the reason of an error
reply (an exception is the only way out of a user's function).
"""

import io
import json
import math
import re
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloru_flwr.coding import Follow, Parcel
from fedloru_flwr.lowrank import Codec, Entry
from fedloru_flwr.lowrank.forms import FORMS, Form
from fedloru_flwr.lowrank.ledger import CODED

PROTOCOL_VERSION = 4
INLINE_LIMIT = 2**20

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
HEADER, ENTRIES, STATISTICS, EXTRAS = "fedloru", "fedloru-entries", "fedloru-statistics", "fedloru-extras"
CONTROL = "control/"
SERVER_ROUND = "server-round"
NUM_EXAMPLES = "num-examples"
RECEIVED = "received-"

OrderKind = Literal["work", "entries", "base"]
SupplyKind = Literal["entries", "base"]
Half = Literal["both", "a", "b"]
AnswerKind = Literal["need-base", "need-whole", "stored"]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_REMOTE_MARKER = "ClientAppException occurred. Message: "
_DEAD_WORKER = re.compile(
    r"<class 'ray\.exceptions\.(ActorDied|ActorUnavailable|RayActor|WorkerCrashed|OutOfMemory)Error'>"
)
_REASON_LENGTH = 400
_NAME_LENGTH = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")


class WireError(ValueError):
    """A message is not what the protocol says it must be."""


@dataclass(frozen=True)
class Settings:
    """What a client needs to know to build the same adapted model as the server.

    Attributes:
        method: names what the client does around training, see `fedloru_flwr.clients.methods`.
        form: of the adapters, see `AdapterPlan`.
        rank: ``r``.
        alpha: LoRA's alpha.
        target_modules: as given to the strategy; empty for the automatic choice.
        dense_leaves: ``"all"``, ``"none"`` or names.
        seed: the run's seed.
        accumulate_into: ``"merge"`` or ``"stack"``.
        weighted_by: the metric that weighs a reply.
        options: the method's own, by name.
    """

    method: str
    form: Form
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dense_leaves: str
    seed: int
    accumulate_into: str
    weighted_by: str = NUM_EXAMPLES
    options: tuple[tuple[str, float], ...] = ()

    def option(self, name: str, default: float = 0.0) -> float:
        """One of the method's own options."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class Work:
    """What one client is to do in one round, beside the settings that all share.

    Attributes:
        rank: of this client's own factors; 0 for the settings'.
        draw: the number of times the factors have been drawn anew.
        half: which of a pair is trained: ``both``, ``a`` or ``b``.
        run: names the run, for what the client keeps of its own.
        counted: the round of this client's last reply that counted; 0 for none.
        keep_from: what it keeps of rounds before this one will not be asked for again.
        proximal_mu: FedProx's ``mu``.
        scaffold: whether control variates are exchanged.
        uplink: the codec of the reply; empty for plain float32.
        feedback: whether what the codec leaves out is kept and added next time.
    """

    rank: int = 0
    draw: int = 0
    half: Half = "both"
    run: str = ""
    counted: int = 0
    keep_from: int = 0
    proximal_mu: float = 0.0
    scaffold: bool = False
    uplink: str = ""
    feedback: bool = False


_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "form": str,
    "rank": int,
    "alpha": (int, float),
    "target_modules": list,
    "dense_leaves": str,
    "seed": int,
    "accumulate_into": str,
    "weighted_by": str,
    "options": list,
}
_RUN = re.compile(r"[0-9a-f]{0,64}")
_NO_WORK = Work()


@dataclass(frozen=True)
class Order:
    """A message from the server, parsed."""

    kind: OrderKind
    root: str
    lineage: str
    settings: Settings
    tensors: dict[str, Tensor]
    entries: tuple[Entry, ...]
    statistics: dict[str, Tensor]
    server_round: int
    arrays_key: str
    config_key: str
    work: Work = Work()
    extras: dict[str, Tensor] = field(default_factory=dict)
    parcel: Parcel | None = None
    follow: Follow | None = None


@dataclass(frozen=True)
class Reply:
    """A client's reply, parsed but not yet judged against what was asked."""

    client: str
    lineage: str
    tensors: dict[str, Tensor]
    metrics: dict[str, int | float | list[int] | list[float]]
    statistics: dict[str, Tensor]
    silent_layers: tuple[str, ...]
    extras: dict[str, Tensor] = field(default_factory=dict)
    server_round: int = 0
    lost_state: bool = False


@dataclass(frozen=True)
class Answer:
    """What a client says instead of training.

    Attributes:
        kind: ``need-base``: it cannot reach the lineage asked for. ``need-whole``: it does not hold what the Trainables
            are told from. ``stored``: it has kept a supply.
        client: its identity.
        held: the lineage it holds; empty for none.
    """

    kind: AnswerKind
    client: str
    held: str

    _PATTERN = re.compile(r"fedloru-answer kind=([a-z-]+) client=(\S*) held=([0-9a-f]{0,64})\.")

    def __str__(self) -> str:
        return f"fedloru-answer kind={self.kind} client={urllib.parse.quote(self.client, safe='')} held={self.held}."

    @classmethod
    def find(cls, text: str) -> "Answer | None":
        """The answer in a text that may hold much else, or None."""
        match = cls._PATTERN.search(text)
        kind = next((known for known in get_args(AnswerKind) if match is not None and match[1] == known), None)
        if match is None or kind is None:
            return None
        return cls(kind, urllib.parse.unquote(match[2])[:_NAME_LENGTH], match[3])


def is_frozen(key: str, half: Half) -> bool:
    """Whether a value is of the half of a pair that is not trained."""
    return half != "both" and key.endswith(".lora_B" if half == "a" else ".lora_A")


def content_bytes(content: RecordDict | ArrayRecord, known: Mapping[int, int] | None = None) -> int:
    """The size of a serialised RecordDict and its children, as Flower sends them, without the message's metadata.

    Equal parts of one message are one object, sent and counted once.

    Args:
        content: what is sent, or one record of it.
        known: sizes of records in it that have been measured before, by ``id``.
    """
    with no_object_id_recompute():
        if not known or not isinstance(content, RecordDict):
            return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
        own = len(content.deflate())
        return own + sum(
            known[id(record)]
            if id(record) in known
            else sum(len(part.deflate()) for part in get_all_nested_objects(record).values())
            for record in content.values()
        )


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack tensors, keeping their order; bfloat16, which NumPy lacks, as the 16-bit integers of the same bits."""
    return ArrayRecord({name: _to_array(tensor) for name, tensor in tensors.items()})


def _to_array(tensor: Tensor) -> Array:
    """As Flower makes it, but that an array's head is not formatted anew every time."""
    tensor = tensor.detach().cpu().contiguous()
    values = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    data = b"".join([_write_head(values.shape, values.dtype), values.data])
    return Array(str(values.dtype), values.shape, "numpy.ndarray", data)


@lru_cache(4096)
def _write_head(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What `numpy.save` writes before an array's numbers."""
    head = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, about)
    return head.getvalue()


_PLAIN_ARRAY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f4|<f8|\|u1)', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)
_DTYPES = {b"<f4": torch.float32, b"<f8": torch.float64, b"|u1": torch.uint8}
_HEAD_BYTES = 128


class _Head(NamedTuple):
    """What NumPy's format says of an array whose numbers begin after `_HEAD_BYTES`, and where they end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    end: int


@lru_cache(4096)
def _read_head(head: bytes) -> _Head | None:
    found = _PLAIN_ARRAY.fullmatch(head)
    if found is None or int.from_bytes(found[1], "little") != len(head) - 10:
        return None
    shape = tuple(int(length) for length in found[3].split(b",") if length.strip())
    dtype = _DTYPES[found[2]]
    count = math.prod(shape)
    return _Head(dtype, shape, _HEAD_BYTES + count * dtype.itemsize) if count else None


with warnings.catch_warnings():  # torch says once a process that one must not write to what it is lent
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)


def lent_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack tensors, keeping their order, without copying them: they lie in the message's bytes, and are only read.

    Raises:
        WireError: if an array does not parse.
    """
    return {name: _parse(array) if (lent := _lent(array)) is None else lent for name, array in record.items()}


def _lent(array: Array) -> Tensor | None:
    """An array that lies in the message's bytes as torch can read it; None if it does not."""
    if array.stype != "numpy.ndarray" or not isinstance(array.data, bytes):
        return None
    head = _read_head(array.data[:_HEAD_BYTES])
    if head is None or len(array.data) != head.end:
        return None
    flat = torch.frombuffer(array.data, dtype=head.dtype, offset=_HEAD_BYTES)
    return flat if len(head.shape) == 1 else flat.view(head.shape)


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack tensors, keeping their order.

    Raises:
        WireError: if an array does not parse.
    """
    return {name: _parse(array) if (lent := _lent(array)) is None else lent.clone() for name, array in record.items()}


def _parse(array: Array) -> Tensor:
    try:
        return torch.from_numpy(array.numpy())
    except Exception as error:  # numpy raises many kinds on malformed bytes
        raise WireError(f"an array does not parse: {error}") from error


def _to_bytes(tensors: Mapping[str, Tensor], header: Any = None) -> bytes:
    # One metadata key: safetensors writes several in no fixed order.
    metadata = None if header is None else {"header": json.dumps(header)}
    payload: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    return payload


def _from_bytes(payload: object, what: str) -> tuple[dict[str, Tensor], Any]:
    if not isinstance(payload, bytes):
        raise WireError(f"{what} must be bytes, got {type(payload).__name__}")
    try:
        length = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + length]).get("__metadata__") or {}
        tensors = dict(sorted(load(payload).items()))  # safetensors gives them in no fixed order
        return tensors, json.loads(metadata["header"]) if "header" in metadata else None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"{what} do not parse as safetensors: {error}") from error


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"expected a SHA-256 digest in hexadecimal, got {str(value)[:80]!r}")
    return value


def _flatten(entries: Sequence[Entry]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors = {f"{i}/{key}": tensor for i, entry in enumerate(entries) for key, tensor in entry.tensors().items()}
    return tensors, chain_links(entries)


def chain_links(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What is said of each entry of a stretch beside its tensors."""
    links = [entry.link() for entry in entries]
    return [_told(link, before) for link, before in zip(links, [{}, *links], strict=False)]


def _told(link: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What a link says that does not follow from the one before."""
    expected = {**before, "previous": before.get("digest")}
    told = {**dict.fromkeys(before, ""), **link}  # what it lacks and the one before had, such as a codec
    return {name: value for name, value in told.items() if name not in expected or expected[name] != value}


def _unflatten(tensors: Mapping[str, Tensor], chain: Any) -> tuple[Entry, ...]:
    entries = []
    try:
        link: dict[str, Any] = {}
        for index, raw in enumerate(chain):
            prefix = f"{index}/"
            link = {**link, "previous": link.get("digest"), **raw}
            adapter = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            entries.append(Entry.linked(link, adapter))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"ledger entries do not parse: {error}") from error
    return tuple(entries)


def entries_to_bytes(entries: Sequence[Entry]) -> bytes:
    """Serialise ledger entries."""
    return _to_bytes(*_flatten(entries))


def entries_from_bytes(payload: object) -> tuple[Entry, ...]:
    """Parse ledger entries and check each against its digest."""
    return _unflatten(*_from_bytes(payload, "ledger entries"))


def _settings(raw: dict[str, Any]) -> Settings:
    for name, kind in _SETTINGS.items():
        if not isinstance(raw.get(name), kind):
            raise TypeError(f"setting {name!r}: {raw.get(name)!r}")
    if not all(isinstance(target, str) for target in raw["target_modules"]):
        raise TypeError(f"setting 'target_modules': {raw['target_modules']!r}")
    if raw["form"] not in FORMS:
        raise ValueError(f"setting 'form': {raw['form']!r}")
    options = tuple((str(name), float(value)) for name, value in raw["options"])
    return Settings(**{**raw, "target_modules": tuple(raw["target_modules"]), "options": options})


def _work(raw: dict[str, Any]) -> Work:
    """Parse a client's work; what is not said has its default."""
    known = asdict(Work())
    for name, value in raw.items():
        kind = float if name == "proximal_mu" else type(known.get(name))
        if name not in known or type(value) is not kind:
            raise TypeError(f"work {name!r}: {str(value)[:80]!r}")
    work = Work(**raw)
    if min(work.rank, work.draw, work.counted, work.keep_from) < 0 or max(work.rank, work.draw) >= 2**31:
        raise ValueError(f"work: numbers out of range in {str(raw)[:200]}")
    if work.half not in ("both", "a", "b") or not _RUN.fullmatch(work.run) or not math.isfinite(work.proximal_mu):
        raise ValueError(f"work: {str(raw)[:200]}")
    if work.uplink:
        Codec.parse(work.uplink)
    return work


def _header(kind: OrderKind, root: str, lineage: str, settings: Settings, **more: Any) -> str:
    header = {"protocol": PROTOCOL_VERSION, "kind": kind, "root": root, "lineage": lineage}
    return json.dumps({**header, "settings": asdict(settings), **more}, separators=(",", ":"))


def order_content(
    template: RecordDict,
    *,
    root: str,
    lineage: str,
    settings: Settings,
    arrays: ArrayRecord | None = None,
    work: Work = _NO_WORK,
    entries: bytes = b"",
    statistics: Mapping[str, Tensor] | None = None,
    extras: bytes = b"",
    coded: Parcel | Follow | None = None,
) -> RecordDict:
    """Complete a content made by a Flower strategy (one ArrayRecord, one ConfigRecord) to an order.

    Args:
        template: the strategy's.
        root: the digest of ``W0``.
        lineage: what the client is to reach.
        settings: what all clients share.
        arrays: what this client gets instead of the template's arrays.
        work: what this client is to do.
        entries: ledger entries that it lacks, see `entries_to_bytes`.
        statistics: running statistics.
        extras: what else the method sends, see `extras_to_bytes`.
        coded: what the arrays hold, where they are coded.
    """
    (arrays_key, own), (config_key, config) = _only_arrays(template), _only_config(template)
    completed = ConfigRecord(dict(config))
    said = {name: value for name, value in asdict(work).items() if value != getattr(_NO_WORK, name)}
    more = {**({"work": said} if said else {}), **({} if coded is None else {CODED: coded.label()})}
    completed[HEADER] = _header("work", root, lineage, settings, **more)
    if extras:
        completed[EXTRAS] = extras
    if entries:
        completed[ENTRIES] = entries
    if statistics:
        completed[STATISTICS] = _to_bytes(statistics)
    return RecordDict({arrays_key: own if arrays is None else arrays, config_key: completed})


def extras_to_bytes(extras: Mapping[str, Tensor]) -> bytes:
    """Serialise what a method exchanges beside Trainables; nothing gives nothing."""
    return _to_bytes(extras) if extras else b""


def supply_content(
    kind: SupplyKind,
    *,
    root: str,
    lineage: str,
    settings: Settings,
    template: RecordDict | None = None,
    entries: Sequence[Entry] = (),
    base: Mapping[str, Tensor] | None = None,
) -> RecordDict:
    """A message that carries ledger entries or a whole base, as arrays, under the template's record names.

    It has the user's own settings too, since a client's function may read them before it makes its session.
    """
    tensors, chain = _flatten(entries) if kind == "entries" else (dict(base or {}), [])
    brain = [name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16]
    header = _header(kind, root, lineage, settings, chain=chain, bfloat16=brain)
    arrays_key, (config_key, config) = ARRAYS, (CONFIG, ConfigRecord())
    if template is not None:
        arrays_key, (config_key, config) = _only_arrays(template)[0], _only_config(template)
    return RecordDict({arrays_key: to_record(tensors), config_key: ConfigRecord({**config, HEADER: header})})


def _only_arrays(content: RecordDict) -> tuple[str, ArrayRecord]:
    records = list(content.array_records.items())
    if len(records) != 1:
        raise WireError(f"expected exactly one ArrayRecord, got {len(records)}")
    return records[0]


def _only_config(content: RecordDict) -> tuple[str, ConfigRecord]:
    records = list(content.config_records.items())
    if len(records) != 1:
        raise WireError(f"expected exactly one ConfigRecord, got {len(records)}")
    return records[0]


def _parse_header(config: ConfigRecord) -> dict[str, Any]:
    text = config.get(HEADER)
    if not isinstance(text, str):
        raise WireError(
            f"the message has no {HEADER!r} header: the other side does not run a strategy or session of this package"
        )
    try:
        header = json.loads(text)
        version = header["protocol"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the {HEADER!r} header does not parse: {error}") from error
    if version != PROTOCOL_VERSION:
        raise WireError(
            f"protocol-version is {version!r}, this side speaks {PROTOCOL_VERSION}: "
            "install the same version of fedloru-flwr on the server and on every client"
        )
    return dict(header)


def read_order(message: Message) -> Order:
    """Parse what the server sent.

    Raises:
        WireError: if it is not an order of this protocol.
    """
    (arrays_key, arrays), (config_key, config) = _only_arrays(message.content), _only_config(message.content)
    header = _parse_header(config)
    try:
        kind = header["kind"]
        settings = _settings(dict(header["settings"]))
        root, lineage = _digest(header["root"]), _digest(header["lineage"])
        brain = set(header.get("bfloat16", ()))
        work = _work(dict(header.get("work", {})))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"the {HEADER!r} header lacks or mistypes {error}") from error
    if kind not in ("work", "entries", "base"):
        raise WireError(f"unknown kind of order {kind!r}")
    tensors = {
        name: t.view(torch.bfloat16) if name in brain and t.dtype == torch.int16 else t
        for name, t in to_tensors(arrays).items()
    }
    parcel = follow = None
    if CODED in header:
        try:
            if "end" in header[CODED]:
                follow = Follow.labelled(header[CODED], tensors)
                tensors = {} if follow.start else tensors
            else:
                parcel, tensors = Parcel.labelled(header[CODED], tensors), {}
        except (TypeError, ValueError) as error:
            raise WireError(str(error)) from error
    entries: tuple[Entry, ...] = ()
    if kind == "entries":
        entries = _unflatten(tensors, header.get("chain"))
    elif ENTRIES in config:
        entries = entries_from_bytes(config[ENTRIES])
    statistics = _from_bytes(config[STATISTICS], "statistics")[0] if STATISTICS in config else {}
    return Order(
        kind,
        root,
        lineage,
        settings,
        tensors,
        entries,
        statistics,
        _round_of(config),
        arrays_key,
        config_key,
        work,
        _from_bytes(config[EXTRAS], "extras")[0] if EXTRAS in config else {},
        parcel,
        follow,
    )


def _round_of(config: ConfigRecord) -> int:
    server_round = config.get(SERVER_ROUND, 0)
    return server_round if isinstance(server_round, int) else 0


def template_round(template: RecordDict) -> int:
    """The round that an order made from this template is of, as its client reads it."""
    return _round_of(_only_config(template)[1])


def make_reply(
    order: Order,
    *,
    client: str,
    metrics: MetricRecord,
    tensors: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    silent_layers: Sequence[str] = (),
    extras: Mapping[str, Tensor] | None = None,
    lost_state: bool = False,
) -> Reply:
    """A client's reply as the server will read it; ``tensors`` for training, None for evaluation."""
    return Reply(
        client,
        order.lineage,
        {
            name: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).contiguous()
            for name, t in (tensors or {}).items()
        },
        dict(metrics),
        dict(sorted((statistics or {}).items())),
        tuple(silent_layers),
        dict(sorted((extras or {}).items())),
        order.server_round,
        lost_state,
    )


def _reply_header(reply: Reply) -> str:
    header: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "client": reply.client,
        "lineage": reply.lineage,
        "round": reply.server_round,
    }
    if reply.silent_layers:
        header["silent"] = list(reply.silent_layers)
    if reply.lost_state:
        header["lost-state"] = True
    return json.dumps(header, separators=(",", ":"))


def _attached(reply: Reply) -> dict[str, dict[str, Tensor]]:
    """The tensors that travel as bytes in the ConfigRecord, by their keys there."""
    return {key: of for key, of in ((STATISTICS, reply.statistics), (EXTRAS, reply.extras)) if of}


def reply_records(reply: Reply, arrays: ArrayRecord | None, arrays_key: str, config_key: str) -> RecordDict:
    """The content of a reply's message; without ``arrays`` one that has none."""
    attached = {key: _to_bytes(of) for key, of in _attached(reply).items()}
    config = ConfigRecord({HEADER: _reply_header(reply), **attached})
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    if arrays is not None:
        records[arrays_key] = arrays
    return RecordDict({**records, METRICS: MetricRecord(dict(reply.metrics)), config_key: config})


class ReadyReply(Message):
    """A reply whose parts are at hand, since it was made in this process or came packed together with others.

    To whoever looks at its content it is a message like any other; the records are made then. Who only wants to read,
    measure and judge it (`reply_of`, `size_of`) is spared their making. Flower itself, which knows `Message` alone,
    cannot send it.

    Args:
        reply: what it says.
        trained: whether it answers training.
        arrays_key: the name of its ArrayRecord.
        config_key: the name of its ConfigRecord.
        reply_to: the message it answers.
        size: what `size` gives, where it is known.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        trained: bool,
        arrays_key: str,
        config_key: str,
        reply_to: Message,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(RecordDict(), reply_to=reply_to)
        self.__dict__["_ready"] = True
        self._size = size
        self.reply, self.trained, self.arrays_key, self.config_key = reply, trained, arrays_key, config_key

    @property
    def is_ready(self) -> bool:
        """Whether nobody has had its records in hand, who might have changed them."""
        return "_ready" in self.__dict__

    @property
    def content(self) -> RecordDict:
        """The records, made at first use."""
        if self.__dict__.pop("_ready", False):
            arrays = to_record(self.reply.tensors) if self.trained else None
            self.__dict__["_content"] = reply_records(self.reply, arrays, self.arrays_key, self.config_key)
        return super().content

    @content.setter
    def content(self, value: RecordDict) -> None:
        self.__dict__.pop("_ready", None)
        self.__dict__["_content"] = value

    def size(self) -> tuple[int, int]:
        """The bytes of its content, as `content_bytes` counts them, and how many of them are extras.

        The bytes of arrays follow from their names, shapes and dtypes, unless two are equal, which are sent once.

        Raises:
            ValueError, TypeError: Flower cannot send it, as with an integer of 70 bits among its metrics.
        """
        if self._size is not None:
            return self._size
        reply, arrays = self.reply, 0
        if self.trained:
            known = _size_of_arrays(tuple((name, t.shape, t.dtype) for name, t in reply.tensors.items()))
            if known is None or _any_equal(reply.tensors, known.alike):
                content = reply_records(reply, to_record(reply.tensors), self.arrays_key, self.config_key)
                self._size = content_bytes(content), extras_bytes(content)
                return self._size
            arrays = known.size
        attached = {key: len(_to_bytes(of)) for key, of in _attached(reply).items()}
        own = _size_beside_arrays(
            self.arrays_key if self.trained else None,
            self.config_key,
            tuple((name, type(value), _like(value)) for name, value in reply.metrics.items()),
            len(_reply_header(reply)),
            tuple(attached.items()),
        )
        self._size = own + arrays, attached.get(EXTRAS, 0)
        return self._size


def _like(value: Any) -> Any:
    """What stands for a metric where only its size counts: every float has the same, an integer has its own."""
    if isinstance(value, list):
        return tuple(_like(one) for one in value)
    return 0.5 if isinstance(value, float) else value


@lru_cache(4096)
def _size_beside_arrays(
    arrays_key: str | None,
    config_key: str,
    metrics: tuple[tuple[str, type, Any], ...],
    header: int,
    attached: tuple[tuple[str, int], ...],
) -> int:
    """The bytes of a reply's content, as `content_bytes` counts them, without those of its arrays.

    They follow from names and lengths: the records in it refer to each other by digests of one length.

    Args:
        arrays_key: the name of its ArrayRecord; None if it has none.
        config_key: the name of its ConfigRecord.
        metrics: by name a type and a value of the same size.
        header: the header's length.
        attached: the lengths of what is attached as bytes, by name.
    """
    config = ConfigRecord({HEADER: " " * header, **{name: bytes(length) for name, length in attached}})
    said = MetricRecord({name: list(like) if isinstance(like, tuple) else like for name, _, like in metrics})
    arrays: dict[str, ArrayRecord] = {} if arrays_key is None else {arrays_key: ArrayRecord()}
    content = RecordDict({**arrays, METRICS: said, config_key: config})
    return content_bytes(content, dict.fromkeys(map(id, arrays.values()), 0))


_CHUNK = 4 * 2**20  # above it, Flower sends an array in parts, of which equal ones are sent once


class _ArraysSize(NamedTuple):
    """The bytes of an ArrayRecord whose arrays all differ, and the names of those that might not: of equal form."""

    size: int
    alike: tuple[tuple[str, ...], ...]


@lru_cache(64)
def _size_of_arrays(like: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> _ArraysSize | None:
    """What follows from names, shapes and dtypes; None where these do not tell the size."""
    sized = (dtype.is_floating_point or dtype == torch.uint8 for _, _, dtype in like)
    if not all(sized) or not all(0 < shape.numel() * 8 < _CHUNK for _, shape, _ in like):
        return None
    tensors = {name: torch.full(shape, float(i), dtype=dtype) for i, (name, shape, dtype) in enumerate(like)}
    alike: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, shape, dtype in like:
        alike.setdefault((shape, dtype), []).append(name)
    several = tuple(tuple(names) for names in alike.values() if len(names) > 1)
    return _ArraysSize(content_bytes(to_record(tensors)), several)


def _any_equal(tensors: Mapping[str, Tensor], alike: Sequence[Sequence[str]]) -> bool:
    """Whether two tensors of one of these groups are the same, bit for bit."""
    return any(len({tensors[name].detach().cpu().numpy().tobytes() for name in names}) < len(names) for names in alike)


def size_of(message: Message) -> tuple[int, int]:
    """The bytes of a reply's content, and how many of them are extras."""
    if isinstance(message, ReadyReply) and message.is_ready:
        return message.size()
    return content_bytes(message.content), extras_bytes(message.content)


def cannot_send(error: Exception) -> str:
    """The reason of the error reply that takes the place of a reply that Flower cannot send."""
    return f"Flower cannot send its reply: {error}"


def reply_of(message: Message, *, trained: bool) -> Reply:
    """What a reply says, see `read_reply`."""
    if isinstance(message, ReadyReply) and message.is_ready and message.trained == trained:
        return message.reply
    return read_reply(message.content, trained=trained)


def answer_content(order: Order, answer: Answer) -> RecordDict:
    """An answer as a reply of its own."""
    return RecordDict({order.config_key: ConfigRecord({HEADER: str(answer)})})


def find_answer(message: Message) -> Answer | None:
    """The answer a reply consists of, or None if it is something else."""
    if message.has_error():
        return Answer.find(message.error.reason or "")
    if isinstance(message, ReadyReply) and message.is_ready:
        return None
    for config in message.content.config_records.values():
        if isinstance(text := config.get(HEADER), str) and (answer := Answer.find(text)):
            return answer
    return None


def worker_died(message: Message) -> bool:
    """Whether it is a simulation's answer for a client whose Ray worker has died (of memory, or a crash).

    Ask only in a simulation: in a deployment the text is the client's own.
    """
    if not message.has_error() or message.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return False
    return _DEAD_WORKER.match(message.error.reason or "") is not None


def error_reason(message: Message) -> str:
    """What went wrong on the client, in one line: the exception's type and text.

    Flower's reason is that line on a deployed client; in a simulation it is the text of a whole remote traceback, with
    process ids and addresses that differ from run to run.
    """
    reason = _COLOUR.sub("", message.error.reason or "")
    head, marker, said = reason.rpartition(_REMOTE_MARKER)
    if marker:
        said = said.removesuffix("'>")
        kind = re.search(rf"^(?:[\w.]+\.)?(\w+): {re.escape(said[:80])}", head, re.MULTILINE)
        reason = f"{kind[1]}: {said}" if kind else said
    elif plain := re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>:<'(.*)'>", reason, re.DOTALL):
        reason = f"{plain[1]}: {plain[2]}"
    line = " ".join(reason.split()) or "no reason given"
    return line if len(line) <= _REASON_LENGTH else f"{line[:_REASON_LENGTH]}..."


def read_reply(content: RecordDict, *, trained: bool) -> Reply:
    """Parse a reply to an order of training (``trained``) or evaluation; its tensors are lent, see `lent_tensors`.

    Raises:
        WireError: if it is not one.
    """
    _, config = _only_config(content)
    header = _parse_header(config)
    metric_records = list(content.metric_records.values())
    if len(metric_records) != 1:
        raise WireError(f"expected exactly one MetricRecord, got {len(metric_records)}")
    tensors = lent_tensors(_only_arrays(content)[1]) if trained else {}
    statistics = _from_bytes(config[STATISTICS], "statistics")[0] if STATISTICS in config else {}
    silent = header.get("silent", [])
    if not isinstance(silent, list):
        raise WireError(f"the {HEADER!r} header's list of silent layers is a {type(silent).__name__}")
    server_round = header.get("round", 0)
    if type(server_round) is not int:
        raise WireError(f"the {HEADER!r} header's round is a {type(server_round).__name__}")
    return Reply(
        _client_name(header.get("client", "")),
        str(header.get("lineage", "")),
        tensors,
        dict(metric_records[0]),
        statistics,
        tuple(map(str, silent)),
        _from_bytes(config[EXTRAS], "extras")[0] if EXTRAS in config else {},
        server_round,
        header.get("lost-state") is True,
    )


def payload_bytes(message: Message) -> int:
    """How many bytes of tensors a reply holds, told without parsing or serialising any of them."""
    if isinstance(message, ReadyReply) and message.is_ready:
        reply = message.reply
        return sum(t.nbytes for part in (reply.tensors, reply.statistics, reply.extras) for t in part.values())
    content = message.content
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    configs = (value for record in content.config_records.values() for value in record.values())
    return arrays + sum(len(value) for value in configs if isinstance(value, bytes | str))


def extras_bytes(content: RecordDict) -> int:
    """How much of a message's content its extras are."""
    found = (config.get(EXTRAS) for config in content.config_records.values())
    return sum((len(extras) for extras in found if isinstance(extras, bytes)), 0)


def clean_content(tensors: Mapping[str, Tensor] | None, metrics: Mapping[str, Any], arrays_key: str) -> RecordDict:
    """A judged reply as plain Flower would have it: Trainables (None after evaluation) and metrics, nothing else."""
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    if tensors is not None:
        records[arrays_key] = to_record(tensors)
    return RecordDict({**records, METRICS: MetricRecord(dict(metrics))})


@dataclass(frozen=True)
class Enrolment:
    """What a client tells of itself before the first round: who it is, and the largest rank it can train (0: any)."""

    client: str
    version: str = field(default="")
    rank: int = 0


def enrolment_query() -> RecordDict:
    """Ask a client who it is."""
    return RecordDict({CONFIG: ConfigRecord({HEADER: json.dumps({"protocol": PROTOCOL_VERSION, "kind": "enrol"})})})


def enrolment_reply(query: RecordDict, enrolment: Enrolment) -> RecordDict:
    """Say who one is.

    Raises:
        WireError: if the query is not one of this protocol.
    """
    key, config = _only_config(query)
    _parse_header(config)
    header = {"protocol": PROTOCOL_VERSION, **asdict(enrolment)}
    return RecordDict({key: ConfigRecord({HEADER: json.dumps(header)})})


def read_enrolment(content: RecordDict) -> Enrolment:
    """Parse what a client told of itself."""
    header = _parse_header(_only_config(content)[1])
    client = _client_name(header.get("client"))
    if not client:
        raise WireError("a client's identity must not be empty")
    rank = header.get("rank", 0)
    if type(rank) is not int or not 0 <= rank < 2**31:
        raise WireError(f"a client's largest rank must be a whole number, got {str(rank)[:80]!r}")
    return Enrolment(client, str(header.get("version", ""))[:_NAME_LENGTH], rank)


def _client_name(raw: object) -> str:
    if not isinstance(raw, str) or len(raw) > _NAME_LENGTH:
        raise WireError(f"a client's identity must be a text of at most {_NAME_LENGTH} letters, got {str(raw)[:80]!r}")
    return raw
