"""Training and evaluating a language model on one client."""

import math

import pytest
import torch
from small_language import TEMPLATE, save_model, tokenizer, write_rows
from transformers import RobertaConfig, RobertaModel

from fedloru_flwr.clients.language import LanguageWork, question
from fedloru_flwr.clients.training import LocalOptimisation
from fedloru_flwr.data import DataConfig, Samples, load_central
from fedloru_flwr.models.generation import greedy
from fedloru_flwr.models.pretrained import PretrainedFactory, head, linear_layers

CPU = torch.device("cpu")
HOW = LocalOptimisation(2, 4, "sgd", 0.5, 0.9, 0.0, 0.0)


@pytest.fixture(scope="module")
def samples(llama, tmp_path_factory):
    """Ten rows whose answers differ in length."""
    rows = [{"instruction": "go", "input": "", "output": "ab" * (1 + number)} for number in range(10)]
    path = tmp_path_factory.mktemp("rows")
    for split in ("train", "test"):
        write_rows(path / f"{split}.jsonl", rows)
    settings = {"text": "causal-lm", "tokenizer": llama, "max_length": 64, "prompt_template": TEMPLATE}
    return load_central(DataConfig(dataset="local", data_path=str(path), **settings))[0]


def trained(llama, samples, work, how):
    model = PretrainedFactory(llama)()
    loss = work.train(model, samples, how, torch.Generator().manual_seed(0), CPU)
    return loss, model.state_dict()


def as_batch_of(how, size):
    return LocalOptimisation(how.epochs, size, how.optimizer, how.learning_rate, how.momentum, 0.0, 0.0)


def test_accumulated_batches_make_the_step_of_one_large_batch(llama, samples):
    whole = trained(llama, samples, LanguageWork("causal-lm", llama), as_batch_of(HOW, 6))
    parts = trained(llama, samples, LanguageWork("causal-lm", llama, accumulate_steps=3), as_batch_of(HOW, 2))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[1][name], value, atol=1e-5, rtol=1e-4)
    small = trained(llama, samples, LanguageWork("causal-lm", llama), as_batch_of(HOW, 2))
    assert any((small[1][name] - value).abs().max() > 1e-3 for name, value in whole[1].items())


def test_checkpointed_gradients_are_the_same_and_it_ends_with_training(llama, samples):
    plain = trained(llama, samples, LanguageWork("causal-lm", llama), HOW)
    work = LanguageWork("causal-lm", llama, gradient_checkpointing=True)
    model = PretrainedFactory(llama)()
    seen = []
    layer = model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: seen.append(1))
    work.train(model, samples, HOW, torch.Generator().manual_seed(0), CPU)
    steps = 2 * math.ceil(10 / 4)
    assert len(seen) == 2 * steps  # every activation is computed twice
    for name, value in plain[1].items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_over_answers_whatever_the_batches(llama, samples):
    model = PretrainedFactory(llama)().eval()
    with torch.no_grad():
        predicted = model(samples.inputs).logits.log_softmax(-1)
    found = [
        (predicted[row, at, label], predicted[row, at].argmax() == label)
        for row, labels in enumerate(samples.labels.tolist())
        for at, label in enumerate(labels)
        if label != -100
    ]
    assert len(found) == sum(2 * (1 + number) + 1 for number in range(10))
    loss = -float(sum(value for value, _ in found)) / len(found)
    for batch_size in (3, 10):
        measured = LanguageWork("causal-lm", llama, batch_size=batch_size).evaluate(model, samples, CPU)
        assert measured["loss"] == pytest.approx(loss, rel=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert measured["accuracy"] == pytest.approx(sum(bool(hit) for _, hit in found) / len(found))


def test_greedy_generation_is_transformers_own(llama, gpt2):
    prompt = tokenizer()("Q: go\nA: ")["input_ids"]
    for name in (llama, gpt2):
        model = PretrainedFactory(name)().eval()
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12
        )
        expected = theirs[0, len(prompt) :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert greedy(model, prompt, 12, 2) == expected


def test_exact_match_is_the_share_of_answers_given_to_the_letter(llama, samples):
    model = PretrainedFactory(llama)().eval()
    prompt, answer = question(samples, 3)
    assert tokenizer().decode(prompt) == "Q: go\nA: "
    assert tokenizer().decode(answer) == "abababab<eos>"
    said = greedy(model, prompt, 5, None)
    inputs = torch.tensor([prompt + said[:-1], samples.inputs[0, : len(prompt) + 4].tolist()])
    labels = torch.full_like(inputs, -100)
    labels[0, len(prompt) - 1 :] = torch.tensor(said)
    labels[1, len(prompt) - 1 : len(prompt) + 1] = torch.tensor([said[0] ^ 1, 2])
    work = LanguageWork("causal-lm", llama, exact_match_samples=2)
    assert work.evaluate(model, Samples(inputs, labels), CPU)["exact_match"] == 0.5
    only_first = LanguageWork("causal-lm", llama, exact_match_samples=1)
    assert only_first.evaluate(model, Samples(inputs, labels), CPU)["exact_match"] == 1.0
    assert LanguageWork("causal-lm", llama).measures == tuple(
        LanguageWork("causal-lm", llama).evaluate(model, samples, CPU)
    )


def test_equal_factories_build_equal_models_with_the_plain_keys(llama):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    built = PretrainedFactory(llama)().state_dict()
    assert list(built) == list(plain)
    assert all(torch.equal(built[name], plain[name]) for name in plain)
    first, second, other = (PretrainedFactory(llama, "classification", 3, seed=seed)() for seed in (1, 1, 2))
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert torch.equal(first.model.embed_tokens.weight, plain["model.embed_tokens.weight"])
    assert PretrainedFactory(llama, precision="bfloat16")().lm_head.weight.dtype == torch.bfloat16


def test_a_head_of_several_layers_is_trained_whole(tmp_path):
    config = RobertaConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    )
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    factory = PretrainedFactory(str(tmp_path), "classification", 3)
    found = linear_layers(factory)
    assert found[:3] == ("query", "key", "value")
    assert set(found[3:]) == {
        "roberta.encoder.layer.0.attention.output.dense",
        "roberta.encoder.layer.0.intermediate.dense",
        "roberta.encoder.layer.0.output.dense",
    }
    assert set(head(factory)) == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }


def test_a_classifier_finds_the_end_of_a_sample_by_what_the_tokenizer_fills_up_with(tmp_path):
    directory = save_model(tmp_path)
    own = tokenizer()
    own.pad_token = (
        None  # so that samples are filled up with the end of a text, whatever the model's configuration says
    )
    own.save_pretrained(directory)
    model = PretrainedFactory(directory, "classification", 2)().eval()
    row = torch.tensor([[5, 6, 7]])
    longer = torch.cat([row, torch.full((1, 4), own.eos_token_id)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=row).logits
        filled = model(input_ids=longer, attention_mask=(longer != own.eos_token_id).long()).logits
    torch.testing.assert_close(alone, filled, rtol=1e-4, atol=1e-5)
