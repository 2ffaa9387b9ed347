"""A small GPT on glosses: one network for all widths, from the start or from a plain network."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import taildropout as td
from taildropout.lengths import Full, Lengths, Mixed, Sizes
from taildropout.measuring.cuts import Features
from taildropout.pruning.importance import By

from .gpt import BLOCKS, CONTEXT, GPT, HEAD, HEADS, HIDDEN, STREAM
from .report import CONTROLS, Numbers, Settings, count_flops, listed, mean_text, table, wrapped
from .wordnet import synsets

TITLE = "A language model: one network for all widths"
SEEDS = 3
WIDTHS = [1 / 8, 1 / 4, 1 / 2, 1.0]
NAMES = ["1/8", "1/4", "1/2", "1"]
BUDGET = len(WIDTHS)
BATCH, HELD_OUT = 8, 1024
RATES = [5e-3, 1e-2]
RECIPE = Mixed([Full(), Sizes(WIDTHS)], [0.2, 0.8])
ORDERS: dict[By, int] = {"variance": 1024, "saliency": 1024, "greedy": 16}  # windows of text
EXAMPLE = torch.zeros(2, CONTEXT, dtype=torch.long)


DEDICATED = f"control: a network for each width, T each, {BUDGET} T in all"
NESTED, FAIR, SHORT = f"nested, {BUDGET} T", "nested, the same FLOPs", "nested, T"
SCHEDULED = f"plain for 40 %, ordered, then nested, {BUDGET} T"
PLAIN, TRUNCATED = f"control: plain, {BUDGET} T", "truncated"
ORDERED = "that, ordered"
TUNED = f"that, ordered, then nested for {BUDGET} T/10"
UNORDERED = f"control: that, nested for {BUDGET} T/10 without an order"


@dataclass(frozen=True)
class Text:
    """Bytes, and windows of them that do not overlap: inputs, and what follows each byte."""

    bytes: Tensor

    def windows(self, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        whole = self.bytes[: len(self.bytes) // (CONTEXT + 1) * (CONTEXT + 1)]
        windows = whole.view(-1, CONTEXT + 1)[:count]
        return [(batch[:, :-1], batch[:, 1:]) for batch in windows.split(32)]


@lru_cache(maxsize=1)
def texts() -> tuple[Text, Text, Text]:
    """To train on, to choose on and to test on: all glosses in a random order, one in a line."""
    glosses = [synset.gloss for synset in synsets().values()]
    order = torch.randperm(len(glosses), generator=torch.Generator().manual_seed(0))
    whole = torch.tensor(list("\n".join(glosses[i] for i in order.tolist()).encode("ascii")))
    held_out = HELD_OUT * (CONTEXT + 1)
    train, valid, test = whole.split([len(whole) - 2 * held_out, held_out, held_out])
    return Text(train), Text(valid), Text(test)


def plain(seed: int, width: float = 1.0) -> GPT:
    torch.manual_seed(seed)
    return GPT(width)


def nested(model: nn.Module, lengths: Lengths = RECIPE) -> nn.Module:
    """The model, changed."""
    td.nest(model, EXAMPLE, lengths=lengths)
    return model


def train(
    model: nn.Module,
    steps: int,
    rate: float,
    seed: int,
    schedule: Callable[[Optimizer], td.Schedule] | None = None,
) -> nn.Module:
    """The model, trained on random windows; AdamW, one cycle of the learning rate."""
    text, within = texts()[0].bytes, torch.arange(CONTEXT + 1)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    scheduled = schedule(optimizer) if schedule else None
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        windows = text[starts + within]
        optimizer.zero_grad()
        bits(model(windows[:, :-1]), windows[:, 1:]).mean().backward()
        optimizer.step()
        cycle.step()
        if scheduled:
            scheduled.step()
    return model.eval()


def bits(output: Tensor, target: Tensor) -> Tensor:
    """Per byte, for each window."""
    return cross_entropy(output.mT, target, reduction="none").mean(1) / math.log(2)


def scores(
    model: nn.Module,
    text: Text,
    features: Features = "first",
    count: int | None = None,
) -> list[float]:
    """Bits per byte at each width, with layers; one number without."""
    model.eval()
    if td.tail_dropouts(model):
        scree = td.scree(
            *(model, bits, text.windows(count)),
            layer="*",
            ks=WIDTHS,
            features=features,
            progress=False,
        )
        return scree.loss.tolist()
    with torch.no_grad():
        return [float(torch.cat([bits(model(x), y) for x, y in text.windows(count)]).mean())]


def ordered(model: nn.Module, by: By) -> nn.Module:
    """By some of the windows that it was trained on; a copy."""
    return td.order(model, texts()[0].windows(ORDERS[by]), loss=bits, by=by)


def flops(model: nn.Module) -> int:
    """Of one step of training."""
    tokens = EXAMPLE[:1].expand(BATCH, -1)
    model = copy.deepcopy(model).train()
    return count_flops(lambda: bits(model(tokens), tokens).mean().backward())


@dataclass(frozen=True)
class Chosen:
    """On the validation text, with the first seed."""

    dedicated: list[float]  # the rate for each width
    nested: float
    order: By

    @classmethod
    def by_training(cls, seed: int, steps: int, orders: list[By], count: int | None) -> "Chosen":
        valid = texts()[1]

        def mean(model: nn.Module) -> float:
            found = scores(model, valid, count=count)
            return sum(found) / len(found)

        def rate(start: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
            trained = {rate: train(start(), steps, rate, seed) for rate in RATES}
            best = min(RATES, key=lambda rate: mean(trained[rate]))
            return best, trained[best]

        found = [rate(partial(plain, seed, width)) for width in WIDTHS]
        whole = nested(found[-1][1])
        order = min(orders, key=lambda by: mean(ordered(whole, by)))
        nested_rate, _ = rate(lambda: nested(plain(seed)))
        return cls([rate for rate, _ in found], nested_rate, order)


@dataclass(frozen=True)
class Row:
    """What became of a way of training: steps, FLOPs, seconds, and bits per byte by width."""

    steps: int
    flops: float
    seconds: float
    scores: list[float]


@dataclass(frozen=True)
class Runs:
    """Each way of training once; `count` windows are looked at."""

    chosen: Chosen
    seed: int
    steps: int
    count: int | None

    def all(self) -> Iterator[tuple[str, Row]]:
        budget, rate = BUDGET * self.steps, self.chosen.nested
        each = self.dedicated()
        yield DEDICATED, each
        fair = round(each.flops / flops(plain(0)))
        for words, steps in [(NESTED, budget), (FAIR, fair), (SHORT, self.steps)]:
            yield words, self.trained(nested(plain(self.seed)), steps, rate)
        model = nested(plain(self.seed))
        schedule = partial(_schedule, model, budget, self.chosen.order)
        yield SCHEDULED, self.trained(model, budget, rate, schedule=schedule)
        yield from self.from_plain(budget)

    def dedicated(self) -> Row:
        rows = [
            self.trained(plain(self.seed, width), self.steps, rate)
            for width, rate in zip(WIDTHS, self.chosen.dedicated, strict=True)
        ]
        return Row(
            sum(row.steps for row in rows),
            sum(row.flops for row in rows),
            sum(row.seconds for row in rows),
            [row.scores[0] for row in rows],
        )

    def from_plain(self, budget: int) -> Iterator[tuple[str, Row]]:
        model, rate = plain(self.seed), self.chosen.dedicated[-1]
        row = self.trained(model, budget, rate)
        nested(model)
        shown: dict[Features, str] = {"first": TRUNCATED} | CONTROLS
        for features, words in shown.items():
            yield f"{PLAIN}, {words}", replace(row, scores=self.scores(model, features))
        begun = time.process_time()
        in_order = ordered(model, self.chosen.order)
        yield ORDERED, Row(0, 0, time.process_time() - begun, self.scores(in_order))
        for words, start in [(TUNED, in_order), (UNORDERED, copy.deepcopy(model))]:
            yield words, self.trained(start, budget // 10, rate / 2, later=1000)

    def trained(
        self,
        model: nn.Module,
        steps: int,
        rate: float,
        schedule: Callable[[Optimizer], td.Schedule] | None = None,
        later: int = 0,
    ) -> Row:
        """The model is changed; `later` is added to the seed, for other windows."""
        cost = steps * flops(model)
        begun = time.process_time()
        train(model, steps, rate, self.seed + later, schedule)
        return Row(steps, cost, time.process_time() - begun, self.scores(model))

    def scores(self, model: nn.Module, features: Features = "first") -> list[float]:
        return scores(model, texts()[2], features, self.count)


def _schedule(model: nn.Module, steps: int, by: By, optimizer: Optimizer) -> td.Schedule:
    """With its own share of plain steps."""
    data = texts()[0].windows(ORDERS[by])
    return td.Schedule(model, steps, data=data, loss=bits, by=by, optimizer=optimizer)


def measure(settings: Settings, seeds: list[int]) -> Numbers:
    """What was chosen, and the fields of `Row` for each way of training and seed."""
    count = 64 if settings.quick else None
    orders: list[By] = ["variance"] if settings.quick else list(ORDERS)
    chosen = Chosen.by_training(seeds[0], steps(settings), orders, count)
    numbers: Numbers = {"chosen": vars(chosen), "rows": {}}
    for seed in seeds:
        for words, row in Runs(chosen, seed, steps(settings), count).all():
            numbers["rows"].setdefault(words, []).append(vars(row))
    return numbers


def steps(settings: Settings) -> int:
    return 5 if settings.quick else 1000


DONE = f"""\
A small GPT reads WordNet's glosses byte by byte, in a random order, one in a line: {{megabytes:.1f}} MB to train on, then {HELD_OUT:,} windows of {CONTEXT} bytes to
choose on, and {HELD_OUT:,} to test on. It has {BLOCKS} blocks, {STREAM} features in the residual stream, {HEADS} heads
of {HEAD}, MLPs with {HIDDEN} hidden features, and LayerNorm.
*Width* is that of the blocks: the share of their heads and of the hidden features of their MLPs, which is
what `td.nest` finds. The stream keeps its {STREAM} features, since LayerNorm over them can't be narrowed; so
do embedding and output. A network for a width has exactly the shape that `td.prune` gives at it.
Printed are bits per byte, over all bytes of a window (the first of them with little context),
mean ± standard error over the seeds; smaller is better.

