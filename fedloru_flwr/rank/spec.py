"""What is measured: a CONF.toml of trainings, rounds, sample sizes and clients, checked before anything runs."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from fedloru_flwr.compare.drawing import picture_name
from fedloru_flwr.compare.spec import Values
from fedloru_flwr.config import ConfigError, RunConfig, name_to_key, read_toml
from fedloru_flwr.rank.operators import MAX_BYTES
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.suggest import did_you_mean
from fedloru_flwr.workload import check_init_adapter

Space = Literal["full", "adapter"]
SPACES: tuple[Space, ...] = ("full", "adapter")
_TOP = ("title", "seeds", "measure", "settings", "trainings")
_SETTINGS = tuple(name_to_key(field.name) for field in dataclasses.fields(RunConfig))
_OWN = ("seed", "output-dir", "run-name", "resume")
_MOST_ROUNDS = 10  # that are measured of a flat CONF


@dataclass(frozen=True)
class Measure:
    """What is measured at every chosen round.

    Attributes:
        rounds: 0 is before training.
        points: sample sizes ``n`` in ascending order, nested in each other; the last is ``N``, the server's.
        draws: how many disjoint samples of each smaller size to take from those of size ``N``.
        clients: how many clients' own partitions to measure the Hessian on, and compare gradients and updates of.
        ranks: that gradients are cut to.
        spaces: ``full``: all parameters; ``adapter``: the factors.
        layers: measure each layer's block of the Hessian too, on the samples.
        tolerance: relative standard error of the Hessian's squared Frobenius norm.
        threads: torch's, while measuring.
        max_bytes: about how much memory the graph of a product with the Hessian may take; see `LossHessian`.
    """

    rounds: tuple[int, ...]
    points: tuple[int, ...] = (50, 500)
    draws: int = 1
    clients: int = 10
    ranks: tuple[int, ...] = (1, 4, 16)
    spaces: tuple[Space, ...] = SPACES
    layers: bool = True
    tolerance: float = 0.02
    threads: int = 1
    max_bytes: int = MAX_BYTES

    @property
    def samples(self) -> tuple[tuple[int, int], ...]:
        """Size and number of every sample."""
        smaller = ((points, draw) for points in self.points[:-1] for draw in range(self.draws))
        return (*smaller, *((points, 0) for points in self.points[-1:]))

    @property
    def steps(self) -> int:
        """How many measurements that makes, each of which is saved by itself; the last is the ledger's."""
        if not self.points:
            return 0
        hessians = (len(self.samples) + self.clients) * len(self.spaces)
        similarities = 2 if self.clients else 0
        return len(self.rounds) * (hessians + similarities + 1) + 1

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """What JSON has made of ``asdict``: lists where there were tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Training:
    """A run whose models are measured.

    Attributes:
        name: its key in the CONF.
        label: its name for people.
        settings: over those of every training.
    """

    name: str
    label: str
    settings: Values


@dataclass(frozen=True)
class RankSpec:
    """A whole analysis.

    Attributes:
        name: the CONF file's name without its ending.
        title: for people.
        seeds: of the trainings.
        measure: what is measured.
        settings: of every training; their data settings say who the clients are, also where a training's own differ.
        trainings: what is trained.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    measure: Measure
    settings: Values
    trainings: tuple[Training, ...]

    def resolved(self, training: Training, seed: int) -> Values:
        """All settings of one training."""
        return RunConfig.from_mapping({**self.settings, **training.settings, "seed": seed}).as_mapping()

    def clients(self, seed: int) -> Values:
        """The settings that say who the clients are, and what they train on."""
        foreign = {name_to_key(name) for name in ALGORITHMS["fedavg"].foreign}
        data = {key: value for key, value in self.settings.items() if key not in foreign}
        return RunConfig.from_mapping({**data, "algorithm": "fedavg", "seed": seed}).as_mapping()


def read_rank_spec(path: Path) -> RankSpec:
    """Read an analysis's CONF.toml; a flat CONF of settings is an analysis of the run it describes.

    Raises:
        ConfigError: names file, table, key, value and what is allowed.
    """
    return parse_rank_spec(read_toml(path), path.stem, str(path))


