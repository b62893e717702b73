"""Instructions, and the loops over them."""

import torch
from torch.utils.data import DataLoader

from flowertune.models import ByteTokenizer

PROMPT = "### Instruction:\n{}\n### Response:\n"
WORDS = ["apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house", "index", "juice", "knife", "lemon"]
VERBS = {"Repeat": str, "Shout": str.upper, "Reverse": lambda word: word[::-1], "Double": lambda word: word * 2}
IGNORED = -100


def instructions():
    """Make all instructions, each with its response."""
    return [(f"{verb} the word {word}.", act(word)) for word in WORDS for verb, act in VERBS.items()]


def encode(instruction, response):
    """Turn an instruction into token ids and labels; only the response is to be learned."""
    tokenizer = ByteTokenizer()
    prompt = [tokenizer.bos, *tokenizer.encode(PROMPT.format(instruction))]
    answer = [*tokenizer.encode(response), tokenizer.eos]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def collate(samples):
    """Pad samples to one length."""
    longest = max(len(ids) for ids, _ in samples)
    ids = [ids + [ByteTokenizer.pad] * (longest - len(ids)) for ids, _ in samples]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in samples]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in samples]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def load_data(partition_id, num_partitions, batch_size):
    """Load one client's instructions."""
    mine = [encode(*pair) for pair in instructions()[partition_id::num_partitions]]
    return DataLoader(mine, batch_size, shuffle=True, collate_fn=collate)


def train(model, loader, epochs, lr, device):
    """Tune a model and return its mean loss."""
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    total, steps = 0.0, 0
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
    return total / steps


def test(model, loader, device):
    """Return a model's mean loss over batches."""
    model.to(device).eval()
    with torch.no_grad():
        losses = [model(**{name: value.to(device) for name, value in batch.items()}).loss.item() for batch in loader]
    return sum(losses) / len(losses)