T is {{steps:,}} steps of {BATCH} windows, AdamW and one cycle of the learning rate. *Nested* draws a width for
each window, `lengths=Mixed([Full(), Sizes([1/8, 1/4, 1/2, 1.0])], [0.2, 0.8])`. Its tails are masked, not
skipped, so a step costs what one of the whole network does. A network for each width is cheaper:
{BUDGET} T of nested steps are the same number of steps, at {{ratio:.1f}} times the FLOPs; *the same FLOPs* are
{{fair:.1f}} T. FLOPs are those of matrix products in training, forward and backward (neither measuring nor
ordering, nor what the rows of *that* network had before); the seconds are of one processor, in training,
for the first seed.

On the text for choosing, with the first seed, in T steps: the learning rates, of {" and ".join(f"{rate:g}" for rate in RATES)}
({{rates}} for the networks of 1/8 to 1, {{nested}} for nested; longer trainings have the same), and what
`td.order` goes by, of {", ".join(ORDERS)}: {{order}}. *Plain* is the network of full width without layers.
Under it stand its first features (*{TRUNCATED}*), and two controls: {" and ".join(CONTROLS.values())}
(`td.scree` with `features=`; no network to prune to). *Ordered* is `td.order` of it, without training; what is
nested from there takes a tenth of the steps more, at half of the learning rate. *Plain for 40 %* is
`td.Schedule` with its default."""


def text(numbers: Numbers, settings: Settings) -> str:
    chosen, found = numbers["chosen"], numbers["rows"]
    whole = found[NESTED][0]
    done = DONE.format(
        megabytes=len(texts()[0].bytes) / 1e6,
        steps=steps(settings),
        ratio=whole["flops"] / found[DEDICATED][0]["flops"],
        fair=found[FAIR][0]["steps"] / steps(settings),
        rates=", ".join(f"{rate:g}" for rate in chosen["dedicated"]),
        nested=f"{chosen['nested']:g}",
        order=chosen["order"],
    )
    names = [f"width {name}" for name in NAMES]
    cells = [
        [
            words,
            *[mean_text(column, 3) for column in _by_width(results)],
            f"{results[0]['steps']:,}",
            f"{results[0]['flops'] / 1e12:.2f}",
            f"{results[0]['seconds']:.0f}",
        ]
        for words, results in found.items()
    ]
    against = [
        [words, *[f"{100 * difference:+.1f} %" for difference in _against(found, words, DEDICATED)]]
        for words in found
        if words != DEDICATED
    ]
    return "\n\n".join(
        [
            wrapped(done),
            table(["", *names, "steps", "10¹² FLOPs", "seconds"], cells),
            "The same, against the networks for each width:",
            table(["", *names], against),
            wrapped(shown(found)),
        ]
    )


def _by_width(results: list[Numbers]) -> Iterator[tuple[float, ...]]:
    return zip(*(result["scores"] for result in results), strict=True)


def _against(found: Numbers, words: str, others: str) -> list[float]:
    """How much larger the bits of a row are than those of others, at each width."""
    means = [
        [statistics.fmean(column) for column in _by_width(found[row])] for row in (words, others)
    ]
    return [one / other - 1 for one, other in zip(*means, strict=True)]


def shown(found: Numbers) -> str:
    def percent(words: str, other: str, widths: int = len(WIDTHS)) -> str:
        differences = _against(found, words, other)[:widths]
        return f"{listed(f'{100 * d:+.1f}' for d in differences)} %"

    def better(words: str, other: str) -> str:
        pairs = zip(NAMES, _against(found, words, other), strict=True)
        names = [name for name, difference in pairs if difference < 0]
        if len(names) in (0, len(NAMES)):
            return f"{'better' if names else 'worse'} at every width"
        return f"better at {listed(names)} and worse elsewhere"

    whole = f"{PLAIN}, {TRUNCATED}"
    full = {words: 100 * _against(found, words, whole)[-1] for words in (NESTED, SCHEDULED, TUNED)}
    read = found[SHORT][0]["steps"] * BATCH * CONTEXT / 1e6
    return f"""Changes are in per cent of the bits per byte, at widths {listed(NAMES)}; less is better.
