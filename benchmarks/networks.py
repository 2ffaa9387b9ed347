"""Networks at usual sizes that `pruning.py` cuts and that the transformers library doesn't have."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tagger(nn.Module):
    """Words to tags through an LSTM in both directions."""

    def __init__(self, words: int = 20_000, features: int = 300, hidden: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, features)
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout()
        self.tags = nn.Linear(2 * hidden, 17)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(input_ids))
        return self.tags(self.dropout(hidden))


def pair(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, as at each level of a U-Net."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Five levels; what each level sees goes down to the next, and across to the way up."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        *across, _ = widths
        self.down = nn.ModuleList(map(pair, (3, *across), widths))
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(across)
        )
        self.up = nn.ModuleList(pair(2 * width, width) for width in reversed(across))
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        *across, x = self.descend(pixel_values)
        for enlarge, level, seen in zip(self.enlarge, self.up, reversed(across), strict=True):
            x = level(torch.cat([seen, enlarge(x)], dim=1))
        return self.last(x)

    def descend(self, x: Tensor) -> list[Tensor]:
        levels = [self.down[0](x)]
        for level in self.down[1:]:
            levels.append(level(F.max_pool2d(levels[-1], 2)))
        return levels


def convolutional_autoencoder() -> nn.Module:
    widths = [3, 64, 128, 256, 64]
    down = [
        [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        for a, b in pairwise(widths)
    ]
    up = [
        [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        for a, b in pairwise(reversed(widths))
    ]
    layers = [layer for step in (*down, *up) for layer in step]
    return nn.Sequential(*layers[:-2], nn.Sigmoid())  # the last step gives pixels


class Recommender(nn.Module):
    """A DLRM: embedded categories, an MLP for numbers, their products, an MLP for all of it.

    Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
    Systems", 2019, with the MLPs of its benchmark on the Criteo data.
    """

    def __init__(self, rows: tuple[int, ...] = (10_000,) * 26, features: int = 64) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, features) for count in rows)
        self.bottom = mlp(13, 512, 256, features)
        vectors = len(rows) + 1
        self.top = mlp(features + vectors * (vectors - 1) // 2, 512, 256, 1)
        pairs = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("left", pairs[0], persistent=False)
        self.register_buffer("right", pairs[1], persistent=False)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        vectors = torch.stack([self.bottom(numbers), *embedded], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.left, self.right]
        return self.top(torch.cat([vectors[:, 0], products], dim=1))


def mlp(*widths: int) -> nn.Sequential:
    steps = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*steps[:-1])


class Attention(nn.Module):
    """Self-attention with a dropout over its context: (batch, heads, time, channels)."""

    def __init__(self, features: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.channels = features // heads
        self.query, self.key, self.value = (nn.Linear(features, features) for _ in range(3))
        self.dropout = nn.Dropout()
        self.output = nn.Linear(features, features)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.channels)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        context = self.dropout(F.scaled_dot_product_attention(q, k, v))
        return self.output(context.transpose(1, 2).flatten(2))


def attentions(layers: int = 12) -> nn.Module:
    return nn.Sequential(*(Attention() for _ in range(layers)))
