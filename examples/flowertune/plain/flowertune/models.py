"""The language model and its tokenizer."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


class ByteTokenizer:
    """Every byte of a text is a token; three more mark its begin, its end and the padding."""

    bos, eos, pad = 256, 257, 258
    size = 259

    def encode(self, text):
        """Turn a text into numbers."""
        return list(text.encode())


def get_model():
    """Build the model; a real project loads it by ``from_pretrained``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=ByteTokenizer.bos,
        eos_token_id=ByteTokenizer.eos,
        pad_token_id=ByteTokenizer.pad,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)
