"""Models of the transformers library, by a name on the hub or a directory, as factories of plain ``nn.Module``.

Nothing is imported from transformers before a factory, its configuration or its tokenizer is asked for.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import derive_seed, seeded, uniform
from fedloru_flwr.models.quantised import Quantised

PretrainedTask = Literal["causal-lm", "classification"]
BasePrecision = Literal["float32", "bfloat16", "int8", "nf4"]
_DEFAULT_DEVIATION = 0.02
_LINEAR = ("Linear", "Conv1D")


class PretrainedError(ValueError):
    """A model of the transformers library that cannot be had; says which, why and what would help."""


@dataclass(frozen=True)
class PretrainedFactory:
    """Builds a model of the transformers library; equal factories build equal networks, a new head included.

    The model is transformers' own class, with its ``state_dict`` keys. A causal language model has to come with all of
    its weights. The head of a classifier that its source does not have is drawn from ``seed``, the same on every
    machine. On the meta device (``with torch.device("meta")``) only the configuration is read.

    Attributes:
        name: on the hub, or a directory that ``save_pretrained`` has made.
        task: ``"causal-lm"`` (``AutoModelForCausalLM``) or ``"classification"``
            (``AutoModelForSequenceClassification``).
        num_labels: classes of a classifier; 0 for a language model.
        precision: number format of the weights: ``"float32"`` or ``"bfloat16"``. ``"int8"`` and ``"nf4"`` are built in
            bfloat16, and quantised by the clients.
        seed: of a new head.

    Raises:
        ValueError: for an unknown task or precision, a classifier of fewer than 2 classes, or a negative seed.
    """

    name: str
    task: PretrainedTask = "causal-lm"
    num_labels: int = 0
    precision: BasePrecision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in get_args(PretrainedTask):
            raise ValueError(f"task = {self.task!r} is not one of {', '.join(get_args(PretrainedTask))}")
        if self.precision not in get_args(BasePrecision):
            raise ValueError(f"base-precision = {self.precision!r} is not one of {', '.join(get_args(BasePrecision))}")
        if self.task == "classification" and self.num_labels < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {self.num_labels}")

    @property
    def quantised(self) -> Quantised | None:
        """In how few bits the clients hold the frozen weights; None for as they are built."""
        return self.precision if self.precision in ("int8", "nf4") else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are built."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def configuration(self) -> Any:
        """The model's configuration, of which the caller may change its copy.

        Raises:
            PretrainedError: there is none, or transformers is not installed.
        """
        config = read_configuration(self.name)
        if self.task == "classification":
            config.num_labels = self.num_labels
            config.pad_token_id = padding(self.name)  # by which a batch's samples are filled up, and their ends found
        return config

    def skeleton(self) -> nn.Module:
        """The model on the meta device, from its configuration alone.

        Raises:
            PretrainedError: see `configuration`.
        """
        with torch.device("meta"):
            return self()

    def __call__(self) -> nn.Module:
        """Build the model.

        Raises:
            PretrainedError: it cannot be loaded, or its source is no causal language model.
        """
        config = self.configuration()
        import transformers

        cls = {
            "causal-lm": transformers.AutoModelForCausalLM,
            "classification": transformers.AutoModelForSequenceClassification,
        }[self.task]
        try:
            if torch.get_default_device().type == "meta":
                return cast("nn.Module", cls.from_config(config, dtype=self.dtype))
            with seeded(derive_seed(self.seed, "pretrained")), _quiet():
                model, told = cls.from_pretrained(
                    self.name,
                    config=config,
                    dtype=self.dtype,
                    output_loading_info=True,
                    local_files_only=_is_here(self.name),
                )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise _unavailable(self.name, error) from error
        self._complete(model, sorted(told["missing_keys"]))
        return cast("nn.Module", model)

    @torch.no_grad()
    def _complete(self, model: Any, missing: list[str]) -> None:
        """Draw what a classifier's source has no values for."""
        if self.task == "causal-lm":
            if missing:
                raise PretrainedError(
                    f"model = 'hf:{self.name}' has no weights for {', '.join(missing[:3])}: it is no causal language "
                    "model. Use one that is, or task = 'classification'"
                )
            return
        deviation = getattr(model.config, "initializer_range", None) or _DEFAULT_DEVIATION
        for name in missing:
            tensor = model.get_parameter(name)
            if tensor.dim() > 1:
                drawn = uniform(self.seed, "initial", name, shape=tensor.shape, bound=math.sqrt(3) * deviation)
                tensor.copy_(drawn)
            elif name.endswith(".bias"):
                tensor.zero_()


