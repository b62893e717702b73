"""A grid on which a plan's faults happen, and a clock that a client's silence advances."""

import math
import shutil
from pathlib import Path

import torch
from fault_plan import FaultPlan
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from toy_federation import WatchedGrid, each_its_own, set_header

from fedloru_flwr import wire
from fedloru_flwr.strategies import federated, orders

SILENT = ("stalls", "dies")


class Clock:
    """Stands in for the `time` module of a strategy: it goes on only where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def installed(self, patch) -> "Clock":
        for module in (federated, orders):
            patch.setattr(module, "time", self)
        return self


class FaultyGrid(WatchedGrid):
    """Clients that are machines of their own, on which the faults of a plan happen in training."""

    complete = True

    def __init__(self, app, count, plan: FaultPlan, clock: Clock, *, node_configs) -> None:
        super().__init__(app, count, node_configs=node_configs, actor=each_its_own)
        self.plan, self.clock = plan, clock
        self.happened: set[tuple[int, str]] = set()
        self.forgotten: set[tuple[int, str]] = set()
        self._old: dict[str, RecordDict] = {}

    def send_and_receive(self, messages, *, timeout=None):
        """The replies that come in time; for one that does not, the whole of it is spent."""
        assert timeout is not None
        messages = list(messages)
        silent = {m.metadata.dst_node_id for m in messages if self._fault(m) in SILENT}
        replies = [r for r in super().send_and_receive(messages) if r.metadata.src_node_id not in silent]
        if silent:
            self.clock.sleep(timeout)
        return replies

    def _client(self, message):
        return str(message.metadata.dst_node_id - 1000)

    def _fault(self, message):
        if message.metadata.message_type != "train":
            return None
        return self.plan.fault_of(self.watch.server_round, self._client(message))

    def _handle(self, message):
        server_round, client, fault = self.watch.server_round, self._client(message), self._fault(message)
        if client in self.plan.forgetful.get(server_round, ()) and (server_round, client) not in self.forgotten:
            self.forgotten.add((server_round, client))
            self._forget(message, disk=True)
        if fault is not None:
            self.happened.add((server_round, client))
        if fault == "dies":
            self._forget(message, disk=False)
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        if fault == "raises":
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'OSError'>:<'lost'>"), reply_to=message)
        reply = super()._handle(message)
        if not reply.has_content() or wire.find_answer(reply) is not None:
            return reply
        if fault is None:
            self._old[client] = copied(reply.content)
            return reply
        return spoil(reply, fault, message, self._old.get(client))

    def _forget(self, message, *, disk: bool) -> None:
        """A process that is gone, and with it, perhaps, what lay on its disk."""
        node = message.metadata.dst_node_id
        self.actors.pop(self.actor(message), None)
        if disk:
            shutil.rmtree(Path(str(self._contexts[node].node_config["store-path"])), ignore_errors=True)


def copied(content: RecordDict) -> RecordDict:
    return RecordDict({key: type(record)(dict(record)) for key, record in content.items()})


def spoil(reply: Message, fault: str, asked: Message, old: RecordDict | None) -> Message:
    """The reply as a faulty client would send it."""
    content = reply.content
    arrays = dict(content["arrays"].to_torch_state_dict())
    first, *_ = arrays
    metrics = dict(content["metrics"])
    match fault:
        case "stalls":
            pass  # it comes too late, see `FaultyGrid.send_and_receive`
        case "error reply":
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory"), reply_to=asked)
        case "missing key":
            del arrays[first]
        case "extra key":
            arrays["spy"] = torch.ones(2)
        case "wrong shape":
            arrays[first] = arrays[first].reshape(-1)
        case "wrong dtype":
            arrays[first] = arrays[first].double()
        case "wrong order":
            arrays = dict(reversed(arrays.items()))
        case "NaN":
            arrays[first].view(-1)[0] = math.nan
        case "Inf":
            arrays[first].view(-1)[-1] = -math.inf
        case "wrong lineage":
            set_header(content, lineage="0" * 64)
        case "bytes that do not parse":
            broken = dict(content["arrays"])
            broken[first] = Array("float32", tuple(arrays[first].shape), "numpy.ndarray", b"\x93NUMPY of no use")
            content["arrays"] = ArrayRecord(broken)
        case "num-examples of 0":
            metrics["num-examples"] = 0
        case "negative num-examples":
            metrics["num-examples"] = -7
        case "NaN num-examples":
            metrics["num-examples"] = math.nan
        case "text for metrics":
            del content["metrics"]
            content["metrics"] = ConfigRecord({"num-examples": "many"})
        case "missing metrics":
            del content["metrics"]
        case "another round":
            set_header(content, round=10**6)
        case "absurd norm":
            arrays = {key: 1e6 * tensor + 1e6 for key, tensor in arrays.items()}
        case "raises after training":
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'OSError'>:<'late'>"), reply_to=asked)
        case "old reply":
            assert old is not None
            reply.content = copied(old)
        case _:
            raise AssertionError(fault)
    if fault in ("missing key", "extra key", "wrong shape", "wrong dtype", "wrong order", "NaN", "Inf", "absurd norm"):
        content["arrays"] = ArrayRecord(arrays)
    if "num-examples" in fault:
        content["metrics"] = MetricRecord(metrics)
    return reply
