"""The networks of the benchmark: the package's own, and a tiny causal language model on bytes. Only torch is needed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.models.networks import NetworkFactory, seeded_initialisation

VOCABULARY = 256  # bytes


class Block(nn.Module):
    """A transformer block: causal attention and a feed-forward layer, each behind a layer normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same."""
        batch, length, width = x.shape
        y = self.norm1(x)
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (part(y).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, length, size)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ByteLanguageModel(nn.Module):
    """A small causal language model: bytes in, logits of the next byte out."""

    def __init__(self, length: int = 64, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length)`` to logits ``(batch, length, 256)``."""
        y = self.tokens(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))  # type: ignore[no-any-return]  # nn.Module is untyped


@dataclass(frozen=True)
class LanguageModelFactory:
    """Builds the language model; equal factories build equal weights.

    Attributes:
        length: bytes a sequence, at most.
        width: of the residual stream.
        layers: transformer blocks.
        seed: of the initial weights.
    """

    length: int = 64
    width: int = 128
    layers: int = 2
    seed: int = 0

    def __call__(self) -> nn.Module:
        """Build it."""
        model = ByteLanguageModel(self.length, self.width, self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            model.tokens.weight.copy_(0.02 * torch.randn(model.tokens.weight.shape, generator=generator))
        return seeded_initialisation(model, self.seed)


Factory = NetworkFactory | LanguageModelFactory


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy: of classes ``(batch, classes)``, or of next bytes ``(batch, length, 256)``."""
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
