"""Read an Arrow table's rows as token numbers: instructions with their answers, or texts with a class.

A sample of a causal language model is ``inputs[t]``, the tokens of a row, and ``labels[t]``, the token that has to
follow, or -100 where none has to be learnt: in the prompt and in the padding at the end.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedloru_flwr.data.columns import Table, choose_label, declared_names, read_groups, read_labels
from fedloru_flwr.data.samples import IGNORED, DataConfig, DataError, Label, Split, fault, split_list
from fedloru_flwr.models.pretrained import PretrainedError, padding, read_tokenizer

ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
FORMS = "instruction and output (and input), messages, prompt and completion, or text"
_TEXT_COLUMNS = ("sentence", "text", "question", "premise", "sentence1", "question1", "content")
_PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "question": "sentence"}

_DAY = "26 Jul 2024"

Piece = tuple[str, bool]  # a text, and whether it is to be learnt
Example = tuple[list[int], list[int]]  # inputs and labels, of one length


@dataclass(frozen=True)
class Sequences:
    """One split of rows to learn to write.

    Attributes:
        inputs: int64, ``(n, length)``.
        labels: int64, ``(n, length)``.
        groups: ``n`` values of the partition column, or empty.
        kinds: ``n`` values of the label column, or empty.
        note: how many rows were left out, for people; empty for none.
    """

    inputs: Tensor
    labels: Tensor
    groups: tuple[Label, ...]
    kinds: tuple[Label, ...]
    note: str

    def take(self, indices: Sequence[int]) -> "Sequences":
        """The rows at these indices."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        groups, kinds = (tuple(of[index] for index in indices) if of else () for of in (self.groups, self.kinds))
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen], groups=groups, kinds=kinds)


def read_sequences(
    tables: dict[str, Table], config: DataConfig, origin: str, grouped: bool = True
) -> dict[str, Sequences]:
    """Read the rows of every split for a causal language model.

    Rows are tokenised and cut to ``max_length``; those of which no token of an answer is left are dropped.

    Args:
        tables: one for each split, ``train`` among them.
        config: says how.
        origin: what to call the source in messages.
        grouped: whether to read the partition column, if ``config`` names one.

    Raises:
        DataError: rows of no known form, or none whose answer fits.
    """
    tokenizer = _tokenizer(config)
    found = {}
    for split, table in tables.items():
        where = f"the {split} split of {origin}"
        if not table.num_rows:
            raise DataError(f"{where} has no rows. Give at least one sample.")
        pieces, templated = _pieces(table, config, tokenizer, where)
        examples = [_example(row, tokenizer, config.max_length, templated=templated) for row in pieces]
        kept = [index for index, (_, labels) in enumerate(examples) if any(label != IGNORED for label in labels)]
        if not kept:
            problem = f"no row of {where} has a token of its answer within so many tokens"
            raise fault("max-length", config.max_length, problem, "Raise it, or shorten the prompts")
        silent = sum(not any(is_answer for _, is_answer in row) for row in pieces)
        lost = len(examples) - len(kept) - silent
        reasons = {f"max-length = {config.max_length} leaves nothing of their answer": lost}
        reasons |= {"the assistant says nothing in them": silent}
        note = "; ".join(
            f"{count} of {len(examples)} rows of {where} are left out: {reason}"
            for reason, count in reasons.items()
            if count
        )
        is_train = table is tables["train"]
        groups = read_groups(table, config, where) if grouped and is_train else ()
        by_kind = is_train and config.label_column in table.column_names
        kinds = tuple(read_labels(table, config.label_column, where)) if by_kind else ()
        sequences = [examples[index] for index in kept]
        groups, kinds = (tuple(values[index] for index in kept) if values else () for values in (groups, kinds))
        fill = padding(config.tokenizer)
        inputs = _padded([inputs for inputs, _ in sequences], fill)
        labels = _padded([labels for _, labels in sequences], IGNORED)
        found[split] = Sequences(inputs, labels, groups, kinds, note)
    return found


def read_texts(tables: dict[str, Table], config: DataConfig, origin: str, grouped: bool = True) -> dict[str, Split]:
    """Read the rows of every split for a classifier of texts or of pairs of texts.

    Args:
        tables: one for each split, ``train`` among them.
        config: names the columns.
        origin: what to call the source in messages.
        grouped: whether to read the partition column, if ``config`` names one.

    Raises:
        DataError: a column is missing or ambiguous, or holds no text or no label.
    """
    tokenizer = _tokenizer(config)
    train = tables["train"]
    label = choose_label(train, config, origin)
    columns = _text_columns(train, label, config, origin)
    rows: dict[str, list[list[int]]] = {}
    for split, table in tables.items():
        where = f"the {split} split of {origin}"
        if not table.num_rows:
            raise DataError(f"{where} has no rows. Give at least one sample.")
        texts = [_strings(table, column, where) for column in columns]
        rows[split] = tokenizer(*texts, truncation=True, max_length=config.max_length)["input_ids"]
    length = max(len(row) for split in rows.values() for row in split)
    fill = padding(config.tokenizer)
    splits = {}
    for split, table in tables.items():
        where = f"the {split} split of {origin}"
        is_train = table is train
        splits[split] = Split(
            inputs=_padded(rows[split], fill, length),
            labels=read_labels(table, label, where),
            class_names=declared_names(table, label),
            groups=read_groups(table, config, where) if grouped and is_train else (),
        )
    return splits


