"""Replies that are wrong: a valid one with one field changed, or with several, or something else altogether."""

import json
import math
import random
import string

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from safetensors.torch import load, save

from fedloru_flwr import wire

BARE = json.dumps({"protocol": wire.PROTOCOL_VERSION})
DEEP = "[" * 3000 + "]" * 3000
JSON_VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**70,
    1.5,
    math.nan,
    math.inf,
    "",
    "1",
    "0" * 64,
    "ü\0",
    [],
    [1],
    {},
    {"a": 1},
)
NUMBERS = (0, -1, -7, 1, 2, 10**6, 2**62, -(2**62), 2**70, 0.0, -0.0, 0.5, 1e300, -1e300, math.nan, math.inf, -math.inf)
RECORDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}
DTYPES = (torch.float64, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8)


class Malformer:
    """Changes valid replies at random, by its seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"malformed {seed}")

    def reply(self, valid: RecordDict) -> tuple[str, RecordDict | Error]:
        """What was done to a copy of a valid reply, and what came of it. Nine of ten have one field changed."""
        content = RecordDict({key: type(record)(dict(record)) for key, record in valid.items()})
        what = self.rng.random()
        if what < 0.9:
            return self.change_one(content), content
        if what < 0.95:
            told = [self.change_one(content) for _ in range(self.rng.randint(2, 5))]
            return f"several: {', '.join(told)}", content
        if what < 0.98:
            return "error", Error(self.rng.choice([0, 1, 2, 99]), self.text())
        return "something else", RecordDict({self.text(): self.record() for _ in range(self.rng.randint(0, 4))})

    def change_one(self, content: RecordDict) -> str:
        """Change one field in place; say which and how."""
        # An earlier change may have put a record of another kind there.
        present = [*(kind for kind, record in RECORDS.items() if isinstance(content.get(kind), record)), "records"]
        where = self.rng.choices(present, [4 if kind in ("config", "arrays") else 1 for kind in present])[0]
        return f"{where}: {getattr(self, f'_change_{where}')(content)}"

    def text(self) -> str:
        length = self.rng.choice([0, 1, 8, 200])
        plain = "".join(self.rng.choices(string.printable + "é\x1b", k=length))
        held = self.rng.choice(["", "0" * 64, "abc"])
        kind = self.rng.choice(["need-base", "stored", "dance"])
        return self.rng.choice([plain, plain, f"{plain}fedloru-answer kind={kind} client=%00 held={held}.", DEEP])

    def record(self) -> ArrayRecord | MetricRecord | ConfigRecord:
        return self.rng.choice(
            [
                ArrayRecord(),
                ArrayRecord({"a": torch.ones(2)}),
                MetricRecord(),
                MetricRecord({"num-examples": self.rng.choice(NUMBERS)}),
                ConfigRecord(),
                ConfigRecord({wire.HEADER: self.text()}),
                ConfigRecord({wire.HEADER: json.dumps({"protocol": wire.PROTOCOL_VERSION, "client": "1"})}),
            ]
        )

    def _change_records(self, content: RecordDict) -> str:
        name = self.rng.choice(list(content))
        match self.rng.choice(["drop", "twice", "rename", "empty", "another kind", "one more"]):
            case "drop":
                del content[name]
                return f"no {name}"
            case "twice":
                content["again"] = type(content[name])(dict(content[name]))
                return f"{name} twice"
            case "rename":
                record = content.pop(name)
                content["renamed"] = record
                return f"{name} under another name"
            case "empty":
                content[name] = type(content[name])()
                return f"empty {name}"
            case "another kind":
                del content[name]
                content[name] = self.rng.choice([kind for key, kind in RECORDS.items() if key != name])()
                return f"{name} of another kind"
            case _:
                content["more"] = self.record()
                return "one record more"

    def _change_metrics(self, content: RecordDict) -> str:
        values = dict(content["metrics"])
        name = self.rng.choice(list(values) or ["num-examples"])
        match self.rng.choice(["drop", "value", "value", "value", "list", "rename", "more"]):
            case "drop":
                values.pop(name, None)
                told = f"no {name}"
            case "value":
                values[name] = self.rng.choice(NUMBERS)
                told = f"{name} = {values[name]}"
            case "list":
                values[name] = self.rng.choice([[], [1], [1, 2], [0.5], [math.nan]])
                told = f"{name} = {values[name]}"
            case "rename":
                values[name.upper()] = values.pop(name, 1)
                told = f"{name} under another name"
            case _:
                values["more"] = self.rng.choice(NUMBERS)
                told = "one more"
        content["metrics"] = MetricRecord(values)
        return told

    def _change_arrays(self, content: RecordDict) -> str:
        if self.rng.random() < 0.5:
            return self._change_an_array(content)
        tensors = dict(content["arrays"].to_torch_state_dict()) if self._parses(content) else {}
        told, tensors = self._change_tensors(tensors)
        content["arrays"] = ArrayRecord(tensors)
        return told

    def _parses(self, content: RecordDict) -> bool:
        """Whether an earlier change has left the arrays readable."""
        try:
            content["arrays"].to_torch_state_dict()
        except Exception:
            return False
        return True

    def _change_an_array(self, content: RecordDict) -> str:
        """Change one field of one array as it is sent."""
        arrays = dict(content["arrays"])
        if not arrays:
            return "nothing"
        name = self.rng.choice(list(arrays))
        fields = {key: getattr(arrays[name], key) for key in ("dtype", "shape", "stype", "data")}
        changed = self.rng.choice(list(fields))
        fields[changed] = {
            "dtype": lambda: self.rng.choice(["float16", "nonsense", "", "object"]),
            "shape": lambda: self.rng.choice([(), (1,), (10**9, 10**9), (-1, 4)]),
            "stype": lambda: self.rng.choice(["", "pickle", "torch.Tensor"]),
            "data": lambda: self._change_bytes(fields["data"]),
        }[changed]()
        arrays[name] = Array(**fields)
        content["arrays"] = ArrayRecord(arrays)
        return f"{changed} of an array"

    def _change_bytes(self, data: bytes) -> bytes:
        changed = bytearray(data)
        match self.rng.choice(["cut", "head", "anywhere", "empty", "random", "longer"]):
            case "cut":
                return bytes(changed[: self.rng.randrange(len(changed) or 1)])
            case "head" if changed:
                changed[self.rng.randrange(min(len(changed), 100))] = self.rng.randrange(256)
                return bytes(changed)
            case "anywhere" if changed:
                changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
                return bytes(changed)
            case "random":
                return self.rng.randbytes(self.rng.choice([1, 8, 300]))
            case "longer":
                return data + self.rng.randbytes(5)
        return b""

    def _change_tensors(self, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
        if not tensors:
            return "one tensor from nothing", {"spy": torch.ones(1)}
        name = self.rng.choice(list(tensors))
        tensor = tensors[name].clone()
        match self.rng.choice(["drop", "more", "rename", "shape", "dtype", "order", "NaN", "Inf", "empty", "none"]):
            case "drop":
                return "a tensor missing", {key: value for key, value in tensors.items() if key != name}
            case "more":
                return "a tensor too many", {**tensors, "spy": torch.ones(2)}
            case "rename":
                return "a tensor renamed", {f"{key}x" if key == name else key: value for key, value in tensors.items()}
            case "shape":
                other = self.rng.choice([tensor.reshape(-1, 1), tensor[:0], tensor[None], tensor.reshape(-1)[0]])
                return "another shape", {**tensors, name: other.contiguous()}
            case "dtype":
                return "another dtype", {**tensors, name: tensor.to(self.rng.choice(DTYPES))}
            case "order":
                return "another order", dict(self.rng.sample(list(tensors.items()), len(tensors)))
            case "NaN":
                tensor.view(-1)[self.rng.randrange(tensor.numel())] = math.nan
                return "NaN", {**tensors, name: tensor}
            case "Inf":
                tensor.view(-1)[self.rng.randrange(tensor.numel())] = self.rng.choice([math.inf, -math.inf])
                return "Inf", {**tensors, name: tensor}
            case "empty":
                return "an empty tensor", {**tensors, name: torch.empty(0)}
        return "no tensors", {}

    def _change_config(self, content: RecordDict) -> str:
        config = content["config"]
        field = self.rng.choice([wire.HEADER, wire.HEADER, wire.STATISTICS, wire.EXTRAS, "more"])
        if field == "more":
            config[self.rng.choice(["note", "fedloru-entries"])] = self.rng.choice(["x", b"x", 1, [1.5]])
            return "one field more"
        if self.rng.random() < 0.15 or field not in config:
            config.pop(field, None)
            return f"no {field}"
        if self.rng.random() < 0.15:
            config[field] = self.rng.choice([1, 1.5, True, [1, 2], b"", b"{}", self.text()])
            return f"{field} of another type"
        if field == wire.HEADER:
            return self._change_header(config)
        payload = config[field]
        if isinstance(payload, bytes) and self.rng.random() < 0.5:
            try:
                told, tensors = self._change_tensors(load(payload))
                config[field] = save(tensors)
                return f"{field}: {told}"
            except Exception:
                pass  # an earlier change has made it unreadable
        config[field] = self._change_bytes(payload if isinstance(payload, bytes) else b"")
        return f"{field}: other bytes"

    def _change_header(self, config: ConfigRecord) -> str:
        try:
            header = dict(json.loads(config[wire.HEADER]))
        except (ValueError, TypeError, RecursionError):
            header = {}
        key = self.rng.choice([*header, "silent", "another"])
        match self.rng.choice(["drop", "value", "value", "value", "text", "cut"]):
            case "drop":
                header.pop(key, None)
                told = f"header without {key}"
            case "value":
                header[key] = self.rng.choice(JSON_VALUES)
                told = f"header with {key} = {header[key]!r}"
            case "text":
                config[wire.HEADER] = self.rng.choice([self.text(), "null", "3", "[]", "{}", DEEP, BARE])
                return "another header"
            case _:
                text = json.dumps(header)
                config[wire.HEADER] = text[: self.rng.randrange(len(text))]
                return "half a header"
        config[wire.HEADER] = json.dumps(header)
        return told
