"""A small GPT, which reads bytes."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

STREAM, HEAD, BLOCKS = 64, 8, 2
HEADS, HIDDEN = STREAM // HEAD, 4 * STREAM
CONTEXT, SYMBOLS = 64, 128  # ASCII


class Block(nn.Module):
    """Attention, then an MLP, each added to the stream; the last two numbers are what is narrowed."""

    def __init__(self, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(STREAM), nn.LayerNorm(STREAM)
        self.query, self.key, self.value = (nn.Linear(STREAM, heads * HEAD) for _ in range(3))
        self.out = nn.Linear(heads * HEAD, STREAM)
        self.up, self.down = nn.Linear(STREAM, hidden), nn.Linear(hidden, STREAM)
        for linear in (self.out, self.down):  # so that each block begins as the identity
            nn.init.zeros_(linear.weight)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.norm1(stream))
        return stream + self.down(gelu(self.up(self.norm2(stream))))

    def attention(self, input: Tensor) -> Tensor:
        query, key, value = (
            linear(input).unflatten(-1, (-1, HEAD)).transpose(1, 2)  # (B, heads, T, HEAD)
            for linear in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(HEAD)
        length = input.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
        heads = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return self.out(heads.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """From the bytes of a text, (B, T), to logits of the byte that follows each, (B, T, SYMBOLS)."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, STREAM)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, STREAM))
        heads, hidden = round(width * HEADS), round(width * HIDDEN)
        self.blocks = nn.Sequential(*(Block(heads, hidden) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(STREAM), nn.Linear(STREAM, SYMBOLS)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        stream = self.embedding(text) + self.positions[: text.shape[1]]
        return self.head(self.norm(self.blocks(stream)))
