"""Make a small language model and the instructions that it is fine-tuned on: text, tokenizer, pretraining, files.

The model is a real one, only small: a Llama with its byte-level BPE tokenizer, pretrained on plain English that
`texts.py` writes. It has read the facts that the instructions ask for, but never an instruction. Everything follows
from the seed; the weights are the same again on the same kind of machine and versions, the text everywhere.

::

    python examples/llm-tiny/make.py [--output DIRECTORY]
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from texts import documents, instructions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).parent
CONTEXT = 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Roles are written in letters the model knows rather than as tokens it has never seen, and an answer starts a line, so
# that the tokens of a prompt and of its answer are those of the two together.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize + ':\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
        {{- '' if loop.last else '\n' }}
    {%- else %}
        {{- message['content'] + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\n' }}
{%- endif %}
"""


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which keeps every text as it is and writes each digit as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama of four blocks, fewer heads for keys than for queries, and an output tied to the embedding."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ids)
    return model


def windows(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], batch_size: int) -> Iterator[Tensor]:
    """Join texts into one stream, each between its start and end, and cut it: int64 of ``(batch_size, CONTEXT)``."""
    stream: list[int] = []
    size = batch_size * CONTEXT
    while True:
        while len(stream) < size:
            stream += tokenizer.encode(f"{BOS}{next(texts)}{EOS}")
        yield torch.tensor(stream[:size]).view(batch_size, CONTEXT)
        stream = stream[size:]


def pretrain(
    model: LlamaForCausalLM, batches: Iterator[Tensor], steps: int, learning_rate: float
) -> Iterator[tuple[int, float]]:
    """Train in place with AdamW, a short warm-up and a cosine to zero; yields each step and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, float(loss.detach())
    model.eval()


def chat(row: dict[str, str]) -> list[dict[str, str]]:
    """Write a row as the messages of a chat, the input on a line of its own."""
    asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def answers(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Tokenize rows as chats, in padded batches: ``labels`` are the answer and its end, -100 elsewhere."""
    for start in range(0, len(rows), size):
        batch = tokenizer.apply_chat_template(
            [chat(row) for row in rows[start : start + size]],
            padding=True,
            return_tensors="pt",
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = batch["input_ids"]
        labels = torch.where(torch.as_tensor(batch["assistant_masks"]).bool(), ids, -100)
        yield {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return the exponential of the mean loss of a labelled token."""
    total, count = 0.0, 0
    for batch in batches:
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    return math.exp(total / count)


def plain_perplexity(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int | str, count: int = 2) -> float:
    """Return the perplexity on ``count`` batches of sixteen windows of plain text from another seed."""
    batches = itertools.islice(windows(tokenizer, documents(seed), 16), count)
    return perplexity(model, ({"input_ids": batch, "labels": batch} for batch in batches))


def write_instructions(directory: Path, seed: int, train_each: int, test_each: int) -> list[dict[str, str]]:
    """Write ``train.jsonl`` and ``test.jsonl``; return the test rows."""
    directory.mkdir(parents=True, exist_ok=True)
    train, test = instructions(seed, train_each, test_each)
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return test


def main(
    output: Annotated[Path, typer.Option(help="Where model/ and instructions/ are written.")] = HERE,
    seed: Annotated[int, typer.Option(help="Of the text, the questions and the weights.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of pretraining.")] = 3000,
    batch_size: Annotated[int, typer.Option(min=1, help=f"Windows of {CONTEXT} tokens a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The highest of pretraining.")] = 4e-3,
    vocab_size: Annotated[int, typer.Option(min=300, help="Tokens of the vocabulary.")] = 1024,
    train_each: Annotated[int, typer.Option(min=1, help="Training rows of each category.")] = 400,
    test_each: Annotated[int, typer.Option(min=1, help="Test rows of each category.")] = 40,
) -> None:
    """Write a pretrained model with its tokenizer, and instructions to fine-tune it on."""
    started = time.monotonic()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on it
    torch.manual_seed(seed)
    logging.disable_progress_bar()
    test = write_instructions(output / "instructions", seed, train_each, test_each)
    tokenizer = make_tokenizer(itertools.islice(documents(seed), 5000), vocab_size)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for step, loss in pretrain(model, windows(tokenizer, documents(seed), batch_size), steps, learning_rate):
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.half().save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    model.float()
    print(f"perplexity on unseen plain text: {plain_perplexity(model, tokenizer, f'unseen {seed}'):.2f}")
    print(f"perplexity on the answers of the test rows: {perplexity(model, answers(tokenizer, test)):.2f}")


if __name__ == "__main__":
    typer.run(main)
