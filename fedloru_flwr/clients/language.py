"""Local training and evaluation of a transformers model on tokens: a language model, or a classifier of texts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.clients.training import LocalOptimisation, batches, make_optimizer
from fedloru_flwr.data import IGNORED, Samples
from fedloru_flwr.models.generation import greedy
from fedloru_flwr.models.pretrained import PretrainedTask, logits, padding, read_tokenizer

_LARGEST_EXPONENT = 700.0  # exp of it is finite


@dataclass(frozen=True)
class LanguageWork:
    """What a client does with a transformers model.

    The loss is the mean cross-entropy over the tokens that have a label, so over answers alone; of a classifier over
    samples. A step takes ``accumulate_steps`` batches, each weighted by its number of labels: the same step as from one
    batch as large as all of them.

    Attributes:
        task: ``"causal-lm"`` or ``"classification"``.
        name: of the model, whose tokenizer it is.
        batch_size: samples in memory at once in an evaluation.
        accumulate_steps: batches whose gradients make one step.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        exact_match_samples: how many held-out samples are answered in an evaluation.
    """

    task: PretrainedTask
    name: str
    batch_size: int = 8
    accumulate_steps: int = 1
    gradient_checkpointing: bool = False
    exact_match_samples: int = 0

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of what `evaluate` returns, in their order."""
        if self.task == "classification":
            return "accuracy", "loss"
        return ("accuracy", "loss", "perplexity", *(["exact_match"] if self.exact_match_samples else []))

    def train(
        self,
        model: nn.Module,
        samples: Samples,
        how: LocalOptimisation,
        generator: torch.Generator,
        device: torch.device,
    ) -> float:
        """Train the model's trainable parameters; return the mean loss of the last epoch.

        Args:
            model: changed in place; left on ``device``.
            samples: the client's training samples.
            how: the optimisation.
            generator: of the order of the samples.
            device: where to train.
        """
        model.to(device).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(parameters, how)
        total, count = 0.0, 0
        with _checkpointing(model, self.gradient_checkpointing):
            for _ in range(how.epochs):
                total, count = 0.0, 0
                for step in batches(len(samples), how.batch_size * self.accumulate_steps, generator, no_single=False):
                    labelled = int((samples.labels[step] != IGNORED).sum())
                    optimizer.zero_grad(set_to_none=True)
                    for indices in torch.split(step, how.batch_size):
                        inputs, labels, mask = self._batch(samples, indices, device)
                        outputs = how.outputs(partial(logits, model, inputs, mask), device)
                        loss = _summed_loss(outputs, labels)
                        (loss / labelled).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
                        total += float(loss.detach())
                    if how.max_grad_norm > 0:
                        nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
                    optimizer.step()
                    count += labelled
        return total / count

    @torch.no_grad()
    def evaluate(self, model: nn.Module, samples: Samples, device: torch.device) -> dict[str, float]:
        """The mean ``loss`` over labels and ``accuracy``, the share of labels that are the most likely; and more.

        Of a language model also ``perplexity = exp(loss)`` and, if wanted, ``exact_match``, the share of answers that
        greedy generation gives to the letter.

        Args:
            model: left on ``device``, in eval mode.
            samples: not empty.
            device: where to compute.
        """
        model.to(device).eval()
        total, right, count = 0.0, 0, 0
        for indices in torch.split(torch.arange(len(samples)), self.batch_size):
            inputs, labels, mask = self._batch(samples, indices, device)
            outputs = logits(model, inputs, mask)
            total += float(_summed_loss(outputs, labels))
            right += int((outputs.argmax(dim=-1) == labels).sum())
            count += int((labels != IGNORED).sum())
        loss = total / count
        found = {"accuracy": right / count, "loss": loss}
        if self.task == "causal-lm":
            found["perplexity"] = math.exp(min(loss, _LARGEST_EXPONENT))
        if self.exact_match_samples:
            chosen = range(min(self.exact_match_samples, len(samples)))
            found["exact_match"] = sum(self._is_exact(model, samples, index) for index in chosen) / len(chosen)
        return found

    def answers(
        self, model: nn.Module, samples: Samples, count: int, max_new_tokens: int, device: torch.device
    ) -> list[dict[str, str]]:
        """What the model says to the first prompts.

        Args:
            model: left on ``device``, in eval mode.
            samples: of a causal language model.
            count: how many prompts.
            max_new_tokens: of an answer.
            device: where to compute.

        Returns:
            Of each ``prompt``, ``reference`` (the data's answer) and ``generated``.
        """
        model.to(device).eval()
        tokenizer = read_tokenizer(self.name)
        rows = []
        for index in range(min(count, len(samples))):
            prompt, answer = question(samples, index)
            said = greedy(model, prompt, max_new_tokens, tokenizer.eos_token_id)
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, answer, said)]
            rows.append(dict(zip(("prompt", "reference", "generated"), texts, strict=True)))
        return rows

    def _is_exact(self, model: nn.Module, samples: Samples, index: int) -> bool:
        """Whether greedy generation gives a sample's answer, and ends where it ends."""
        tokenizer = read_tokenizer(self.name)
        prompt, answer = question(samples, index)
        said = greedy(model, prompt, len(answer), tokenizer.eos_token_id)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in (answer, said)]
        return bool(texts[0] == texts[1])

    def _batch(self, samples: Samples, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, labels and attention mask of some samples, without padding that none of them needs."""
        inputs, labels = samples.inputs[indices], samples.labels[indices]
        if self.task == "causal-lm":
            length = int((labels != IGNORED).any(dim=0).nonzero().max()) + 1
            return inputs[:, :length].to(device), labels[:, :length].to(device), None
        # Right padding alone: the token that pads may end texts too.
        mask = (inputs != padding(self.name)).flip(1).cummax(dim=1).values.flip(1).long()
        mask[:, 0] = 1
        length = int(mask.sum(dim=1).max())
        return inputs[:, :length].to(device), labels.to(device), mask[:, :length].to(device)


def question(samples: Samples, index: int) -> tuple[list[int], list[int]]:
    """The tokens of a sample up to its first answer, and those of that answer, its end included.

    A text without a prompt is asked for by its first token.
    """
    labels = samples.labels[index]
    labelled = labels != IGNORED
    start = int(labelled.nonzero()[0])
    after = (~labelled[start:]).nonzero()
    end = start + int(after[0]) if len(after) else len(labels)
    return samples.inputs[index, : start + 1].tolist(), labels[start:end].tolist()


def _summed_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        outputs.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Have the model compute its activations again in the backward pass, for a while."""
    if not wanted:
        yield
        return
    # Newer releases of transformers have another name for it.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
