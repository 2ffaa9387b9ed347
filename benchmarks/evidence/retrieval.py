"""Embeddings of glosses that find those of their hypernyms, cut to any number of features."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import taildropout as td
from taildropout.lengths import Full, LogUniform, probability_above

from .report import Numbers, Settings, count_flops, listed, mean_text, table, wrapped
from .wordnet import synsets

TITLE = "Embeddings of any length: finding hypernyms"
SEEDS = 3
MENU = [8, 16, 32, 64]  # the sizes of the Matryoshka loss, and of networks for one k
KS = [4, 8, 12, 16, 24, 32, 48, 64]
N = KS[-1]
BATCH, HELD_OUT = 512, 2000
WORDS, EMBEDDING, HIDDEN = 2**14, 128, 256
SCALE = 20.0  # of cosines, to logits
FOUND = 10
RATES = [3e-3, 1e-2]


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

    def first(self, count: int | None) -> "Pairs":
        return Pairs(self.glosses[:count], self.hypernyms[:count])


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
        nn.init.normal_(self.words.weight, std=0.02)
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


def contrastive(queries: Tensor, answers: Tensor, alike: Tensor) -> Tensor:
    """Each answer among those of the batch but those that are `alike`: the same of another pair."""
    logits = (SCALE * queries @ answers.T).masked_fill(alike, -torch.inf)
    return cross_entropy(logits, torch.arange(len(logits)))


def matryoshka(queries: Tensor, answers: Tensor, alike: Tensor) -> Tensor:
    """The mean over the sizes of the menu, all in each step (Kusupati et al. 2022)."""
    losses = [
        contrastive(normalize(queries[:, :k]), normalize(answers[:, :k]), alike) for k in MENU
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
    alike = (which[:, None] == which).fill_diagonal_(False)
    return loss(queries, model.answers(data.hypernyms.of(which)), alike)


@torch.no_grad()
def recalls(
    model: Encoder, pairs: Pairs, ks: list[int], axes: Callable[[Encoder], Tensor] | None = None
) -> list[float]:
    """How many of 100 glosses find their hypernym among the first 10, by cosines of k features."""
    queries = model.queries(glosses().glosses.of(pairs.glosses))
    answers = model.answers(glosses().hypernyms)
    if axes:
        turned = axes(model)
        queries, answers = queries @ turned, answers @ turned
    found = []
    for k in ks:
        near, far = normalize(queries[:, :k]), normalize(answers[:, :k])
        parts = zip(near.split(500), pairs.hypernyms.split(500), strict=True)
        hits = [
            (part * far[own]).sum(1) + 1e-6 >= (part @ far.T).topk(FOUND).values[:, -1]
            for part, own in parts
        ]
        found.append(100 * float(torch.cat(hits).double().mean()))
    return found


def random_features(model: Encoder) -> Tensor:
    """In a random order, the same for each network."""
    return torch.eye(N)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def principal_axes(model: Encoder) -> Tensor:
    """Of the embeddings that it was trained on, of both kinds and of length 1; not centred."""
    queries = model.queries(glosses().glosses.of(glosses().train.glosses))
    both = normalize(torch.cat([queries, model.answers(glosses().hypernyms)]))
    return torch.linalg.eigh(both.T @ both).eigenvectors.flip(1)


CONTROLS = {"random features": random_features, "principal components": principal_axes}
PLAIN = "control: plain"
DEDICATED = f"control: a network for each k in bold, T each, {len(MENU)} T in all"
PREFIX = "`PrefixLoss(loss)`"
FROM_4 = f"`PrefixLoss(loss, LogUniform({KS[0]}))`"
SUM = "control: Matryoshka's sum"
LOSSES: dict[str, Callable[[], Loss]] = {
    PREFIX: lambda: td.PrefixLoss(contrastive, normalize=True),
    FROM_4: lambda: td.PrefixLoss(contrastive, LogUniform(KS[0]), normalize=True),
    SUM: lambda: matryoshka,
    PLAIN: plain_loss,
}


@dataclass
class Row:
    """What became of a loss: the rate that was chosen, recalls by k of each seed, cost."""

    rate: float
    scores: list[list[float]]
    seconds: float
    flops: float


def trained(
    loss: Callable[[], Loss], settings: Settings, seeds: list[int], ks: list[int]
) -> tuple[Row, list[Encoder]]:
    """A network for each seed. The rate is chosen on other glosses, with the first one."""
    number, n = steps(settings), ks[-1]
    valid, test = held_out(settings)
    begun = time.process_time()
    tried = {rate: train(loss(), number, rate, seeds[0], n) for rate in RATES}
    seconds = (time.process_time() - begun) / len(RATES)
    rate = max(RATES, key=lambda rate: statistics.fmean(recalls(tried[rate], valid, ks)))
    models = [tried[rate], *(train(loss(), number, rate, seed, n) for seed in seeds[1:])]
    scores = [recalls(model, test, ks) for model in models]
    return Row(rate, scores, seconds, number * flops(loss(), n)), models


def flops(loss: Loss, n: int) -> float:
    """Of one step; of a few steps where the ks are drawn, and so on average."""
    torch.manual_seed(0)
    model, times = Encoder(n), 20
    batch = torch.arange(BATCH)
    counts = [count_flops(lambda: step_loss(model, loss, batch).backward()) for _ in range(times)]
    return statistics.fmean(counts)


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """Method -> the fields of `Row`."""
    numbers: Numbers = {}
    _, test = held_out(settings)
    for words, loss in LOSSES.items():
        row, models = trained(loss, settings, seeds, KS)
        numbers[words] = vars(row)
        for control, axes in CONTROLS.items() if words in (PREFIX, PLAIN) else ():
            scores = [recalls(model, test, KS, axes) for model in models]
            numbers[f"{words}, {control}"] = vars(row) | {"scores": scores}
    each = [trained(plain_loss, settings, seeds, [k])[0] for k in MENU[:-1]]
    whole = numbers[PLAIN]
    of_k = dict(zip(MENU[:-1], (row.scores for row in each), strict=True))
    of_k[N] = [scores[-1:] for scores in whole["scores"]]
    numbers[DEDICATED] = {
        "rate": None,
        "scores": [[of_k[k][i][0] if k in MENU else None for k in KS] for i in range(len(seeds))],
        "seconds": whole["seconds"] + sum(row.seconds for row in each),
        "flops": whole["flops"] + sum(row.flops for row in each),
    }
    return numbers


def held_out(settings: Settings) -> list[Pairs]:
    """To choose on, and to test on."""
    count = 200 if settings.quick else None
    return [pairs.first(count) for pairs in (glosses().valid, glosses().test)]


def steps(settings: Settings) -> int:
    return 5 if settings.quick else 500


DONE = f"""\
WordNet's glosses and those of their hypernyms: the embedding of "{{gloss}}" should be near to that
of "{{hypernym}}". {{pairs:,}} pairs to train on; the glosses of {HELD_OUT:,} other synsets to choose the
learning rate on (of {" and ".join(f"{rate:g}" for rate in RATES)}, with the first seed; for each row by
itself), and of {HELD_OUT:,} to test on. Printed is recall@{FOUND}: for how many of 100 glosses their
hypernym is among the {FOUND} nearest, by cosine of the first k features, of all {{hypernyms:,}} synsets
that are a hypernym of something. Mean ± standard error over the seeds.

