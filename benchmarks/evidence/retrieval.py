"""Embeddings of glosses that find those of their hypernyms, cut to any number of features."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import taildropout as td
from taildropout.lengths import Full

from .report import Numbers, Settings, count_flops, mean_text, table
from .wordnet import synsets

TITLE = "Embeddings of any length: finding hypernyms"
SEEDS = 3
MENU = [8, 16, 32, 64]  # the sizes of the Matryoshka loss
KS = [4, 8, 12, 16, 24, 32, 48, 64]
N = KS[-1]
BATCH, HELD_OUT = 512, 4000
WORDS, EMBEDDING, HIDDEN = 2**14, 128, 256
SCALE = 20.0  # of cosines, to logits
FOUND = 10
RATES = [2e-3, 5e-3]


@dataclass(frozen=True)
class Bags:
    """Texts as bags of words: the numbers of all words in a row, and where each text starts."""

    words: Tensor
    starts: Tensor

    def of(self, texts: Tensor) -> "Bags":
        ends = torch.cat([self.starts[1:], torch.tensor([len(self.words)])])
        counts = (ends - self.starts)[texts]
        new = counts.cumsum(0) - counts
        within = torch.arange(int(counts.sum())) - new.repeat_interleave(counts)
        return Bags(self.words[self.starts[texts].repeat_interleave(counts) + within], new)


@dataclass(frozen=True)
class Pairs:
    """Numbers of glosses, and of the glosses of their hypernyms among all that are one."""

    glosses: Tensor
    hypernyms: Tensor


@dataclass(frozen=True)
class Data:
    glosses: Bags
    hypernyms: Bags
    train: Pairs
    valid: Pairs
    test: Pairs


@lru_cache(maxsize=1)
def glosses() -> Data:
    """All that have a hypernym, split at random; the words are the most frequent ones there."""
    known = synsets()
    below = [synset for synset in known.values() if synset.hypernyms]
    order = torch.randperm(len(below), generator=torch.Generator().manual_seed(0)).tolist()
    below = [below[i] for i in order]
    above = sorted({key for synset in below for key in synset.hypernyms})
    number = {key: i for i, key in enumerate(above)}
    counts = Counter(word for synset in below[2 * HELD_OUT :] for word in _words(synset.gloss))
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS))}

    def bags(texts: list[str]) -> Bags:
        rows = [[vocabulary[word] for word in _words(text) if word in vocabulary] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        return Bags(torch.tensor([w for row in rows for w in row]), lengths.cumsum(0) - lengths)

    def pairs(first: int, last: int) -> Pairs:
        found = [(i, number[key]) for i in range(first, last) for key in below[i].hypernyms]
        return Pairs(*torch.tensor(found).T)

    return Data(
        bags([synset.gloss for synset in below]),
        bags([known[key].gloss for key in above]),
        valid=pairs(0, HELD_OUT),
        test=pairs(HELD_OUT, 2 * HELD_OUT),
        train=pairs(2 * HELD_OUT, len(below)),
    )


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


class Encoder(nn.Module):
    """A bag of words, then an MLP for glosses and one for those of hypernyms."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, EMBEDDING, mode="sum")
        self.query, self.answer = (
            nn.Sequential(
                *(nn.LayerNorm(EMBEDDING), nn.Linear(EMBEDDING, HIDDEN), nn.GELU()),
                nn.Linear(HIDDEN, n),
            )
            for _ in range(2)
        )

    def queries(self, bags: Bags) -> Tensor:
        return self.query(self.words(bags.words, bags.starts))

    def answers(self, bags: Bags) -> Tensor:
        return self.answer(self.words(bags.words, bags.starts))


def contrastive(queries: Tensor, answers: Tensor, which: Tensor) -> Tensor:
    """Each answer among those of the batch; the same answer of another pair is no other."""
    logits = SCALE * queries @ answers.T
    own = torch.eye(len(which), dtype=torch.bool)
    logits = logits.masked_fill((which[:, None] == which) & ~own, -torch.inf)
    return cross_entropy(logits, torch.arange(len(which)))


def matryoshka(queries: Tensor, answers: Tensor, which: Tensor) -> Tensor:
    """The mean over the sizes of the menu, all in each step (Kusupati et al. 2022)."""
    losses = [
        contrastive(normalize(queries[:, :k]), normalize(answers[:, :k]), which) for k in MENU
    ]
    return torch.stack(losses).mean()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss() -> Loss:
    return td.PrefixLoss(contrastive, Full(), normalize=True)


def train(loss: Loss, steps: int, rate: float, seed: int, n: int = N) -> Encoder:
    data = glosses()
    torch.manual_seed(seed)
    model = Encoder(n)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    batches: Iterator[Tensor] = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None or len(batch) < BATCH:
            batches = iter(torch.randperm(len(data.train.glosses)).split(BATCH))
            batch = next(batches)
        optimizer.zero_grad()
        step_loss(model, loss, batch).backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def step_loss(model: Encoder, loss: Loss, batch: Tensor) -> Tensor:
    data = glosses()
    which = data.train.hypernyms[batch]
    queries = model.queries(data.glosses.of(data.train.glosses[batch]))
    return loss(queries, model.answers(data.hypernyms.of(which)), which)


@torch.no_grad()
def recalls(queries: Tensor, answers: Tensor, right: Tensor, ks: list[int]) -> list[float]:
    """How many of 100 queries have the right answer among the first 10, by cosines of k features."""
    found = []
    for k in ks:
        near, far = normalize(queries[:, :k]), normalize(answers[:, :k])
        better = [
            (part @ far.T > (part * far[own]).sum(1, keepdim=True) + 1e-6).sum(1)
            for part, own in zip(near.split(500), right.split(500), strict=True)
        ]
        found.append(100 * float((torch.cat(better) < FOUND).double().mean()))
    return found
