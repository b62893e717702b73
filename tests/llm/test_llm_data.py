"""Rows of text as token numbers: what is asked, what is to be learnt, and how rows are shared."""

import json

import numpy as np
import pytest
from small_language import CHAT, TEMPLATE, instructions, save_model, tokenizer, write_rows

from fedloru_flwr.data import IGNORED, DataConfig, DataError, load_central, load_client, load_own, notes, validate
from fedloru_flwr.data.loading import partition_indices
from fedloru_flwr.models.pretrained import read_tokenizer

ROW = {"instruction": "add", "input": "", "output": "ok"}


def config(model, path, **more):
    settings = {"text": "causal-lm", "tokenizer": model, "max_length": 64, "prompt_template": TEMPLATE, **more}
    return DataConfig(dataset="local", data_path=str(path), num_clients=settings.pop("num_clients", 2), **settings)


def rows_of(path, rows, test=None):
    write_rows(path / "train.jsonl", rows)
    write_rows(path / "test.jsonl", test or rows[:1])
    return path


def read(model, path, **more):
    """The first held-out sample as text: all of it, and what is to be learnt."""
    samples, _ = load_central(config(model, path, **more))
    own = tokenizer()
    inputs, labels = samples.inputs[0].tolist(), samples.labels[0].tolist()
    learnt = [label for label in labels if label != IGNORED]
    for position, label in enumerate(labels[:-1]):
        assert label in (IGNORED, inputs[position + 1]) or label == own.eos_token_id  # what follows is what is learnt
    return own.decode(inputs), own.decode(learnt)


def test_the_answer_alone_is_learnt_and_labels_are_what_follows(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [{"instruction": "add", "input": " 1", "output": "ok"}] * 4)
    samples, spec = load_central(config(llama, path))
    own = tokenizer()
    prompt, answer = own("Q: add 1\nA: ")["input_ids"], own("ok")["input_ids"]
    assert samples.inputs[0].tolist() == [*prompt, *answer]
    assert samples.labels[0].tolist() == [IGNORED] * (len(prompt) - 1) + [*answer, own.eos_token_id]
    assert samples.inputs.dtype == samples.labels.dtype
    assert spec.input_shape == (64,)


def test_shorter_rows_are_filled_up_at_their_ends(llama, tmp_path):
    path = rows_of(tmp_path / "rows", instructions(4), [ROW, {**ROW, "output": "ok then"}])
    samples, _ = load_central(config(llama, path))
    own = tokenizer()
    assert samples.inputs[0, -5:].tolist() == [own.pad_token_id] * 5
    assert samples.labels[0, -5:].tolist() == [IGNORED] * 5


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        (ROW, "### Instruction:\nadd\n\n### Response:\nok", "ok<eos>"),
        ({**ROW, "input": "1"}, "### Instruction:\nadd\n\n### Input:\n1\n\n### Response:\nok", "ok<eos>"),
        ({"prompt": "two ", "completion": "three"}, "two three", "three<eos>"),
        ({"text": "abc"}, "abc", "bc<eos>"),
        ({**ROW, "instruction": "{input}"}, "### Instruction:\n{input}\n\n### Response:\nok", "ok<eos>"),
    ],
    ids=["alpaca", "alpaca with an input", "prompt and completion", "text", "braces"],
)  # fmt: skip
def test_the_known_forms_of_rows(llama, tmp_path, row, whole, learnt):
    path = rows_of(tmp_path / "rows", [row] * 4)
    assert read(llama, path, prompt_template="auto") == (whole, learnt)


def test_messages_go_through_the_chat_template_and_every_answer_is_learnt(chatty, tmp_path):
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "B"},
    ]
    path = rows_of(tmp_path / "rows", [{"messages": messages}] * 4)
    whole = "<bos>user: a?<eos>\n<bos>assistant: A<eos>\n<bos>user: b?<eos>\n<bos>assistant: B"
    assert read(chatty, path, prompt_template="auto", max_length=128) == (whole, "A<eos>B<eos>")


def test_instructions_go_through_the_chat_template_where_there_is_one(chatty, tmp_path):
    path = rows_of(tmp_path / "rows", [{**ROW, "input": "1"}] * 4)
    whole, learnt = read(chatty, path, prompt_template="auto")
    assert whole == "<bos>user: add\n\n1<eos>\n<bos>assistant: ok"
    assert learnt == "ok<eos>"
    assert read(chatty, path, prompt_template="alpaca")[0].startswith("### Instruction")


def with_template(directory, chat, **special):
    """A model whose tokenizer has another chat template, or other special tokens."""
    save_model(directory)
    own = tokenizer(chat)
    for name, token in special.items():
        setattr(own, name, token)
    own.save_pretrained(directory)
    read_tokenizer.cache_clear()
    return str(directory)


TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"}]


def test_a_prompt_that_goes_on_where_no_answer_does_is_cut(tmp_path):
    thinking = CHAT.replace("assistant: {% endif %}", "assistant: <think>{% endif %}")
    model = with_template(tmp_path / "model", thinking)
    path = rows_of(tmp_path / "rows", [{"messages": TALK}] * 4)
    whole, learnt = read(model, path, prompt_template="auto", max_length=128)
    assert whole == "<bos>user: a?<eos>\n<bos>assistant: A"
    assert learnt == "<bos>assistant: A<eos>"


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path):
    today = "{% set date_string = strftime_now('%d %b %Y %f') %}"
    dated = "{% if not date_string is defined %}" + today + "{% endif %}{{ date_string }} " + CHAT
    model = with_template(tmp_path / "model", dated)
    path = rows_of(tmp_path / "rows", [{"messages": TALK}] * 4)
    whole, learnt = read(model, path, prompt_template="auto", max_length=128)
    assert whole.startswith("26 Jul 2024 <bos>user: a?")
    assert learnt == "A<eos>"