def parse_rank_spec(content: Mapping[str, Any], name: str, source: str) -> RankSpec:
    """Check the content of a CONF.toml; ``source`` is what errors call it.

    Raises:
        ConfigError: see `read_rank_spec`.
    """
    if content and not any(isinstance(value, dict) for value in content.values()) and not {*content} & {*_TOP}:
        return _of_flat(content, name, source)
    return _Reader(source).spec(content, name)


def _of_flat(content: Mapping[str, Any], name: str, source: str) -> RankSpec:
    """An analysis of one run, with this module's defaults."""
    settings = {key: value for key, value in content.items() if key not in _OWN}
    try:
        config = RunConfig.from_mapping({**settings, "seed": content.get("seed", 0)})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    last = config.num_server_rounds
    step = -(-last // _MOST_ROUNDS)
    rounds = tuple(sorted({*range(0, last + 1, step), last}))
    clients = min(Measure.clients, config.num_clients)
    measure = Measure(rounds, clients=clients if clients > 1 else 0)
    spec = RankSpec(name, name, (config.seed,), measure, settings, (Training(config.algorithm, config.algorithm, {}),))
    _Reader(source).check(spec)
    return spec


class _Reader:
    """Reads tables and says, in every error, in which file and table."""

    def __init__(self, source: str) -> None:
        self._source = source

    def spec(self, content: Mapping[str, Any], name: str) -> RankSpec:
        self._known(content, _TOP, "")
        settings = self._settings(self._table(content.get("settings", {}), "settings"), "settings")
        tables = self._table(content.get("trainings", {}), "trainings")
        if not tables:
            raise self._fault("", "there is no training: add a table such as [trainings.fedloru]")
        trainings = []
        for key, table in tables.items():
            where = f"trainings.{key}"
            own = dict(self._table(table, where))
            label = own.pop("label", key)
            if not isinstance(label, str) or not label.strip():
                raise self._fault(where, f"label = {label!r} must be a text")
            trainings.append(Training(key, label.strip(), self._settings(own, where)))
        self._apart([training.label for training in trainings])
        title = content.get("title", name)
        if not isinstance(title, str):
            raise self._fault("", f"title = {title!r} must be a text")
        seeds = self._integers("", "seeds", content.get("seeds", [0]), low=0)
        spec = RankSpec(name, title, seeds, self._measure(content.get("measure", {})), settings, tuple(trainings))
        self.check(spec)
        return spec

    def _apart(self, labels: Sequence[str]) -> None:
        """Tables tell trainings apart by their labels, and pictures by the labels' file names."""
        for label, other in itertools.combinations(labels, 2):
            if label == other:
                raise self._fault("trainings", f"two trainings have the label {label!r}: give each one of its own")
            if picture_name(label) == picture_name(other):
                told = f"the labels {label!r} and {other!r} give their pictures one file name, {picture_name(label)!r}"
                raise self._fault("trainings", f"{told}: let them differ in a letter from a to z or a digit")

    def check(self, spec: RankSpec) -> None:
        """Check the settings of every training, and what they make of what is measured."""
        for training in spec.trainings:
            where = f"trainings.{training.name}"
            try:
                config = RunConfig.from_mapping(spec.resolved(training, spec.seeds[0]))
                check_init_adapter(config)
            except ConfigError as error:
                raise self._fault(where, str(error)) from None
            for key, limit in (
                ("max-total-bytes", config.max_total_bytes),
                ("target-accuracy", config.target_accuracy),
            ):
                if limit:
                    told = f"{key} = {limit} would end the training before all is measured"
                    raise self._fault(where, f"{told}: leave it out")
            if config.dataset == "clients":
                raise self._fault(where, "dataset = 'clients' is for a deployment; an analysis needs the data here")
            if not ALGORITHMS[config.algorithm].strategy.has_global_model:
                raise self._fault(
                    where, f"algorithm = {config.algorithm!r} has no global model whose Hessian could be measured"
                )
            if late := [at for at in spec.measure.rounds if at > config.num_server_rounds]:
                told = f"rounds lists {late[0]}, but the training has num-server-rounds = {config.num_server_rounds}"
                raise self._fault("measure", f"{told} (trainings.{training.name})")
        try:
            clients = RunConfig.from_mapping(spec.clients(spec.seeds[0])).num_clients
        except ConfigError as error:
            raise self._fault("settings", str(error)) from None
        if spec.measure.clients > clients:
            raise self._fault(
                "measure",
                f"clients = {spec.measure.clients}, but [settings] has num-clients = {clients}: ask for fewer",
            )

    def _measure(self, table: object) -> Measure:
        content = self._table(table, "measure")
        known = tuple(name_to_key(field.name) for field in dataclasses.fields(Measure))
        self._known(content, known, "measure")
        if "rounds" not in content:
            raise self._fault("measure", "rounds is missing: list the rounds to measure at, such as [0, 10, 20]")
        values: dict[str, Any] = {}
        for key, low in (("rounds", 0), ("points", 1), ("ranks", 1)):
            if key in content:
                values[key] = tuple(sorted(self._integers("measure", key, content[key], low=low)))
        for key, low in (("draws", 1), ("clients", 0), ("threads", 1), ("max-bytes", 1)):
            if key in content:
                if type(content[key]) is not int or content[key] < low:
                    raise self._fault("measure", f"{key} = {content[key]!r} must be a whole number from {low} on")
                values[key.replace("-", "_")] = content[key]
        if "spaces" in content:
            spaces = content["spaces"]
            if not isinstance(spaces, list) or not spaces or any(one not in SPACES for one in spaces):
                raise self._fault("measure", f"spaces = {spaces!r} must list some of {', '.join(SPACES)}")
            values["spaces"] = tuple(one for one in SPACES if one in spaces)
        if "layers" in content:
            if not isinstance(content["layers"], bool):
                raise self._fault("measure", f"layers = {content['layers']!r} must be true or false")
            values["layers"] = content["layers"]
        if "tolerance" in content:
            tolerance = content["tolerance"]
            if type(tolerance) is not float or not 0 < tolerance < 1:
                raise self._fault(
                    "measure", f"tolerance = {tolerance!r} must be a number between 0 and 1, such as 0.02"
                )
            values["tolerance"] = tolerance
        measure = Measure(**values)
        if measure.clients == 1:
            raise self._fault("measure", "clients = 1 has nobody to compare with: give 0, or at least 2")
        if len(measure.points) < 2:
            raise self._fault("measure", f"points = {list(measure.points)} must list two sample sizes or more")
        if measure.draws * measure.points[-2] > measure.points[-1]:
            raise self._fault(
                "measure",
                f"draws = {measure.draws} disjoint samples of {measure.points[-2]} points do not go into "
                f"{measure.points[-1]}: take fewer draws, or more points",
            )
        return measure

    def _settings(self, content: Mapping[str, Any], where: str) -> Values:
        for key in _OWN:
            if key in content:
                raise self._fault(where, f"{key} = {content[key]!r} cannot be set here: the analysis chooses it")
        self._known(content, _SETTINGS, where)
        for key, value in content.items():
            if not isinstance(value, bool | int | float | str):
                raise self._fault(where, f"{key} = {value!r} must be a plain value, got a {type(value).__name__}")
        return dict(content)

    def _integers(self, where: str, key: str, value: object, *, low: int) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or not all(type(one) is int and one >= low for one in value):
            raise self._fault(where, f"{key} = {value!r} must be a list of whole numbers from {low} on")
        if len(set(value)) < len(value):
            raise self._fault(where, f"{key} = {value!r} lists a number twice")
        return tuple(value)

    def _table(self, value: object, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._fault("", f"{where} = {value!r} must be a table: [{where}]")
        return value

    def _known(self, content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in content:
            if key not in known:
                raise self._fault(where, f"unknown key {key!r}{did_you_mean(key, known)}")

    def _fault(self, where: str, message: str) -> ConfigError:
        return ConfigError(f"{self._source}: [{where}] {message}" if where else f"{self._source}: {message}")
