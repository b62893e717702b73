"""The run's settings: one flat table of kebab-case keys, checked before any client starts.

The same keys stand in ``[tool.flwr.app.config]``, in a CONF.toml and behind ``fedloru run -c``. Defaults, ranges and
help are declared here and nowhere else.
"""

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.suggest import did_you_mean

Scalar = bool | int | float | str


TRACKERS = ("tensorboard", "wandb", "mlflow")

# A key, then a value in double quotes, in single quotes, or without blanks and quotes; then a blank or the end.
_PAIR = re.compile(r"""([^\s=]+)=("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"']*)(?:\s+|$)""")


# What a run may be continued with another value of: its result does not depend on it.
_FREE_WHEN_CONTINUED = (
    "output-dir",
    "run-name",
    "resume",
    "data-path",
    "init-adapter",
    "device",
    "checkpoint-every",
    "timeout",
    "max-failure-fraction",
    "aggregation-error",
    "max-total-bytes",
    "target-accuracy",
    "track",
    "track-project",
)


_NETWORKS = ("cnn", "mlp", "resnet10", "resnet18")
PRETRAINED = "hf:"  # goes before the name of a model of the transformers library
# What only models of the transformers library have, or only those that learn to write.
_OF_PRETRAINED = ("task", "max_length", "accumulate_steps", "gradient_checkpointing", "base_precision")
_OF_LANGUAGE = ("packing", "prompt_template", "exact_match_samples", "generated_samples", "max_new_tokens")


class ConfigError(ValueError):
    """A setting that makes no sense; the message names the key, the value and what is allowed."""


