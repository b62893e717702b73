"""The small language model of `examples/llm-tiny`: its files are whole, really pretrained, and follow from the seed."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner

PLACE = Path(__file__).parent.parent / "examples" / "llm-tiny"
FIELDS = ["instruction", "input", "output", "category"]


@pytest.fixture(scope="module", autouse=True)
def quiet_and_offline():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    logging.set_verbosity(before[0])
    if before[1]:
        logging.enable_progress_bar()
    torch.set_num_threads(before[2])


@pytest.fixture(scope="module")
def make():
    """The module ``make.py``, which imports its neighbour ``texts``."""
    spec = importlib.util.spec_from_file_location("make_llm_tiny", PLACE / "make.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLACE))
        spec.loader.exec_module(module)
    yield module
    sys.modules.pop("texts", None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PLACE / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(PLACE / "model", dtype=torch.float32).eval()


def read(name):
    return [json.loads(line) for line in (PLACE / "instructions" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in PLACE.rglob("*") if "__pycache__" not in path.parts) < 3_000_000
    assert (PLACE / "model" / "model.safetensors").stat().st_size < 2_000_000


def test_the_model_and_its_tokenizer_fit(model, tokenizer):
    assert 500_000 < model.num_parameters() < 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    for settings_of in (model.config, model.generation_config):
        assert settings_of.bos_token_id == tokenizer.bos_token_id
        assert settings_of.eos_token_id == tokenizer.eos_token_id
        assert settings_of.pad_token_id == tokenizer.pad_token_id
    assert model.config.max_position_embeddings == tokenizer.model_max_length


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text())
def test_the_tokenizer_keeps_any_text(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " two  spaces\r\n\ttab ", "naïve 日本語 \U0001f642 \x00", "it 's 3,141 , isn't it ?"]
)
def test_the_tokenizer_keeps_this_text(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("12 and 345") == ["1", "2", "Ġand", "Ġ", "3", "4", "5"]


def test_a_chat_marks_its_answers_and_their_ends(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Add 2 and 2."},
        {"role": "assistant", "content": "4"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<s>System:\nBe brief.\nUser:\nAdd 1 and 2.\nAssistant:\n3</s>\nUser:\nAdd 2 and 2.\nAssistant:\n4</s>"
    )
    both = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answers = [token for token, answer in zip(both["input_ids"], both["assistant_masks"], strict=True) if answer]
    assert tokenizer.convert_ids_to_tokens(answers) == ["3", "</s>", "4", "</s>"]


def test_the_tokens_of_a_prompt_and_of_its_answer_are_those_of_both(make, tokenizer):
    for row in read("test"):
        messages = make.chat(row)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer.encode(row["output"], add_special_tokens=False)
        both = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert [*prompt, *answer, tokenizer.eos_token_id] == both


def test_the_instructions_follow_from_the_seed(make, tmp_path):
    make.write_instructions(tmp_path, seed=0, train_each=400, test_each=40)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (PLACE / "instructions" / name).read_bytes(), name


def test_another_seed_gives_other_instructions(make):
    assert make.instructions(1, 20, 4) != make.instructions(0, 20, 4)


def test_every_category_has_as_many_instructions():
    for name, each in (("train", 400), ("test", 40)):
        rows = read(name)
        assert all(list(row) == FIELDS for row in rows)
        assert all(row["instruction"] and row["output"] for row in rows)
        assert set(Counter(row["category"] for row in rows).values()) == {each}
        assert len({row["category"] for row in rows}) == 8
        assert max(len(row["output"].split()) for row in rows) <= 3


def test_no_instruction_is_there_twice():
    rows = [(row["instruction"], row["input"]) for name in ("train", "test") for row in read(name)]
    assert len(set(rows)) == len(rows) == 3520


@pytest.mark.parametrize(("category", "table"), [("animals", "ANIMALS"), ("places", "TOWNS")])
def test_no_fact_is_asked_for_in_training_and_in_the_test(category, table, make):
    """What a training row asks about a town in one way, no test row asks in another: the values tell the properties."""
    names = {one.name for one in getattr(sys.modules["texts"], table)}

    def facts(rows):
        asked = [row for row in rows if row["category"] == category]
        words = [set(re.findall(r"\w+", f"{row['instruction']} {row['input']}")) & names for row in asked]
        assert all(len(found) == 1 for found in words)
        return {(*found, row["output"]) for found, row in zip(words, asked, strict=True)}

    train, test = facts(read("train")), facts(read("test"))
    assert len(train) > 100
    assert len(test) > 10
    assert not train & test


def test_what_cannot_be_asked_so_often_is_refused(make):
    with pytest.raises(ValueError, match=r"^animals: \d+ questions to train and 0 to test could not be found$"):
        make.instructions(0, 1000, 1)


def test_the_model_has_read_plain_text_but_no_instructions(make, model, tokenizer):
    plain = make.plain_perplexity(model, tokenizer, "for the test", count=1)
    answers = make.perplexity(model, make.answers(tokenizer, read("test")))
    assert plain < 3.0
    assert answers > 50


@pytest.mark.slow
def test_make_writes_everything(make, tmp_path):
    arguments = ["--steps", "2", "--batch-size", "2", "--vocab-size", "400", "--train-each", "12", "--test-each", "3"]
    app = make.typer.Typer()
    app.command()(make.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path), *arguments])
    assert result.exit_code == 0, result.output
    assert "400 tokens" in result.output
    assert "perplexity on the answers" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    row = json.loads((tmp_path / "instructions" / "train.jsonl").read_text("utf-8").splitlines()[0])
    batch = tokenizer.apply_chat_template(make.chat(row), return_tensors="pt", return_dict=True)
    assert model(**batch).logits.shape == (*batch["input_ids"].shape, 400)
