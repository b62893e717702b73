"""Many clients' messages in one, for hosts that train many clients: the rest of the wire, beside `fedloru_flwr.wire`.

A packet of orders holds each different content once and, for every client, which of them is its own. A packet of
replies holds those of equal shapes stacked, one array a key with a leading client axis. What every client by itself
would have sent is told from them exactly, so that the strategies see, judge and count the very same messages.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedloru_flwr import wire

ACTION = "hosted"  # of the Flower messages that are packets
_PARTS = ("tensors", "statistics", "extras")
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class Packet:
    """Many messages' contents as one value.

    Attributes:
        header: what JSON can hold.
        stacks: tensors of many replies, by ``group/part/key``.
        contents: contents that are passed on as they are.
    """

    header: dict[str, Any]
    stacks: dict[str, Tensor] = field(default_factory=dict)
    contents: list[RecordDict] = field(default_factory=list)

    def to_record_dict(self) -> RecordDict:
        """The packet as Flower sends it."""
        records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {}
        names = []
        for index, content in enumerate(self.contents):
            names.append(list(content))
            records |= {f"{index}/{place}": record for place, record in enumerate(content.values())}
        header = json.dumps({"protocol": wire.PROTOCOL_VERSION, "names": names, **self.header})
        records[wire.CONFIG] = ConfigRecord({wire.HEADER: header})
        if self.stacks:
            records[wire.ARRAYS] = wire.to_record(self.stacks)
        return RecordDict(records)

    @classmethod
    def from_record_dict(cls, content: RecordDict) -> "Packet":
        """Parse what `to_record_dict` made.

        Raises:
            WireError: if it is something else.
        """
        try:
            header = json.loads(content.config_records[wire.CONFIG][wire.HEADER])  # type: ignore[arg-type]
            if header.pop("protocol") != wire.PROTOCOL_VERSION:
                raise wire.WireError("a packet of another version: install the same fedloru-flwr everywhere")
            contents = [
                RecordDict({name: content[f"{index}/{place}"] for place, name in enumerate(names)})
                for index, names in enumerate(header.pop("names"))
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise wire.WireError(f"a packet does not parse: {error}") from error
        arrays = content.array_records.get(wire.ARRAYS)
        return cls(header, {} if arrays is None else wire.to_tensors(arrays), contents)


def pack_orders(messages: Sequence[Message], shares: Sequence[int] = ()) -> Packet:
    """Orders of one type, for a host.

    Args:
        messages: the orders.
        shares: how many of them, one after the other, are to be carried out together each time; by default all are.
    """
    places: dict[int, int] = {}
    contents: list[RecordDict] = []
    clients = []
    for message in messages:
        content = message.content
        if id(content) not in places:
            places[id(content)] = len(contents)
            contents.append(content)
        clients.append([message.metadata.dst_node_id, places[id(content)]])
    kind = messages[0].metadata.message_type
    header = {"type": kind, "clients": clients, "shares": list(shares) or [len(messages)]}
    return Packet(header, contents=contents)


def unpack_orders(packet: Packet) -> list[list[Message]]:
    """The orders by shares, addressed to the clients' node ids; those of equal content share it.

    Raises:
        WireError: if the packet holds something else.
    """
    try:
        kind = str(packet.header["type"])
        messages = iter(
            make_message(_metadata(int(node), kind), packet.contents[int(place)])
            for node, place in packet.header["clients"]
        )
        return [list(itertools.islice(messages, int(count))) for count in packet.header["shares"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise wire.WireError(f"a packet of orders does not parse: {error}") from error


def _metadata(node_id: int, kind: str) -> Metadata:
    return Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=_DAY,
        message_type=kind,
    )


def pack_replies(replies: Sequence[Message]) -> Packet:
    """The replies of a host's clients, in order."""
    told: list[dict[str, Any]] = []
    groups: dict[Any, tuple[int, list[wire.Reply]]] = {}
    contents: list[RecordDict] = []
    for message in replies:
        if message.has_error():
            told.append({"error": [message.error.code, message.error.reason]})
        elif isinstance(message, wire.ReadyReply) and message.is_ready:
            try:
                size = message.size()
            except (ValueError, TypeError) as error:
                told.append({"error": [ErrorCode.CLIENT_APP_RAISED_EXCEPTION, wire.cannot_send(error)]})
                continue
            reply = message.reply
            number, members = groups.setdefault(_shapes(reply), (len(groups), []))
            plain = {name: value for name, value in vars(reply).items() if name not in _PARTS}
            keys = [message.trained, message.arrays_key, message.config_key]
            told.append({"reply": plain, "group": number, "row": len(members), "keys": keys, "size": size})
            members.append(reply)
        else:
            told.append({"content": len(contents)})
            contents.append(message.content)
    stacks = {
        f"{number}/{part}/{key}": torch.stack([getattr(reply, part)[key] for reply in members])
        for number, members in groups.values()
        for part in _PARTS
        for key in getattr(members[0], part)
    }
    return Packet({"replies": told}, stacks, contents)


def _shapes(reply: wire.Reply) -> Any:
    return tuple(
        (part, tuple((key, tensor.shape, tensor.dtype) for key, tensor in getattr(reply, part).items()))
        for part in _PARTS
    )


def unpack_replies(packet: Packet, messages: Sequence[Message]) -> list[Message]:
    """The replies to these messages, as each client by itself would have sent them.

    Raises:
        WireError: if the packet holds something else.
    """
    try:
        told = packet.header["replies"]
        if len(told) != len(messages):
            raise ValueError(f"{len(told)} replies to {len(messages)} messages")
        parts: dict[int, dict[str, dict[str, Tensor]]] = {}
        for name, stack in packet.stacks.items():
            number, part, key = name.split("/", 2)
            parts.setdefault(int(number), {one: {} for one in _PARTS})[part][key] = stack
        return [_reply(one, parts, packet.contents, message) for one, message in zip(told, messages, strict=True)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise wire.WireError(f"a packet of replies does not parse: {error}") from error


def _reply(
    told: Mapping[str, Any],
    parts: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
    contents: Sequence[RecordDict],
    message: Message,
) -> Message:
    if "error" in told:
        code, reason = told["error"]
        return Message(Error(code, reason), reply_to=message)
    if "content" in told:
        return Message(contents[told["content"]], reply_to=message)
    plain, row = dict(told["reply"]), told["row"]
    plain["silent_layers"] = tuple(plain["silent_layers"])
    stacks = parts.get(told["group"], {})
    tensors = {part: {key: stack[row] for key, stack in stacks.get(part, {}).items()} for part in _PARTS}
    trained, arrays_key, config_key = told["keys"]
    size, extras = told["size"]
    return wire.ReadyReply(
        wire.Reply(**{**plain, **tensors}),
        trained=trained,
        arrays_key=arrays_key,
        config_key=config_key,
        reply_to=message,
        size=(size, extras),
    )