def _setting(
    default: Scalar,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
) -> Any:
    bounds = {"choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; the field ``local_epochs`` is the key ``local-epochs``."""

    algorithm: str = _setting("fedloru", "the method", choices=tuple(ALGORITHMS))
    num_server_rounds: int = _setting(40, "rounds T", low=1)
    num_clients: int = _setting(100, "clients K; a simulation has as many SuperNodes", low=1)
    fraction_train: float = _setting(0.5, "share C of the clients that train in a round", above=0, high=1)
    fraction_evaluate: float = _setting(
        0.0,
        "share that evaluates on its own held-out data (at the end all do); 0: only personal models, at the end",
        low=0,
        high=1,
    )
    evaluate_every: int = _setting(1, "rounds between these evaluations", low=1)
    evaluate_in_training: bool = _setting(
        False, "clients that train evaluate what they received as well, in the same message"
    )
    local_epochs: int = _setting(5, "epochs E of a client in a round", low=1)
    batch_size: int = _setting(8, "samples a step; a smaller partition still trains", low=1)
    optimizer: str = _setting("sgd", "the clients' optimiser", choices=("sgd", "adamw"))
    learning_rate: float = _setting(0.1, "the clients' learning rate", above=0)
    learning_rate_schedule: str = _setting(
        "constant", "over the rounds; step divides by ten after each third", choices=("constant", "cosine", "step")
    )
    learning_rate_restart: bool = _setting(False, "start the schedule anew after each accumulation")
    momentum: float = _setting(0.9, "SGD's momentum (AdamW's first beta)", low=0, high=0.999999)
    weight_decay: float = _setting(0.0, "of the trained parameters", low=0)
    max_grad_norm: float = _setting(5.0, "clip the gradient's norm; 0: do not", low=0)
    rank: int = _setting(4, "rank r of the factors", low=1)
    alpha: float = _setting(8.0, "the update is alpha / rank * B A", above=0)
    target_modules: str = _setting(
        "auto",
        "layers to factorise: auto, or names, suffixes and types, by commas; of hf: models, auto takes all linear "
        "layers but the output layer",
    )
    dense_leaves: str = _setting(
        "auto",
        "what else is trained: all, none, or names and prefixes, by commas; auto is all, and for hf: models none, or "
        "the new head of a classifier",
    )
    adapter: str = _setting("auto", "the factors' family; auto is the method's own", choices=("auto", "lora", "loha"))
    ranks: str = _setting("", 'ranks by share of the clients, such as "4:0.5,16:0.5", or a .toml or .json file')
    accumulate_every: int = _setting(0, "rounds tau between accumulations; 0 is the method's own (FedLoRU: 10)", low=0)
    accumulate_at: str = _setting("", 'accumulate after these rounds instead, such as "50,100"')
    accumulate_when: str = _setting(
        "",
        "accumulate when this has plateaued instead, accumulate-every rounds apart at most: the training loss, or the "
        "stable rank of the factors' product",
        choices=("", "loss", "rank"),
    )
    reinit: str = _setting("reset", "factors after an accumulation", choices=("reset", "keep"))
    accumulate_into: str = _setting("merge", "how clients hold the past", choices=("merge", "stack"))
    personal_rank: int = _setting(0, "pfedloru: rank of the personal pair; 0 is rank", low=0)
    personal_alpha: float = _setting(0.0, "pfedloru: alpha of the personal pair; 0 takes the global scale", low=0)
    global_epochs: int = _setting(0, "pfedloru: epochs of the global pair; 0 is the rest of local-epochs", low=0)
    personal_epochs: int = _setting(0, "pfedloru: epochs of the personal pair; 0 is a quarter of local-epochs", low=0)
    nested_scale: float = _setting(1.0, "mfedloru: s_A = s_B of nested pairs; 1: as fast as the whole pair", above=0)
    proximal_mu: float = _setting(0.0, "FedProx: mu of mu/2 ||w - w_0||^2 in the clients' loss; 0 is none", low=0)
    scaffold: bool = _setting(False, "SCAFFOLD: exchange control variates")
    server_optimizer: str = _setting(
        "none", "what the server does with the mean", choices=("none", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
    )
    server_learning_rate: float = _setting(
        0.0, "of the server's optimiser; 0 is 1 for fedavgm, 0.01 for the adaptive ones", low=0
    )
    server_momentum: float = _setting(0.9, "of the server's optimiser (beta_1)", low=0, high=0.999999)
    server_second_momentum: float = _setting(0.99, "beta_2 of FedAdam and FedYogi", low=0, high=0.999999)
    server_adaptivity: float = _setting(0.001, "tau of FedAdam, FedYogi and FedAdagrad", above=0)
    aggregation_error: bool = _setting(True, "measure how far the aggregate is from the mean of the products")
    dataset: str = _setting(
        "digits", "digits, glyphs (generated), local (see data-path), hub:<name>, or clients (only they have data)"
    )
    data_path: str = _setting("", "for local: a folder, CSV, JSON or Parquet file")
    label_column: str = _setting("label", "the column to predict")
    input_columns: str = _setting("", "the columns to predict from, by commas; empty chooses")
    classes: str = _setting("", "class names in the order of the labels, by commas; empty takes the data's")
    num_classes: int = _setting(0, "number of classes where a client may lack some; 0 takes the data's", low=0)
    input_shape: str = _setting("", 'shape of a sample where the server has no data, such as "1,8,8"')
    partitioner: str = _setting("iid", "iid, dirichlet, shards, or column:<name>")
    dirichlet_alpha: float = _setting(0.5, "concentration of the Dirichlet partitioner", above=0)
    shards_per_client: int = _setting(2, "pieces of the sorted data a client gets", low=1)
    min_partition_size: int = _setting(2, "fewest samples of a client", low=2)
    test_fraction: float = _setting(0.2, "central test part of a source without a test split", above=0, high=0.9)
    held_out_fraction: float = _setting(0.2, "part of its samples a client does not train on", above=0, high=0.9)
    glyph_samples: int = _setting(12000, "for glyphs: how many to generate, the central test part included", low=124)
    glyph_size: int = _setting(28, "for glyphs: pixels a side", low=8)
    glyph_noise: float = _setting(0.06, "for glyphs: standard deviation of the noise on pixels in [0, 1]", low=0)
    glyph_seed: int = _setting(0, "for glyphs: of their generation; seed does not change them", low=0)
    model: str = _setting(
        "cnn", f"the network: {', '.join(_NETWORKS)}, or hf:<name on the hub, or directory> of the transformers library"
    )
    task: str = _setting(
        "auto",
        "what an hf: model learns; auto is causal-lm for those, classification for all others",
        choices=("auto", "causal-lm", "classification"),
    )
    max_length: int = _setting(512, "hf: tokens a sample at most; longer ones are cut", low=2)
    packing: bool = _setting(False, "causal-lm: several rows in one training sample, up to max-length tokens")
    prompt_template: str = _setting(
        "auto",
        "causal-lm: auto (the tokenizer's chat template, or else alpaca), alpaca, or a text with {instruction} and "
        "{input}",
    )
    accumulate_steps: int = _setting(1, "hf: batches of batch-size whose gradients make one step", low=1)
    gradient_checkpointing: bool = _setting(False, "hf: compute activations again instead of keeping them")
    base_precision: str = _setting(
        "float32",
        "hf: number format of the frozen weights; int8 and nf4 need accumulate-into = stack",
        choices=("float32", "bfloat16", "int8", "nf4"),
    )
    exact_match_samples: int = _setting(
        0, "causal-lm: held-out samples whose answer is generated and compared, in each evaluation; 0: none", low=0
    )
    generated_samples: int = _setting(
        3, "causal-lm: held-out prompts answered before and after training, in samples.jsonl", low=0
    )
    max_new_tokens: int = _setting(64, "causal-lm: tokens generated at most", low=1)
    model_width: int = _setting(0, "channels of the first stage; 0 is the network's default", low=0)
    hidden: str = _setting("256,256", "widths of the multilayer perceptron's hidden layers")
    norm: str = _setting("group", "the ResNets' normalisation", choices=("group", "batch"))
    init_adapter: str = _setting("", "a PEFT LoRA adapter's directory to start from: it becomes part of W_0")
    seed: int = _setting(0, "of everything random", low=0)
    threads: int = _setting(1, "torch's threads in every process", low=1)
    batched: bool = _setting(True, "train clients as one batch where the engine can (in-process, or on hosts)")
    clients_per_batch: int = _setting(25, "clients of such a batch at most", low=1)
    device: str = _setting("auto", "where clients train", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = _setting(
        "float32",
        "what training computes in; with bfloat16 weights, gradients and messages stay float32",
        choices=("float32", "bfloat16"),
    )
    output_dir: str = _setting("runs", "where run directories go")
    run_name: str = _setting("", "the run's directory; empty is a time stamp")
    track: str = _setting("", f"show the run in these as well, by commas: {', '.join(TRACKERS)}")
    track_project: str = _setting("fedloru-flwr", "the project of wandb, the experiment of mlflow")
    checkpoint_every: int = _setting(10, "rounds between checkpoints", low=1)
    resume: str = _setting("", "auto (the run named run-name, if it is there) or a run's directory")
    max_total_bytes: int = _setting(
        0, "stop after the round in which the run's bytes, up and down, reach so many; 0: no limit", low=0
    )
    target_accuracy: float = _setting(
        0.0,
        "stop after the round whose accuracy, the central one or else the clients', reaches this; 0: none",
        low=0,
        high=1,
    )
    uplink_codec: str = _setting(
        "float32",
        "of what clients send: float32, float16, bfloat16, int8 or int4; before it topk:SHARE+ and after it +zstd, if "
        'wanted; "int4, 100: int8" changes from round 100 on',
    )
    downlink_codec: str = _setting(
        "float32", "the same of what the server sends and, but for topk, of what it accumulates, for everybody"
    )
    error_feedback: str = _setting(
        "auto",
        "clients keep what the uplink's codec leaves out and add it next time; auto: wherever it leaves something out",
        choices=("auto", "on", "off"),
    )
    timeout: float = _setting(3600.0, "seconds to wait for the clients in a round", above=0)
    max_failure_fraction: float = _setting(0.5, "stop if more of a round's clients fail", low=0, high=1)
    max_norm_ratio: float = _setting(
        100.0, "leave out an update whose norm is more than so many times the median of earlier rounds; 0: none", low=0
    )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object]) -> Self:
        """Build and check the settings from kebab-case keys; keys that are absent take their defaults.

        Raises:
            ConfigError: for an unknown key, a value of the wrong type or out of range.
        """
        fields = {name_to_key(f.name): f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            if key not in fields:
                raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, tuple(fields))}")
            values[fields[key].name] = _at_home(key, _checked(key, value, fields[key]))
        config = cls(**values)
        config._check_together()
        return config

    def as_mapping(self) -> dict[str, Scalar]:
        """All settings by kebab-case key."""
        return {name_to_key(f.name): getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def accumulation_rounds(self) -> tuple[int, ...]:
        """The rounds of ``accumulate-at``."""
        return _integers("accumulate-at", self.accumulate_at)

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """The widths of ``hidden``."""
        return _integers("hidden", self.hidden)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of ``input-shape``; empty if not given."""
        return _integers("input-shape", self.input_shape)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``track``."""
        names = tuple(dict.fromkeys(part.strip() for part in self.track.split(",") if part.strip()))
        for name in names:
            if name not in TRACKERS:
                known = f"{', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}"
                raise ConfigError(f"track = {self.track!r}: {name!r} is not one of {known}")
        return names

    @property
    def pretrained(self) -> str:
        """The name or directory of the transformers model; empty for a built-in network."""
        return self.model.removeprefix(PRETRAINED) if self.model.startswith(PRETRAINED) else ""

    @property
    def writes(self) -> bool:
        """Whether a causal language model is trained."""
        return bool(self.pretrained) and self.task != "classification"

    def changed_from(self, settings: Mapping[str, object]) -> dict[str, tuple[object, object]]:
        """The settings that would change the result of a run begun with ``settings``: key, then was and is.

        More rounds do not, as long as the learning rate does not depend on their number.
        """
        free = set(_FREE_WHEN_CONTINUED)
        if self.learning_rate_schedule == "constant":
            free.add("num-server-rounds")
        mine = self.as_mapping()
        theirs = {**type(self)().as_mapping(), **settings}  # a setting that was not there yet has its default
        return {key: (theirs[key], mine[key]) for key in mine if key not in free and theirs[key] != mine[key]}

    def _check_method(self) -> None:
        """Refuse settings that the method would ignore, and shares of epochs that make no sense."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ALGORITHMS[self.algorithm].foreign:
            if getattr(self, name) != defaults[name]:
                takers = [key for key, other in ALGORITHMS.items() if name in other.own] or ["factor-based methods"]
                raise ConfigError(
                    f"{name_to_key(name)} = {getattr(self, name)!r} means nothing to algorithm = {self.algorithm!r}, "
                    f"only to {', '.join(takers)}: leave it out"
                )
        if self.accumulate_every and self.accumulate_at:
            raise ConfigError("accumulate-every and accumulate-at exclude each other: give one of them")
        if self.accumulate_when and self.accumulate_at:
            raise ConfigError("accumulate-when and accumulate-at exclude each other: give one of them")
        if self.accumulate_when and self.learning_rate_restart:
            raise ConfigError(
                f"learning-rate-restart = true does not go with accumulate-when = {self.accumulate_when!r}: how long "
                "the learning rate has until the next accumulation is not known"
            )
        if self.algorithm == "pfedloru":
            personal = self.personal_epochs or max(1, self.local_epochs // 4)
            shared = self.global_epochs or self.local_epochs - personal
            if shared <= personal:
                raise ConfigError(
                    f"pfedloru trains the global pair for more epochs than the personal one, but these settings give "
                    f"{max(shared, 0)} and {personal}: raise local-epochs (to 3 at least) or global-epochs"
                )

    def _check_model(self) -> None:
        """Refuse an unknown model, and settings that the kind of model would ignore or cannot go with."""
        if not self.pretrained:
            if self.model not in _NETWORKS:
                allowed = f"{', '.join(_NETWORKS)} or {PRETRAINED}<name or directory>"
                hint = did_you_mean(self.model, _NETWORKS)
                raise ConfigError(f"model = {self.model!r} is not one of {allowed}{hint}")
            if self.task == "classification":
                self._refuse_others(_OF_PRETRAINED[1:] + _OF_LANGUAGE, f"model = {self.model!r}", "hf: models")
                return
            self._refuse_others(_OF_PRETRAINED + _OF_LANGUAGE, f"model = {self.model!r}", "hf: models")
            return
        if not self.writes:
            self._refuse_others(_OF_LANGUAGE, "task = 'classification'", "task = 'causal-lm'")
        if self.dataset in ("digits", "glyphs"):
            raise ConfigError(
                f"dataset = {self.dataset!r} has images, model = {self.model!r} reads text: use dataset = 'local' with "
                "data-path, hub:<name>, or clients"
            )
        if self.accumulate_steps > 1 and (self.proximal_mu or self.scaffold):
            raise ConfigError(
                f"accumulate-steps = {self.accumulate_steps} does not go with proximal-mu or scaffold, which correct "
                "every gradient as it is computed, not every step: use accumulate-steps = 1 and a larger batch-size"
            )
        if "{instruction}" not in self.prompt_template and self.prompt_template not in ("auto", "alpaca"):
            raise ConfigError(
                f"prompt-template = {self.prompt_template!r} must be auto, alpaca, or a text with {{instruction}} in it"
            )
        if self.base_precision in ("int8", "nf4"):
            self._check_quantised()

    def _check_quantised(self) -> None:
        """Refuse what a base in integers cannot do."""
        told = f"base-precision = {self.base_precision!r}"
        if self.accumulate_into != "stack" and ALGORITHMS[self.algorithm].factorised:
            raise ConfigError(
                f"{told} needs accumulate-into = 'stack', got {self.accumulate_into!r}: a product added to quantised "
                "weights would be rounded away; stacked, the past stays exact beside them"
            )
        if not ALGORITHMS[self.algorithm].factorised:
            raise ConfigError(
                f"{told} does not go with algorithm = {self.algorithm!r}, which trains the weights themselves: use a "
                "method of factors, such as fedloru, or base-precision = 'bfloat16'"
            )

    def _refuse_others(self, names: tuple[str, ...], what: str, takers: str) -> None:
        """Refuse settings that mean nothing here."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name_to_key(name)} = {getattr(self, name)!r} means nothing to {what}, only to {takers}: leave "
                    "it out"
                )

    def _check_codecs(self) -> None:
        """Refuse codecs that there are not."""
        for name in ("uplink_codec", "downlink_codec"):
            if (text := getattr(self, name)) == "float32":
                continue
            from fedloru_flwr.lowrank import CodecError, CodecSchedule  # with torch, which plain settings do without

            try:
                CodecSchedule.parse(text)
            except CodecError as error:
                raise ConfigError(f"{name_to_key(name)} = {text!r}: {error}") from error

    def _check_together(self) -> None:
        self._check_method()
        self._check_model()
        _ = self.accumulation_rounds, self.hidden_widths, self.sample_shape, self.trackers
        self._check_codecs()
        if not self.output_dir.strip():
            raise ConfigError("output-dir is empty: name a directory, '.' for the one at hand")
        if not self.track_project.strip():
            raise ConfigError("track-project is empty: name a project")
        if self.norm == "batch" and self.model.startswith("resnet") and self.batch_size == 1:
            raise ConfigError("norm = 'batch' cannot train with batch-size = 1: use norm = 'group' or larger batches")
        late = [at for at in self.accumulation_rounds if at > self.num_server_rounds]
        if late:
            raise ConfigError(
                f"accumulate-at = {self.accumulate_at!r} lists round {late[0]}, but the run has num-server-rounds = "
                f"{self.num_server_rounds}"
            )
        if self.target_accuracy and self.dataset == "clients" and not self.fraction_evaluate:
            raise ConfigError(
                f"target-accuracy = {self.target_accuracy:g} needs an accuracy, and with dataset = 'clients' only "
                "clients can tell one: give fraction-evaluate above 0"
            )
        if self.dataset == "clients" and self.pretrained:
            if not self.writes and not self.num_classes:
                raise ConfigError("dataset = 'clients' leaves the server without data: give num-classes")
        elif self.dataset == "clients" and not (self.sample_shape and self.num_classes):
            raise ConfigError(
                "dataset = 'clients' leaves the server without data: give input-shape and num-classes, so that it can "
                "build the model"
            )