Against a network for each width, one for all of them has {percent(NESTED, DEDICATED)} in as many steps
({better(NESTED, DEDICATED)}), {percent(FAIR, DEDICATED)} with as many FLOPs ({better(FAIR, DEDICATED)}), and
{percent(SHORT, DEDICATED)} in T, a quarter of the steps ({better(SHORT, DEDICATED)}).

Full width is not free. Against the plain network that has all {BUDGET} T for it, nested from the start has
{full[NESTED]:+.1f} % there, and with a plain start {full[SCHEDULED]:+.1f} %. Which of the two depends on the width: the plain start
has {percent(SCHEDULED, NESTED)} against nested from the start in as many steps ({better(SCHEDULED, NESTED)}).

From the trained plain network of {BUDGET} T: with its features in order, before any training, the widths
below 1 have {percent(ORDERED, whole, -1)} against its first features. A tenth of its steps more, nested, and it has
{percent(TUNED, DEDICATED)} against a network for each width ({better(TUNED, DEDICATED)}), in {1 + 1 / 10:.1f} times the
steps of all of them; {percent(TUNED, NESTED)} against nested from the start in {BUDGET} T ({better(TUNED, NESTED)}); and
{percent(TUNED, UNORDERED)} against the same without an order ({better(TUNED, UNORDERED)}). Full width pays
{full[TUNED]:.1f} %. Principal components of its features have {percent(f"{PLAIN}, principal components", ORDERED, -1)} against the
ordered features at the widths below 1, but leave nothing to cut: features behind an elementwise function can be permuted,
not turned.

T steps read {read:.1f} MB and {BUDGET} T {BUDGET * read:.1f} MB, which is far from trained out: at full width a plain
network has {_full(found, DEDICATED):.2f} bits after T and {_full(found, whole):.2f} after {BUDGET} T. What is left of a gain after
longer training this table does not say."""


def _full(found: Numbers, words: str) -> float:
    return statistics.fmean(result["scores"][-1] for result in found[words])
