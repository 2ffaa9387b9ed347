"""Whole networks, small: a tagger, attention, recommenders."""

import torch
from helpers.zoo.case import Case, Shapes, columns, floats, image, module, tokens, words
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.tail = TailDropout()
        self.tags = nn.Linear(16, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embedding(words))
        return self.tags(self.tail(hidden))


class Attention(nn.Module):
    """Multi-head attention whose heads are the features of the layer."""

    def __init__(self, heads: int = 4, size: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(6, heads * size) for _ in range(3))
        self.tail = TailDropout(batch_dim=0, dropout_dim=1)
        self.out = nn.Linear(heads * size, 6)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, time, size), however many heads there are."""
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
        context = self.tail(self.attend(q, k, v))
        return self.out(context.transpose(1, 2).flatten(2))


class WrittenOutAttention(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) / self.size**0.5
        return torch.softmax(scores, dim=-1) @ v


class CountedAttention(Attention):
    """The number of heads is an attribute, and a head's size follows from it."""

    def split(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, features = x.shape
        return x.view(batch, time, self.heads, features // self.heads).transpose(1, 2)


def attention_shapes(heads: int) -> Shapes:
    projections = [module(name, 3 * heads, 6) for name in "qkv"]
    return projections[0] | projections[1] | projections[2] | columns("out", 6, 3 * heads)


class Recommender(nn.Module):
    """DLRM: embeddings of categories, an MLP for numbers, their products, an MLP for all."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(rows, 4) for rows in (11, 7, 5))
        self.bottom = nn.Sequential(
            nn.Linear(6, 10), nn.ReLU(), TailDropout(), nn.Linear(10, 4), nn.ReLU()
        )
        self.top = nn.Sequential(
            nn.Linear(4 + 6, 12), nn.ReLU(), TailDropout(), nn.Linear(12, 1), nn.Sigmoid()
        )
        above = torch.triu_indices(4, 4, offset=1)
        self.register_buffer("rows", above[0], persistent=False)
        self.register_buffer("columns", above[1], persistent=False)

    def vectors(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        embedded = [table(categories[:, i]) for i, table in enumerate(self.embeddings)]
        return torch.stack([self.bottom(numbers), *embedded], dim=1)

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(numbers, categories)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.rows, self.columns]
        return self.top(torch.cat([vectors[:, 0], products], dim=1))


class RecommenderByConcatenation(nn.Module):
    """The numbers' features stand between the embeddings; they and the embeddings have a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(11, 4), nn.Embedding(7, 4)
        self.ordered = TailDropout()
        self.bottom = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), TailDropout())
        self.top = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        user = self.ordered(self.user(categories[:, 0]))
        return self.top(torch.cat([user, self.bottom(numbers), self.item(categories[:, 1])], 1))


def numbers_and_categories(samples: int) -> tuple[torch.Tensor, ...]:
    return floats(samples, 6), tokens(samples, 3, vocabulary=5)


CASES = {
    "LSTM tagger": Case(Tagger, words, (16,), lambda k: columns("tags", 5, k), stays=("lstm",)),
    "attention": Case(Attention, image(5, 6), (4,), attention_shapes, zero=False),
    "attention, written out": Case(
        WrittenOutAttention, image(5, 6), (4,), attention_shapes, zero=False
    ),
    "attention, heads counted": Case(
        CountedAttention, image(5, 6), (4,), attention_shapes, zero=False
    ),
    "DLRM": Case(
        Recommender,
        numbers_and_categories,
        (10, 12),
        lambda a, b: (
            module("bottom.0", a, 6)
            | columns("bottom.3", 4, a)
            | module("top.0", b, 10)
            | columns("top.3", 1, b)
        ),
    ),
    "recommender by concatenation": Case(
        RecommenderByConcatenation,
        numbers_and_categories,
        (4, 5),
        lambda a, b: (
            {"user.weight": (11, a)} | module("bottom.0", b, 6) | columns("top.0", 8, a + b + 4)
        ),
        zero=False,
    ),
}