def name_to_key(name: str) -> str:
    """``local_epochs`` to ``local-epochs``."""
    return name.replace("_", "-")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: if the file is missing or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from error


def read_config_file(path: Path) -> dict[str, object]:
    """Read a CONF.toml: a flat table of settings.

    Raises:
        ConfigError: if the file is missing, is no TOML or has tables in it.
    """
    content = read_toml(path)
    for key, value in content.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{path}: {key!r} must be a plain value, got a {type(value).__name__}; settings are flat")
    return content


def parse_overrides(text: str) -> dict[str, object]:
    """Parse ``key=value`` pairs, separated by blanks, values as in TOML: ``rank=8 run-name="a b"``.

    A value that is no TOML is taken as a text: ``run-name=first``.

    Raises:
        ConfigError: if something is not ``key=value``.
    """
    settings: dict[str, object] = {}
    rest = text.strip()
    while rest:
        pair = _PAIR.match(rest)
        if pair is None:
            raise ConfigError(f"-c: expected key=value pairs separated by blanks, got {rest!r}")
        key, value = pair.groups()
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        settings[key] = parsed if isinstance(parsed, bool | int | float | str) else value  # a date is a text here
        rest = rest[pair.end() :]
    return settings


def _integers(key: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f'{key} = {text!r} must be whole numbers separated by commas, such as "50,100"') from None
    if any(number < 1 for number in numbers):
        raise ConfigError(f"{key} = {text!r}: every number must be at least 1")
    return numbers