def _tokenizer(config: DataConfig) -> Any:
    try:
        return read_tokenizer(config.tokenizer)
    except PretrainedError as error:
        raise DataError(str(error)) from error


def _padded(rows: Sequence[Sequence[int]], fill: int, length: int = 0) -> Tensor:
    """The rows as one int64 tensor ``(n, length)``, filled up at their ends."""
    length = length or max(len(row) for row in rows)
    padded = torch.full((len(rows), length), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


def _strings(table: Table, column: str, where: str) -> list[str]:
    values: list[str] = table[column].to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, str):
            problem = f"{where} has {value!r} there in row {row} (the first is 0), which is no text"
            raise fault("input-columns", column, problem, "Give a text in every row")
    return values


def _text_columns(table: Table, label: str, config: DataConfig, origin: str) -> tuple[str, ...]:
    """The one or two columns of texts to classify."""
    asked = split_list(config.input_columns)
    missing = [name for name in asked if name not in table.column_names]
    if missing or len(asked) > 2:
        problem = f"{origin} has no column {missing[0]!r}" if missing else "a sample is one text or a pair of texts"
        remedy = f"Name one or two of its columns: {', '.join(table.column_names)}"
        raise fault("input-columns", config.input_columns, problem, remedy)
    if asked:
        return asked
    found = [name for name in _TEXT_COLUMNS if name in table.column_names and name != label]
    for first, second in _PAIRS.items():
        if first in table.column_names and second in table.column_names and label not in (first, second):
            return first, second
    if not found:
        remedy = f"Name one or two of its columns: {', '.join(table.column_names)}"
        raise fault("input-columns", "", f"{origin} has none of the columns {', '.join(_TEXT_COLUMNS)}", remedy)
    return (found[0],)


def _pieces(table: Table, config: DataConfig, tokenizer: Any, where: str) -> tuple[list[list[Piece]], bool]:
    """The texts of every row, and which of them are to be learnt; and whether a chat template has written them."""
    names = set(table.column_names)
    chat = getattr(tokenizer, "chat_template", None) and config.prompt_template == "auto"
    make: Callable[[dict[str, Any]], list[Piece]]
    if {"instruction", "output"} <= names:
        columns = [name for name in ("instruction", "input", "output") if name in names]
        make = _chat_instruction(tokenizer) if chat else _instruction(config.prompt_template)
    elif "messages" in names:
        columns = ["messages"]
        if not getattr(tokenizer, "chat_template", None):
            problem = f"{where} has messages, and the tokenizer of hf:{config.tokenizer} has no chat template"
            remedy = "Use a model whose tokenizer has one, or rows with instruction and output"
            raise fault("dataset", config.dataset, problem, remedy)
        make = _conversation(tokenizer)
    elif {"prompt", "completion"} <= names:
        columns = ["prompt", "completion"]
        make = _completion
    elif "text" in names:
        columns = ["text"]
        make = _plain
    else:
        problem = f"the columns of {where} are {', '.join(table.column_names)}"
        raise fault("dataset", config.dataset, problem, f"Give rows with {FORMS}")
    rows = table.select(columns).to_pylist()
    made = []
    for number, row in enumerate(rows):
        try:
            made.append(make(row))
        except Exception as error:  # whatever a template, which is the model's own, makes of a row it does not expect
            problem = f"row {number} (the first is 0) of {where} cannot be used ({error})"
            raise fault("dataset", config.dataset, problem, f"Give rows with {FORMS}, none of them empty") from error
    return made, columns == ["messages"] or ("instruction" in columns and bool(chat))


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected a text")
    return value


def _instruction(template: str) -> Callable[[dict[str, Any]], list[Piece]]:
    def make(row: dict[str, Any]) -> list[Piece]:
        extra = row.get("input") or ""
        own = template
        if template in ("auto", "alpaca"):
            own = ALPACA_WITH_INPUT if extra else ALPACA
        elif extra and "{input}" not in own:
            raise ValueError("it has an input, and prompt-template has no {input}")
        # Not `str.format`: an instruction may hold braces.
        before, _, after = own.partition("{instruction}")
        parts = [part.replace("{input}", extra) for part in (before, after)]
        return [(_text(row, "instruction").join(parts), False), (_text(row, "output"), True)]

    return make


