r"""`fedloru export`: a run's model as PEFT or plain torch and transformers load it.

The model of a run is ``W_0 + sum_i s_i B_i A_i + s B A`` with its dense leaves and running statistics. ``peft`` writes
what it has beside the untouched ``W_0`` as one LoRA adapter, all pairs concatenated, or compressed to a rank;
``merged`` writes the whole. Either is loaded again by the plain libraries and compared with the run's model before it
is left: tensor by tensor, and by the outputs of a model in which nothing is merged.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from fedloru_flwr import atomic
from fedloru_flwr.config import RunConfig
from fedloru_flwr.lowrank import Adapter, FactorisedLayer, compress, digest_tensors, join, product, relative_difference
from fedloru_flwr.lowrank.factors import at_least_float32, has_product
from fedloru_flwr.lowrank.forms import Form
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.layout import Layout
from fedloru_flwr.models.networks import NetworkFactory
from fedloru_flwr.models.peft_files import (
    FromAdapter,
    Update,
    apply_update,
    as_peft_holds_it,
    open_adapter,
    plain_tensors,
    products,
    read_adapter,
    write_adapter,
)
from fedloru_flwr.models.plan import AdapterPlan, build_seeded, canonical_names, plain_state, plan_recorded
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies.state import ServerState, merged_state_dict, state_from_checkpoint
from fedloru_flwr.suggest import did_you_mean

Format = Literal["peft", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
REPORT = "export.json"
BASE_FILE, BASE_DIRECTORY = "base.safetensors", "base"
MODEL_FILE = "model.safetensors"

_TOLERANCE = 1e-4  # of outputs, in units of the largest; coarser number formats get _ROUNDINGS of their epsilon
_ROUNDINGS = 8
_LAYER_TOLERANCE = 1e-5  # of a layer's product, relative
_LOST_TOO_MUCH = 0.1  # of a layer's product, relative, when it is rounded away in a merge
_SAMPLES, _TOKENS = 8, 16
_CARD = """---
library_name: peft
{base}tags:
- lora
- federated-learning
---

# {run}

What a federated run of fedloru-flwr had learnt after round {round}, as a LoRA adapter beside its base.
`export.json` says how well it agrees with the run's model.

```python
{snippet}
```
"""


class ExportError(ValueError):
    """There is nothing to export, or not in this format; says why and what would do."""


class MismatchError(RuntimeError):
    """What was exported does not give the run's model when it is loaded again; it has been removed."""