def _at_home(key: str, value: Any) -> Any:
    """A path with the home directory in place of ``~``; everything else as it is."""
    if key in ("data-path", "init-adapter"):
        return os.path.expanduser(value)  # noqa: PTH111  # it leaves what it does not know, and an empty text
    if key == "model" and value.startswith(f"{PRETRAINED}~"):
        return PRETRAINED + os.path.expanduser(value.removeprefix(PRETRAINED))  # noqa: PTH111
    return value


def _checked(key: str, value: object, setting: "dataclasses.Field[Any]") -> Scalar:
    wanted = type(setting.default)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is str and type(value) in (int, float) and not setting.metadata["choices"]:
        value = str(value)
    if type(value) is not wanted:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(f"{key} = {value!r} must be {names[wanted]}")
    assert isinstance(value, bool | int | float | str)
    bounds = setting.metadata
    if isinstance(value, str):
        if bounds["choices"] and value not in bounds["choices"]:
            choices = bounds["choices"]
            known = ", ".join(choice or '""' for choice in choices)
            raise ConfigError(f"{key} = {value!r} is not one of {known}{did_you_mean(value, choices)}")
        return value
    too_low = value < bounds["low"] or (bounds["above"] is not None and value <= bounds["above"])
    if not math.isfinite(value) or too_low or value > bounds["high"]:
        raise ConfigError(f"{key} = {value!r} must be {_range(bounds)}")
    return value


def _range(bounds: Mapping[str, Any]) -> str:
    parts = []
    if bounds["above"] is not None:
        parts.append(f"above {bounds['above']:g}")
    elif bounds["low"] > -math.inf:
        parts.append(f"at least {bounds['low']:g}")
    if bounds["high"] < math.inf:
        parts.append(f"at most {bounds['high']:g}")
    return " and ".join(parts) or "a finite number"