@lru_cache(maxsize=8)
def linear_layers(factory: PretrainedFactory) -> tuple[str, ...]:
    """The last parts of the names of all linear layers but the model's head, such as ``q_proj``, in their order.

    Where the head has a layer whose name ends alike, the others' names are given in full.
    """
    model: Any = factory.skeleton()
    inside = f"{model.base_model_prefix}."
    linear = [name for name, module in model.named_modules() if type(module).__name__ in _LINEAR]
    of_head = {name.rpartition(".")[2] for name in linear if not name.startswith(inside)}
    found = []
    for name in linear:
        if name.startswith(inside):
            last = name.rpartition(".")[2]
            found.append(name if last in of_head else last)
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=8)
def head(factory: PretrainedFactory) -> tuple[str, ...]:
    """The parameters of a model beside its transformer: a classifier's head."""
    model: Any = factory.skeleton()
    return tuple(name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}."))


def read_configuration(name: str) -> Any:
    """A fresh copy of the configuration of a model of the transformers library.

    Raises:
        PretrainedError: see `PretrainedFactory.configuration`.
    """
    return deepcopy(_configuration(name))


@lru_cache(maxsize=4)
def _configuration(name: str) -> Any:
    transformers = library()
    _check_place(name)
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=_is_here(name))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unavailable(name, error) from error


@lru_cache(maxsize=2)
def read_tokenizer(name: str) -> Any:
    """The tokenizer of a model of the transformers library, the same object for each call.

    Raises:
        PretrainedError: there is none, or transformers is not installed.
    """
    transformers = library()
    _check_place(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=_is_here(name))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PretrainedError(
            f"model = 'hf:{name}' has no tokenizer that can be loaded ({_first_line(error)}): save the model's "
            "tokenizer beside it with save_pretrained"
        ) from error


def padding(name: str) -> int:
    """The token that fills up samples: the tokenizer's, else the end of a text, else 0."""
    tokenizer = read_tokenizer(name)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def library() -> Any:
    """The transformers library.

    Raises:
        PretrainedError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise PretrainedError(
            "model = 'hf:...' needs the transformers library: pip install 'fedloru-flwr[llm]'"
        ) from None
    return transformers


def _is_here(name: str) -> bool:
    return Path(name).is_dir()


def _check_place(name: str) -> None:
    """Refuse a directory that is not there: it is no name on the hub."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    if is_path and not _is_here(name):
        raise PretrainedError(
            f"model = 'hf:{name}': there is no directory {Path(name).absolute()}. Expected one that save_pretrained "
            "has made, or a name on the hub such as hf:meta-llama/Llama-3.2-1B"
        )


def _unavailable(name: str, error: Exception) -> PretrainedError:
    where = (
        "the directory has to hold config.json and the weights, as save_pretrained writes them"
        if _is_here(name)
        else "check the name and the network, log in to the hub if the model is gated, or give a directory with it"
    )
    return PretrainedError(f"model = 'hf:{name}' cannot be loaded ({_first_line(error)}): {where}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and its report of new heads, which is no news here, off the terminal."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def logits(model: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of a transformers model.

    Args:
        model: of `PretrainedFactory`, with or without adapters.
        inputs: token numbers, ``(batch, length)``.
        mask: 1 for tokens to attend to, 0 for padding, ``(batch, length)``; a causal language model whose samples are
            padded at their ends needs none.

    Returns:
        ``(batch, length, vocabulary)`` of a language model, ``(batch, classes)`` of a classifier.
    """
    if mask is None:
        return cast("Tensor", model(input_ids=inputs, use_cache=False).logits)
    return cast("Tensor", model(input_ids=inputs, attention_mask=mask).logits)
