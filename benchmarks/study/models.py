"""The study's models of more than a few layers in a row, and the loss of those that classify."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 32
"""Characters that a language model sees."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all predictions, in nats."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class CharacterGRU(nn.Module):
    """Logits of the next character at every position."""

    def __init__(self, n_characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, n_characters)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(inputs))[0])


class Block(nn.Module):
    """Causal attention and a feed-forward part, each behind a LayerNorm and around a residual."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterTransformer(nn.Module):
    """Logits of the next character at every position."""

    def __init__(self, n_characters: int, width: int = 32, n_blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads=4) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_characters)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(inputs) + self.position)))


class VAE(nn.Module):
    """A variational autoencoder of the digits; the output is the negative evidence bound of each, in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
        self.decode = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, inputs: Tensor) -> Tensor:
        mean, log_variance = self.encode(inputs[:, :64]).chunk(2, -1)
        decoded = self.decode(mean + (0.5 * log_variance).exp() * inputs[:, 64:])
        kept = F.binary_cross_entropy_with_logits(decoded, inputs[:, :64], reduction="none").sum(-1)
        return kept + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
