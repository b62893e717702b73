"""Greedy generation of a causal language model: no sampling, so that the same weights say the same."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], max_new_tokens: int, end: int | None) -> list[int]:
    """The most likely next token, again and again.

    Args:
        model: of the transformers library, with or without adapters; in eval mode.
        prompt: token numbers, at least one.
        max_new_tokens: how many at most.
        end: the token that ends a text, which is not returned; None for none.

    Returns:
        What follows the prompt.
    """
    anything: Any = model
    device = next(model.parameters()).device
    limit = getattr(anything.config, "max_position_embeddings", None) or len(prompt) + max_new_tokens
    tokens = torch.tensor([prompt], device=device)
    found: list[int] = []
    past = None
    while len(found) < max_new_tokens and len(prompt) + len(found) <= limit:
        outputs = anything(input_ids=tokens, past_key_values=past, use_cache=True)
        token = int(outputs.logits[0, -1].argmax())
        if token == end:
            break
        found.append(token)
        past = outputs.past_key_values
        tokens = torch.tensor([[token]], device=device)
    return found