@dataclass(frozen=True)
class Exported:
    """What `export` has left.

    Attributes:
        path: the directory.
        report: what ``export.json`` in it holds.
    """

    path: Path
    report: dict[str, Any]

    def table(self) -> Table:
        """The layers that have a product: ranks, and the relative error of each product in what was exported."""
        is_merged = self.report["format"] == "merged"
        title = f"{self.report['run']} merged" if is_merged else f"{self.report['run']} as an adapter"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("shape", "rank", *(() if is_merged else ("exported",)), "relative error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in self.report["layers"].items():
            shape = " x ".join(map(str, row["shape"]))
            ranks = [str(row[key]) for key in ("learnt_rank", "rank") if key in row]
            table.add_row(name, shape, *ranks, f"{row['relative_error']:.2e}")
        return table

    def lines(self) -> list[str]:
        """What was exported and how well it agrees, for people."""
        report, check = self.report, self.report["check"]
        lines = [f"{report['format']} of round {report['round']} of {report['run']}"]
        if report["whole_modules"]:
            lines.append(f"whole values beside the pairs: {', '.join(report['whole_modules'])}")
        if report["base"]:
            lines.append(f"base: {report['base']}")
        lines.append(
            f"loaded again and compared on {check['samples']}: largest difference {check['difference']:.1e} of outputs "
            f"up to {check['largest_output']:.1e}, which training has changed by {check['change_by_training']:.1e}"
        )
        if report["rank"] is not None:
            lines.append(f"largest difference from the run's own model: {check['difference_from_run']:.1e}")
        return [*lines, *(f"warning: {told}" for told in report["warnings"])]


def export(
    run: str | os.PathLike[str],
    format: str = "peft",
    rank: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    model: Callable[[], nn.Module] | nn.Module | None = None,
    inputs: Inputs | None = None,
) -> Exported:
    r"""Write the model of a run, finished or interrupted, as other libraries load it, and prove that they do.

    ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors`` with ``B' A' = sum_i s_i B_i A_i`` of every
    layer, of rank ``sum_i r_i`` (at most the layer's own), scale 1; trained dense leaves as ``modules_to_save`` and
    ``bias``. With ``rank`` each product is replaced by its best approximation of that rank. Beside it lies the base
    ``W_0`` (``base.safetensors``, for a transformers model ``base/``), unless the model was loaded by a name or path
    that gives it. ``merged``: ``model.safetensors`` with the plain model's keys; a transformers model by its
    ``save_pretrained``. Both: ``export.json``.

    Args:
        run: the run's directory; its newest checkpoint counts.
        format: ``"peft"`` or ``"merged"``.
        rank: for ``peft``: compress to it.
        output_dir: made; by default ``<run>/export/<format>`` or ``<run>/export/peft-rank-<rank>``. An earlier export
            there is replaced.
        model: the model factory (or instance) of a run made by an app of your own; None: the run's settings say.
        inputs: sample inputs for the comparison: a tensor, a tuple of arguments or a dict of keywords. None: samples of
            the run's data, for a language model token numbers.

    Returns:
        Where it is, and the report.

    Raises:
        ExportError: for an unknown format, a run without a checkpoint or of another model, nothing learnt, a method
            without a global model or without factors, inputs that the model cannot be called with, a directory that
            cannot be written or holds what the run began from, or a merge that would leave a trained layer as it was.
        AdapterError: for what a PEFT adapter cannot hold.
        MismatchError: what was written holds other tensors or gives other outputs than the run's model; nothing is
            left.
    """
    chosen = _checked(format, rank)
    trained = Trained.of_run(run, model, inputs)
    _check_recorded(trained)
    name = chosen if rank is None else f"{chosen}-rank-{rank}"
    given = trained.directory.path / "export" / name if output_dir is None else Path(output_dir)
    directory = given.expanduser().absolute()
    _check_free(directory)
    _check_not_needed(directory, trained)
    scratch = atomic.temporary_path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    except OSError as error:
        raise ExportError(
            f"output-dir = '{directory}' cannot be written: {error.strerror or error} ({error.filename}); choose a "
            "directory that can be made"
        ) from error
    try:
        if chosen == "merged":
            more = _export_merged(trained, scratch)
        else:
            more = _export_peft(trained, rank, scratch, directory)
        report = {"format": chosen, "rank": rank, **trained.facts(), **more}
        atomic.write_json(scratch / REPORT, report)
        if directory.exists():
            shutil.rmtree(directory)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(directory, report)


def _checked(format: str, rank: int | None) -> Format:
    if format not in FORMATS:
        told = f"format = {format!r} is not one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
        raise ExportError(told)
    if rank is not None and format != "peft":
        raise ExportError(f"rank = {rank} means nothing to format = {format!r}, only to 'peft': leave it out")
    if rank is not None and rank < 1:
        raise ExportError(f"rank = {rank} must be at least 1")
    return format


def _check_free(directory: Path) -> None:
    """Refuse to write over what no export has made."""
    if directory.exists() and not (directory / REPORT).is_file() and (directory.is_file() or any(directory.iterdir())):
        raise ExportError(f"output-dir = '{directory}' holds something that is no export: choose another directory")


def _check_not_needed(directory: Path, trained: "Trained") -> None:
    """Refuse to replace what the run began from: without it nobody can take the run up again."""
    name = str(getattr(trained.untouched, "name_or_path", ""))
    for told, source in (("init-adapter", trained.adapter), ("model", name)):
        there = Path(source).expanduser().resolve() if source else None
        if there is None or not there.exists():
            continue
        if directory.resolve() in (there, *there.parents):
            raise ExportError(
                f"output-dir = '{directory}' holds what the run began from ({told} = {source!r}), which an export "
                "there would replace: choose another directory"
            )


def _check_recorded(trained: "Trained") -> None:
    """Refuse a run whose ``model.safetensors`` is not what its newest checkpoint gives, if it is of the same round."""
    path, summary = trained.directory.path / MODEL_FILE, trained.directory.read_summary()
    if not path.exists() or summary is None or summary["rounds"] != trained.state.server_round:
        return
    recorded, _ = atomic.read_tensors(path)
    odd = [name for name in {**recorded, **trained.merged} if name not in recorded or name not in trained.merged]
    odd = odd or [
        name
        for name, value in recorded.items()
        if relative_difference(value, trained.merged[name]) > max(_LAYER_TOLERANCE, _epsilon(value))
    ]
    if odd:
        raise MismatchError(
            f"{path} is not what the checkpoint of round {trained.state.server_round} gives (it differs in "
            f"{', '.join(odd[:3])}): one of the two files has been changed; nothing was exported"
        )


def _epsilon(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0


@dataclass(frozen=True)
class Trained:
    """A run as its newest checkpoint has it, and the plain model that it began from.

    Attributes:
        directory: the run's.
        factory: builds the plain model, before an adapter that the run began with.
        adapter: that adapter's directory; empty for none.
        seed: of the run.
        plan: what was factorised and trained.
        state: of the server.
        root: the base ``W_0`` as the run's method began from it.
        given: sample inputs, or None for a language model's.
    """

    directory: RunDirectory
    factory: Callable[[], nn.Module]
    adapter: str
    seed: int
    plan: AdapterPlan
    state: ServerState
    root: Mapping[str, Tensor]
    given: Inputs | None

    @classmethod
    def of_run(
        cls,
        run: str | os.PathLike[str],
        model: Callable[[], nn.Module] | nn.Module | None = None,
        inputs: Inputs | None = None,
    ) -> "Trained":
        """Take up a run; for the arguments see `export`.

        Raises:
            ExportError: if it has no checkpoint, or another model.
        """
        directory = RunDirectory.open(run)
        checkpoint = directory.latest_checkpoint()
        if checkpoint is None:
            raise ExportError(f"{directory.path} has no checkpoint yet: the run has not finished a round that it saved")
        factory, adapter = model, ""
        if factory is None:
            factory, inputs, adapter = _of_settings(directory, inputs)
        elif isinstance(model, FromAdapter):
            factory, adapter = model.factory, model.path
        if isinstance(factory, nn.Module):
            factory = _Copies(factory)
        recorded = checkpoint.state["settings"]
        seed = recorded["seed"]
        begun = build_seeded(FromAdapter(factory, adapter) if adapter else factory, seed)
        form: Form = recorded["form"]
        plan = plan_recorded(
            begun, form, recorded["rank"], recorded["alpha"], recorded["layers"], recorded["dense_leaves"]
        )
        root = plan.base_of(plain_state(begun))
        if digest_tensors(root) != checkpoint.state["root"]:
            raise ExportError(
                f"{directory.path}: the model built now does not begin with the weights that the run began with: the "
                "model or the adapter it began from has changed, or this is another kind of machine. Export with what "
                "the run was made with, and where"
            )
        state = state_from_checkpoint(checkpoint, root, plan, seed)
        there = state.trainables
        lonely = [layer.name for layer in plan.layers if layer.a_key in there and layer.b_key not in there]
        if lonely:
            raise ExportError(
                f"{directory.path}: {recorded['strategy']} has no global model to export, since every client keeps its "
                f"own B (of {', '.join(lonely[:3])})"
            )
        return cls(directory, factory, adapter, seed, plan, state, root, inputs)

    @cached_property
    def untouched(self) -> nn.Module:
        """The plain model, before an adapter that the run began with; not to be changed."""
        return build_seeded(self.factory, self.seed)

    def plain(self) -> nn.Module:
        """A copy of `untouched`."""
        return deepcopy(self.untouched)

    @cached_property
    def before(self) -> dict[str, Tensor]:
        """The state dict of `untouched`."""
        return plain_state(self.untouched)

    @cached_property
    def imported(self) -> Update:
        """What the run began with beside `untouched`."""
        return read_adapter(self.untouched, self.adapter) if self.adapter else Update((), {})

    @cached_property
    def merged(self) -> dict[str, Tensor]:
        """The state dict of the run's model."""
        model = self.plain()
        apply_update(model, self.imported)
        return merged_state_dict(self.state, model, self.plan, self.seed)

    def model(self) -> nn.Module:
        """The run's model."""
        model = self.plain()
        model.load_state_dict(self.merged)
        return model

    @cached_property
    def update(self) -> Update:
        """What the run's model has beside `untouched`: layers whose product is zero are not among its layers."""
        layers = {layer.name: layer for layer in self.imported.layers if layer.weight_key not in self.plan.dense_leaves}
        layers |= {layer.name: layer for layer in self.plan.layers}
        pairs: Adapter = {}
        found: list[FactorisedLayer] = []
        for layer in layers.values():
            joined = join(layer, list(self._parts(layer)))
            if joined is not None:
                pairs |= joined
                found.append(layer)
        weights = {layer.weight_key for layer in layers.values()}
        canonical = canonical_names(self.untouched)
        values = {
            name: value
            for name, value in self.merged.items()
            if canonical.get(name, name) == name and name not in weights and not torch.equal(value, self.before[name])
        }
        return Update(tuple(found), pairs, values)

    def _parts(self, layer: FactorisedLayer) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """What a layer has gained, in its order: adapters and their scales."""
        own, key = {one.name for one in self.plan.layers}, layer.weight_key
        before = at_least_float32(self.before[key])
        if self.plan.form == "compressed" and layer.name in own:
            yield {layer.delta_key: self.state.trainables[key] - before}, 1.0
            return
        if self.plan.form != "from-zero" and layer.name in {one.name for one in self.imported.layers}:
            yield {part: self.imported.pairs[part] for part in (layer.a_key, layer.b_key)}, 1.0
        elif key in self.root and not torch.equal(self.root[key], self.before[key]):
            yield {layer.delta_key: at_least_float32(self.root[key]) - before}, 1.0
        if layer.name not in own:
            return
        for entry in self.state.ledger.entries:
            adapter = self.plan.whole(entry.adapter, self.seed, entry.draw)
            if has_product(layer, adapter):
                yield adapter, entry.scale
        current = self.plan.whole(self.state.trainables, self.seed, self.state.draw)
        if has_product(layer, current):
            yield current, self.plan.scale

    def unmerged_outputs(self) -> list[Tensor]:
        """The outputs of the run's model with nothing merged: ``W_0`` with all pairs beside it, as they are.

        Trained parameters and running statistics are read from the server's state, not from `merged`.
        """
        update, model = self.update, FunctionalModel(self.untouched, self.update.layers, Layout(1, 1.0), training=False)
        weights = {**self.before, **self.imported.values}
        for name, value in {**self.state.statistics, **self.state.trainables}.items():
            if name in weights and name not in {layer.weight_key for layer in update.layers}:
                weights[name] = value.to(weights[name].dtype)
        formats = {
            key: weights[layer.weight_key].dtype for layer in update.layers for key in (layer.a_key, layer.b_key)
        }
        pairs = {key: update.pairs[key].to(dtype) for key, dtype in formats.items()}
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads W alone
        try:
            with model.as_module(pairs, weights) as module:
                return outputs(module, self.inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    @cached_property
    def outputs_before(self) -> list[Tensor]:
        """The outputs of `untouched`.

        Raises:
            ExportError: the model cannot be called with the sample inputs.
        """
        try:
            return outputs(self.untouched, self.inputs)
        except ExportError:
            raise
        except Exception as error:  # whatever a model does with inputs that are not for it
            raise ExportError(
                f"inputs: {type(self.untouched).__name__} cannot be called with the sample inputs "
                f"({_described(self.inputs)}): {type(error).__name__}: {_first_line(error)}. Expected a tensor, "
                "a tuple of arguments or a dict of keywords that it takes"
            ) from error

    @cached_property
    def inputs(self) -> Inputs:
        """Sample inputs.

        Raises:
            ExportError: none were given for a model of one's own.
        """
        if self.given is not None:
            if not isinstance(self.given, Tensor | tuple | Mapping):
                raise ExportError(
                    f"inputs are of type {type(self.given).__name__}: expected a tensor, a tuple of arguments or a "
                    "dict of keywords"
                )
            return self.given
        model = self.untouched
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if _is_transformers(model) and isinstance(vocabulary, int):
            positions = getattr(cast("Any", model).config, "max_position_embeddings", None) or _TOKENS
            generator = torch.Generator().manual_seed(0)
            return {"input_ids": torch.randint(vocabulary, (2, min(_TOKENS, positions)), generator=generator)}
        raise ExportError(
            "sample inputs are needed to compare the export with the run's model: give inputs (on the command line "
            "--inputs my_app.task:sample_inputs), a tensor, a tuple of arguments or a dict of keywords"
        )

    def facts(self) -> dict[str, Any]:
        """What the report says of the run."""
        ledger = self.state.ledger
        return {
            "run": self.directory.path.name,
            "round": self.state.server_round,
            "ledger_version": ledger.version,
            "lineage": ledger.lineage,
        }


@dataclass(frozen=True)
class _Copies:
    """A factory of copies of a model."""

    model: nn.Module

    def __call__(self) -> nn.Module:
        return deepcopy(self.model)


def _of_settings(directory: RunDirectory, inputs: Inputs | None) -> tuple[Callable[[], nn.Module], Inputs | None, str]:
    """The factory of the plain model, sample inputs and the adapter that a run's settings name."""
    from fedloru_flwr.workload import plain_network, server_data

    recorded = directory.read_manifest().get("config")
    if not recorded:
        raise ExportError(
            f"{directory.path} was made by an app of your own, whose settings do not say what the model is: give the "
            "model's factory (on the command line --model my_app.task:Net)"
        )
    config = RunConfig.from_mapping(recorded)
    samples, spec = server_data(config)
    if inputs is None and samples is not None:
        inputs = samples.inputs[:_SAMPLES]
    elif inputs is None and spec.input_shape:
        inputs = torch.randn((_SAMPLES, *spec.input_shape), generator=torch.Generator().manual_seed(0))
    return plain_network(config, spec), inputs, config.init_adapter


def _export_merged(trained: Trained, directory: Path) -> dict[str, Any]:
    """Write the whole model and load it again."""
    layers, warnings = _merged_layers(trained)
    if all(torch.equal(value, trained.before[name]) for name, value in trained.merged.items()):
        raise ExportError(f"{trained.directory.path}: nothing has changed since the run began; nothing to export")
    own = trained.model()
    if _is_transformers(own):
        cast("Any", own).save_pretrained(directory)
        _save_tokenizer(own, directory)
        again = _load_pretrained(own, directory)
    else:
        atomic.write_tensors(directory / MODEL_FILE, trained.merged, {"format": "pt"})
        again = trained.plain()
        again.load_state_dict(load_file(directory / MODEL_FILE))
    _check_tensors(trained, again)
    check, more = _compare(trained, again, trained.unmerged_outputs())
    return {"base": "", "layers": layers, "whole_modules": [], "check": check, "warnings": [*warnings, *more]}


def _merged_layers(trained: Trained) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the report says of each layer of the merged model, and what people should know of it.

    The relative error is ``||(W - W_0) - B A||_F / ||B A||_F``: what the number format of ``W`` has rounded away.

    Raises:
        ExportError: a layer has a product, and its weight is as it was before.
        MismatchError: a layer's weight is not ``W_0 + B A`` up to rounding.
    """
    update = trained.update
    layers: dict[str, dict[str, Any]] = {}
    lost: dict[str, tuple[float, str]] = {}
    roundings = len(trained.state.ledger.entries) + 2  # each entry is folded in by itself
    for layer in update.layers:
        before, merged = trained.before[layer.weight_key], trained.merged[layer.weight_key]
        learnt, gained = product(layer, update.pairs).double(), merged.double() - before.double()
        norm = float(torch.linalg.vector_norm(learnt))
        if norm > 0 and torch.equal(before, merged):
            raise ExportError(
                f"layer {layer.name!r}: the merge leaves its weight as it was, since what the run has learnt of it "
                f"(norm {norm:.1e}) is less than the rounding of {_format_name(before)}: use format = 'peft', which "
                "keeps it"
            )
        off = float(torch.linalg.vector_norm(gained - learnt))
        rounding = roundings * _epsilon(before) * (float(torch.linalg.vector_norm(before.double())) + norm)
        if not off <= rounding + _LAYER_TOLERANCE * norm:
            raise MismatchError(
                f"layer {layer.name!r}: its merged weight is {off:.1e} away from W_0 + B A (norm), expected at most "
                f"{rounding:.1e}; nothing was exported"
            )
        error = off / (norm or 1.0)
        layers[layer.name] = {
            "shape": list(layer.weight_shape),
            "learnt_rank": update.rank_of(layer),
            "relative_error": error,
        }
        if error > _LOST_TOO_MUCH:
            lost[layer.name] = error, _format_name(before)
    if not lost:
        return layers, []
    worst = max(lost, key=lambda name: lost[name])
    error, kind = lost[worst]
    told = (
        f"rounding to {kind} has changed what was learnt of {len(lost)} of {len(layers)} layers by more than "
        f"{_LOST_TOO_MUCH:.0%} of it ({worst!r} by {error:.0%}): --format peft keeps it as it is"
    )
    return layers, [told]


def _check_tensors(trained: Trained, loaded: nn.Module) -> None:
    """Refuse a model whose tensors are not exactly those of the run's model.

    Raises:
        MismatchError: naming the first that differ.
    """
    found, expected = plain_state(loaded), trained.merged
    odd = [
        name
        for name in {**expected, **found}
        if name not in found or name not in expected or not _is_same(found[name], expected[name])
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise MismatchError(
            f"loaded again, the export has other tensors than the run's model: {', '.join(odd[:3])}{more}; nothing was "
            "exported"
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, in whatever formats."""
    both = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.cpu().to(both), other.cpu().to(both))


def _format_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _export_peft(trained: Trained, rank: int | None, directory: Path, final: Path) -> dict[str, Any]:
    """Write what the model has beside its base, and load it again."""
    exact = trained.update
    path = trained.directory.path
    if not trained.plan.layers:
        raise ExportError(
            f"{path}: its method trains every parameter as it is and has no factors to write as an adapter: use "
            "format = 'merged'"
        )
    if not exact.layers:
        raise ExportError(f"{path}: no factorised layer has changed since the run began; nothing to export")
    held = as_peft_holds_it(trained.untouched, exact)
    written, errors = held, dict.fromkeys((layer.name for layer in held.layers), 0.0)
    if rank is not None:
        pairs: Adapter = dict(held.pairs)
        for layer in exact.layers:  # not the dense leaves that are held as pairs
            pair, errors[layer.name] = compress(layer, held.pairs, rank)
            pairs |= pair
        written = Update(held.layers, pairs, held.values)
    base, base_name = _write_base(trained, directory, final)
    write_adapter(trained.plain(), written, directory, base_name)
    (directory / "README.md").write_text(_card(trained, base, base_name), encoding="utf-8")
    again = open_adapter(_load_base(trained, directory, base_name), directory)
    layers = _compare_layers(again, held, written, errors)
    compressed = None
    if rank is not None:
        compressed = trained.plain()
        apply_update(compressed, written)
    check, told = _compare(trained, again, None if compressed is None else outputs(compressed, trained.inputs))
    more = {"whole_modules": sorted(held.values), "check": check, "warnings": told}
    return {"base": base, "layers": layers, **more}


def _compare_layers(
    loaded: Any, held: Update, written: Update, errors: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """What the report says of each layer of an adapter.

    Args:
        loaded: PEFT's model.
        held: what the run has learnt.
        written: the same, or compressed.
        errors: the relative error that each layer is expected to have.

    Raises:
        MismatchError: PEFT has loaded something else than was written.
    """
    layers = {}
    for layer, found in products(loaded, held.layers):
        measured = relative_difference(product(layer, held.pairs), found)
        if not abs(measured - errors[layer.name]) <= _LAYER_TOLERANCE:
            raise MismatchError(
                f"layer {layer.name!r}: PEFT loads a product that is {measured:.1e} off (relative), expected "
                f"{errors[layer.name]:.1e}; nothing was exported"
            )
        layers[layer.name] = {
            "shape": list(layer.weight_shape),
            "learnt_rank": held.rank_of(layer),
            "rank": written.rank_of(layer),
            "relative_error": measured,
        }
    tensors = plain_tensors(loaded.base_model.model)
    lost = [name for name, value in held.values.items() if not torch.equal(tensors[name].detach(), value)]
    if lost:
        raise MismatchError(f"PEFT does not load what was written of {', '.join(lost[:5])}; nothing was exported")
    return layers


def _write_base(trained: Trained, directory: Path, final: Path) -> tuple[str, str | None]:
    """Write ``W_0`` unless it can be had by its name; how to come by it for people, and the name for PEFT."""
    model = trained.untouched
    if not _is_transformers(model):
        atomic.write_tensors(directory / BASE_FILE, trained.before, {"format": "pt"})
        return BASE_FILE, None
    name = str(getattr(model, "name_or_path", ""))
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if name and digest_tensors(plain_state(_load_pretrained(model, name))) == digest_tensors(trained.before):
            known = str(Path(name).absolute()) if Path(name).exists() else name
            return known, known
    cast("Any", model).save_pretrained(directory / BASE_DIRECTORY)
    _save_tokenizer(model, directory / BASE_DIRECTORY)
    return BASE_DIRECTORY, str(final / BASE_DIRECTORY)


def _load_base(trained: Trained, directory: Path, name: str | None) -> nn.Module:
    """The base as somebody else would come by it."""
    if name is None:
        model = trained.plain()
        model.load_state_dict(load_file(directory / BASE_FILE))
        return model
    own = directory / BASE_DIRECTORY
    return _load_pretrained(trained.untouched, own if own.exists() else name)


def _card(trained: Trained, base: str, base_name: str | None) -> str:
    """A model card that says how to load the adapter: PEFT's own is a form to fill in."""
    name, lines = type(trained.untouched).__name__, ["from peft import PeftModel"]
    if base_name is None:
        lines += ["from safetensors.torch import load_file"]
        if isinstance(trained.factory, NetworkFactory):
            lines += ["from fedloru_flwr.models import NetworkFactory", "", f"model = {trained.factory!r}()"]
        else:
            lines += ["", f"model = {name}()  # the network that was trained"]
        lines += [f'model.load_state_dict(load_file("{base}"))']
    else:
        lines += [f"from transformers import {name}", "", f'model = {name}.from_pretrained("{base}")']
    lines += ['model = PeftModel.from_pretrained(model, ".")']
    known = "" if base_name is None or Path(base_name).is_absolute() else f"base_model: {base_name}\n"
    facts = trained.facts()
    return _CARD.format(base=known, run=facts["run"], round=facts["round"], snippet="\n".join(lines))


def _is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of the transformers library's, with ``save_pretrained`` and ``from_pretrained``."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__
    )


def _load_pretrained(like: nn.Module, name: str | os.PathLike[str]) -> nn.Module:
    """A model of the same class and number format, by transformers' ``from_pretrained``."""
    cls: Any = type(like)
    loaded: nn.Module = cls.from_pretrained(os.fspath(name), dtype=cast("Any", like).dtype)
    return loaded


def _save_tokenizer(model: nn.Module, directory: Path) -> None:
    """Put the tokenizer beside the model, where the model was loaded from a place that has one."""
    from transformers import AutoTokenizer

    name = str(getattr(model, "name_or_path", ""))
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
        if name:
            AutoTokenizer.from_pretrained(name, local_files_only=True).save_pretrained(directory)


def _compare(
    trained: Trained, loaded: nn.Module, expected: list[Tensor] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Compare the outputs of what was loaded again with those of the run's model, or with those ``expected``.

    Returns:
        What the report says of it, and what people should know.

    Raises:
        ExportError: the model cannot be called with the sample inputs.
        MismatchError: they differ by more than rounding; or, where the run has changed the outputs more than rounding
            does, they are nearer to those of the model it began from.
    """
    inputs, before = trained.inputs, trained.outputs_before
    run, got = outputs(trained.model(), inputs), outputs(loaded, inputs)
    want = run if expected is None else expected
    if len(want) != len(got) or any(one.shape != other.shape for one, other in zip(want, got, strict=True)):
        raise MismatchError("the model that was loaded again has outputs of other shapes; nothing was exported")
    if not want or not all(bool(one.isfinite().all()) for one in want):
        raise MismatchError("the run's model gives no outputs, or such that are not finite; nothing was exported")
    scale = max(float(one.abs().max()) for one in want if one.numel())
    epsilon = max(_epsilon(value) for value in trained.before.values())
    difference = _largest(want, got)
    change = _largest(want, before)
    rounding = 64 * epsilon * scale
    limit = min(max(_TOLERANCE, _ROUNDINGS * epsilon) * scale, max(change / 2, rounding))
    if not difference <= limit:
        raise MismatchError(
            f"loaded again, the export gives outputs that differ by {difference:.1e} from those expected, whose "
            f"largest is {scale:.1e} and which training has changed by {change:.1e}; expected at most {limit:.1e}. "
            "Nothing was exported"
        )
    warnings = []
    if change <= limit:  # the untouched model would have passed
        warnings.append(
            f"on these samples training has changed the outputs by {change:.1e}, no more than rounding may, so that "
            "they say nothing of the export; its tensors were compared one by one. Give other inputs (--inputs) to see "
            "a difference"
        )
    return {
        "samples": f"{_count(inputs)} sample inputs",
        "difference": difference,
        "largest_output": scale,
        "change_by_training": change,
        "difference_from_run": _largest(run, got),
    }, warnings


def _described(inputs: Inputs) -> str:
    """The shapes of inputs."""
    return ", ".join(f"{_format_name(one)} {tuple(one.shape)}" for one in _tensors(inputs)) or "without a tensor"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _count(inputs: Inputs) -> int:
    tensors = list(_tensors(inputs))
    return len(tensors[0]) if tensors and tensors[0].dim() else 1


def _largest(one: list[Tensor], other: list[Tensor]) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(one, other, strict=True) if x.numel()), default=0.0)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor that a model in eval mode gives for some inputs, in float64, in their order."""
    model.eval()
    if isinstance(inputs, Mapping):
        given = model(**inputs)
    else:
        given = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [tensor.double() for tensor in _tensors(given) if tensor.is_floating_point()]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