def test_conversations_in_which_the_assistant_is_silent_are_left_out_and_told(chatty, tmp_path):
    path = rows_of(tmp_path / "rows", [{"messages": TALK}] * 4 + [{"messages": TALK[:1]}], [{"messages": TALK}])
    given = config(chatty, path, prompt_template="auto")
    assert sum(len(part) for part in partition_indices(given)) == 4
    (note,) = notes(given)
    assert "1 of 5 rows" in note
    assert "the assistant says nothing" in note
    assert "max-length" not in note


def test_an_end_within_a_text_does_not_end_what_is_learnt(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [{"text": "ab<eos>cd"}] * 4)
    assert read(llama, path) == ("ab<eos>cd", "b<eos>cd<eos>")


def test_a_template_of_ones_own_has_a_place_for_the_input(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [{**ROW, "input": "1"}] * 4)
    with pytest.raises(DataError, match=r"row 0 .*prompt-template has no \{input\}"):
        load_central(config(llama, path, prompt_template="Q: {instruction}\nA: "))


def test_messages_without_a_chat_template_are_refused(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [{"messages": [{"role": "user", "content": "a"}]}] * 4)
    with pytest.raises(DataError, match="has no chat template"):
        load_central(config(llama, path))


def test_rows_of_no_known_form_are_refused(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [{"question": "a", "reply": "b"}] * 4)
    with pytest.raises(DataError, match="Give rows with instruction and output"):
        load_central(config(llama, path))


def test_a_row_without_an_answer_is_named(llama, tmp_path):
    path = rows_of(tmp_path / "rows", [ROW, {"instruction": "a", "input": "", "output": None}] * 2)
    with pytest.raises(DataError, match=r"row 1 .*output is None"):
        load_central(config(llama, path))


def test_rows_whose_answer_is_cut_away_are_left_out_and_told(llama, tmp_path):
    long = {"instruction": "x" * 100, "input": "", "output": "never"}
    cut = {**ROW, "output": "y" * 100}
    path = rows_of(tmp_path / "rows", [ROW, long, cut, ROW, ROW], [ROW])
    given = config(llama, path)
    assert sum(len(part) for part in partition_indices(given)) == 4
    (note,) = notes(given)
    assert note.startswith("1 of 5 rows of the train split")
    assert "max-length = 64" in note
    with pytest.raises(DataError, match=r"max-length = 4: no row"):
        load_central(config(llama, path, max_length=4))


def test_packed_samples_hold_whole_rows_of_one_group(llama, tmp_path):
    rows = [{**ROW, "output": letter * 3, "category": letter} for letter in "ababababab"]
    given = config(llama, rows_of(tmp_path / "rows", rows, [ROW]), packing=True, partitioner="column:category")
    own = tokenizer()
    count = 0
    for client, letter in enumerate("ab"):
        data, _ = load_client(given, client)
        for part in (data.train, data.held_out):
            for inputs, labels in zip(part.inputs, part.labels, strict=True):
                whole, learnt = own.decode(inputs), own.decode(labels[labels != IGNORED])
                assert set(learnt.replace("<eos>", "")) == {letter}
                rows = "<eos>".join([f"Q: add\nA: {letter * 3}"] * learnt.count("<eos>"))
                assert whole.removesuffix("<pad>" * whole.count("<pad>")) == rows
                count += learnt.count("<eos>")
    assert count == 10
    longest = load_client(given, 0)[0].train
    assert longest.inputs.shape[1] <= 64


def test_without_a_test_split_held_out_rows_are_not_packed(llama, tmp_path):
    path = write_rows(tmp_path / "all.jsonl", [ROW] * 20)
    given = config(llama, path, packing=True, test_fraction=0.2)
    samples, _ = load_central(given)
    assert len(samples) == 4
    assert samples.inputs.shape[1] == len("Q: add\nA: ok")


def test_rows_go_to_clients_by_a_column(llama, folder):
    given = config(llama, folder, num_clients=4, partitioner="column:category")
    own = tokenizer()
    for client, letter in enumerate("abcd"):
        data, _ = load_client(given, client)
        said = {own.decode(labels[labels != IGNORED], skip_special_tokens=True) for labels in data.train.labels}
        assert said == {letter * 4}


def test_dirichlet_needs_a_column_of_kinds(llama, folder):
    given = {"num_clients": 3, "partitioner": "dirichlet", "dirichlet_alpha": 0.1}
    with pytest.raises(DataError, match=r"partitioner = 'dirichlet': it deals out classes.*label-column"):
        validate(config(llama, folder, **given))
    parts = partition_indices(config(llama, folder, label_column="category", **given))
    assert sorted(np.concatenate(parts).tolist()) == list(range(48))


def test_a_clients_own_rows(llama, tmp_path):
    path = write_rows(tmp_path / "own.jsonl", [ROW] * 5)
    data, spec = load_own(path, config(llama, ""))
    assert (len(data.train), len(data.held_out)) == (4, 1)
    assert spec.input_shape == (64,)


def test_a_json_list_and_parquet_are_read_alike(llama, tmp_path):
    from datasets import Dataset

    rows = instructions(8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    read = [load_central(config(llama, tmp_path / f"rows.{kind}"))[0] for kind in ("json", "parquet")]
    assert read[0].inputs.equal(read[1].inputs)
    assert read[0].labels.equal(read[1].labels)