The encoder sums the embeddings of a gloss's words ({WORDS:,} words, {EMBEDDING} numbers each); a LayerNorm
and an MLP with {HIDDEN} hidden features, one for glosses and one for hypernyms, make {N} features of
the sum. The loss is contrastive: of {BATCH} pairs, which hypernym belongs to which gloss. AdamW, one
cycle of the learning rate, T = {{steps:,}} steps in each row, so that networks for
{len(MENU)} ks take {len(MENU)} T. The losses of several ks cost more per step: see the training FLOPs (those of matrix
products; the sum of words is none) and the seconds, of one processor, for one training.

`PrefixLoss` draws five ks in each step, of 1 to {N}, or from {KS[0]} on. *Matryoshka's sum* is the mean of the losses
at {listed(MENU)} in each step; the columns in bold are these. *Plain* is trained at k = {N} alone and
cut afterwards: to its first k features, to k random ones, or to its first k principal components,
those of the embeddings that it was trained on."""


def text(numbers: Numbers, settings: Settings) -> str:
    data = glosses()
    example = next(synset for synset in synsets().values() if synset.hypernyms)
    done = DONE.format(
        gloss=example.gloss,
        hypernym=synsets()[example.hypernyms[0]].gloss,
        pairs=len(data.train.glosses),
        hypernyms=len(data.hypernyms.starts),
        steps=steps(settings),
    )
    head = ["", *[f"**k = {k}**" if k in MENU else f"k = {k}" for k in KS]]
    cells = [
        [
            words,
            *["" if None in by_seed else mean_text(by_seed, 1) for by_seed in _columns(row)],
            f"{row['rate']:g}" if row["rate"] else "each its own",
            f"{row['flops'] / 1e12:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for words, row in numbers.items()
    ]
    head += ["learning rate", "10¹² FLOPs", "seconds"]
    return "\n\n".join([wrapped(done), table(head, cells), wrapped(shown(numbers))])


def _columns(row: Numbers) -> list[tuple[float, ...]]:
    """The scores of all seeds at each k."""
    return list(zip(*row["scores"], strict=True))


def shown(numbers: Numbers) -> str:
    means = {
        words: {
            k: statistics.fmean(by_seed)
            for k, by_seed in zip(KS, _columns(row), strict=True)
            if None not in by_seed
        }
        for words, row in numbers.items()
    }

    def points(words: str, other: str, ks: list[int]) -> str:
        return listed(f"{means[words][k] - means[other][k]:+.1f}" for k in ks)

    off = [k for k in KS if k not in MENU]
    principal = f"{PLAIN}, principal components"
    ahead = [k for k in KS if means[principal][k] > means[PREFIX][k]]
    times = numbers[DEDICATED]["flops"] / numbers[PREFIX]["flops"]
    below = 1 - probability_above(LogUniform(), N, KS[0] - 1)
    half = N // 2
    return f"""Against the networks for each of k = {listed(MENU)}, which take {times:.1f} times the FLOPs of