def _chat_instruction(tokenizer: Any) -> Callable[[dict[str, Any]], list[Piece]]:
    converse = _conversation(tokenizer)

    def make(row: dict[str, Any]) -> list[Piece]:
        extra = row.get("input") or ""
        asked = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
        return converse(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": _text(row, "output")},
                ]
            }
        )

    return make


def _completion(row: dict[str, Any]) -> list[Piece]:
    return [(_text(row, "prompt"), False), (_text(row, "completion"), True)]


def _plain(row: dict[str, Any]) -> list[Piece]:
    return [(_text(row, "text"), True)]


def _conversation(tokenizer: Any) -> Callable[[dict[str, Any]], list[Piece]]:
    """Divide a conversation, as the chat template writes it, into what is asked and what the assistant says."""

    def written(messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        # Llama's templates write the date, unless it is given: the same one on every machine and every day.
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=_DAY,
            )
        )

    def make(row: dict[str, Any]) -> list[Piece]:
        messages = [{key: value for key, value in one.items() if value is not None} for one in row["messages"]]
        whole = written(messages, False)
        pieces: list[Piece] = []
        at = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = written(messages[:index], True), written(messages[: index + 1], False)
            if not (whole.startswith(before) and whole.startswith(after) and at <= len(before) < len(after)):
                # The template writes earlier turns in another way once there are later ones: learn the last alone.
                if index < len(messages) - 1:
                    continue
                # A prompt for the next answer may hold more than the answer will have before it, such as "<think>".
                prompts = (before, written(messages[:index], False))
                before = next((prompt for prompt in prompts if whole.startswith(prompt)), whole)
                if before == whole:
                    raise ValueError("the chat template does not write the last answer after what comes before it")
                pieces, at, after = [], 0, whole
            pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        return pieces

    return make


def _example(pieces: Iterable[Piece], tokenizer: Any, max_length: int, *, templated: bool) -> Example:
    """Tokens and what has to follow each of them, at most ``max_length``."""
    tokens: list[int] = []
    learnt: list[bool] = []
    end = tokenizer.eos_token_id
    for index, (text, is_answer) in enumerate(pieces):
        # A chat template writes the special tokens itself.
        own = bool(index == 0 and not (templated and text.startswith(tokenizer.bos_token or "\0")))
        ids = tokenizer(text, add_special_tokens=own)["input_ids"]
        if own and ids and ids[-1] == end:
            ids = ids[:-1]  # of tokenizers that end every text
        # A chat template may write the end itself, and a line break after it, which is no part of the answer.
        said = len(ids) - ids[::-1].index(end) if templated and end in ids else len(ids)
        tokens += ids
        learnt += [is_answer and position < said for position in range(len(ids))]
    if end is not None and learnt and learnt[-1] and tokens[-1] != end:
        tokens.append(end)
        learnt.append(True)
    inputs = tokens[:-1][:max_length]
    labels = [token if is_answer else IGNORED for token, is_answer in zip(tokens[1:], learnt[1:], strict=True)]
    labels = labels[:max_length]
    while labels and labels[-1] == IGNORED:  # nothing is learnt of what comes after the last answer
        labels.pop()
    return inputs[: len(labels)], labels


def pack(sequences: Sequences, config: DataConfig) -> Sequences:
    """Join rows to samples of ``max_length`` tokens at most.

    Rows go whole and in their order to the sample that is being filled, the tokenizer's end of text between them; those
    of another value of the partition or label column to one of their own. Tokens attend to the rows before theirs.

    Args:
        sequences: as `read_sequences` gives them.
        config: for the length, and the token to fill up with.
    """
    count = len(sequences.labels)
    lengths = [int(row.nonzero().max()) + 1 for row in sequences.labels != IGNORED]
    keys = list(zip(sequences.groups or [0] * count, sequences.kinds or [0] * count, strict=True))
    being_filled: dict[tuple[Label, Label], list[int]] = {}
    done: list[list[int]] = []
    for row, key in enumerate(keys):
        held = being_filled.setdefault(key, [])
        if held and sum(lengths[other] + 1 for other in held) + lengths[row] > config.max_length:
            done.append(held)
            held = being_filled[key] = []
        held.append(row)
    done += being_filled.values()

    fill = padding(config.tokenizer)
    end = read_tokenizer(config.tokenizer).eos_token_id

    def joined(values: Tensor, between: int) -> list[list[int]]:
        return [
            [token for row in sample for token in (*values[row, : lengths[row]].tolist(), between)][:-1]
            for sample in done
        ]

    return Sequences(
        inputs=_padded(joined(sequences.inputs, fill if end is None else end), fill),
        labels=_padded(joined(sequences.labels, IGNORED), IGNORED),
        groups=tuple(sequences.groups[sample[0]] for sample in done) if sequences.groups else (),
        kinds=tuple(sequences.kinds[sample[0]] for sample in done) if sequences.kinds else (),
        note=sequences.note,
    )
