"""A tiny language model with random weights, a tokenizer of bytes, and instructions to learn."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "Q: {instruction}{input}\nA: "
CHAT = (
    "{% for message in messages %}<bos>{{ message.role }}: {{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def tokenizer(chat=None):
    """Of bytes: one token each, and three special ones before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = chat
    return made


def save_model(directory, architecture="llama", chat=None, width=32):
    """A model and its tokenizer, as ``save_pretrained`` leaves them."""
    own = tokenizer(chat)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if architecture == "llama":
        config = LlamaConfig(
            vocab_size=len(own),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.2,
            **special,
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=len(own), n_embd=32, n_layer=2, n_head=4, n_positions=256, **special)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(directory)
    own.save_pretrained(directory)
    return str(directory)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def instructions(count, start=0):
    """Rows of Alpaca's fields; the answer repeats a letter."""
    rows = []
    for number in range(start, start + count):
        letter = "abcd"[number % 4]
        rows.append(
            {
                "instruction": f"say {letter} {number}",
                "input": "twice" if number % 3 == 0 else "",
                "output": letter * 4,
                "category": letter,
            }
        )
    return rows