`PrefixLoss` together, `PrefixLoss` has {points(PREFIX, DEDICATED, MENU)} points, with ks from {KS[0]} on
{points(FROM_4, DEDICATED, MENU)}, and Matryoshka's sum {points(SUM, DEDICATED, MENU)}.

Against Matryoshka's sum in as many steps, `PrefixLoss` has {points(PREFIX, SUM, MENU)} points at its sizes,
and {points(PREFIX, SUM, off)} at k = {listed(off)}, for which it was not trained. With ks from {KS[0]} on it is
{points(FROM_4, SUM, MENU)}, and {points(FROM_4, SUM, off)}. Log-uniform ks from 1 on spend {100 * below:.0f} % of
the draws below {KS[0]}: give `lengths` that begin where the embeddings that you want do.

At k = {N} plain training has {points(PLAIN, PREFIX, [N])} points against `PrefixLoss`, and {points(PLAIN, SUM, [N])} against
Matryoshka's sum. Cut to its principal components, which takes no training, it is better than
`PrefixLoss` {f"at k = {listed(ahead)}" if ahead else "at no k"}: {points(principal, PREFIX, KS)} points over all ks. Of the {means[PLAIN][N]:.1f} % that it
finds, its first {half} features find {means[PLAIN][half]:.1f} %, {half} random ones {means[f"{PLAIN}, random features"][half]:.1f} %, and the first {MENU[0]} find {means[PLAIN][MENU[0]]:.1f} %."""
