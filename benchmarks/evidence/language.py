"""A GPT on WordNet's glosses: one network for all widths, and from a trained plain network."""
import copy, time, math
import torch
from torch import Tensor, nn
import taildropout as td
from taildropout.lengths import Full, Mixed, Sizes
from torch.nn.functional import cross_entropy
from .gpt import CONTEXT, GPT
from .wordnet import synsets
from functools import lru_cache
WIDTHS = [1 / 8, 1 / 4, 1 / 2, 1.0]
BATCH=8
RECIPE = Mixed([Full(), Sizes(WIDTHS)], [0.2, 0.8])

@lru_cache(maxsize=1)
def texts():
    glosses = [s.gloss for s in synsets().values()]
    order = torch.randperm(len(glosses), generator=torch.Generator().manual_seed(0)).tolist()
    b = torch.tensor(list("\n".join(glosses[i] for i in order).encode("ascii")))
    n = len(b) // 50
    return b[: -2 * n], b[-2 * n : -n], b[-n:]

def windows(text: Tensor):
    w = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return w[:, :-1], w[:, 1:]

def train(model, steps, rate, seed, after=lambda o: (lambda: None)):
    text = texts()[0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    hook = after(optimizer)
    within = torch.arange(CONTEXT + 1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        batch = text[starts + within]
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hook()
    model.eval()
    return model

def loss_of(output, target):
    return cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1) / math.log(2)

@torch.no_grad()
def bits(model, text, features="first", n=None):
    inputs, targets = windows(text)
    if n: inputs, targets = inputs[:n], targets[:n]
    data = list(zip(inputs.split(64), targets.split(64)))
    if not td.tail_dropouts(model):
        return [float(torch.cat([loss_of(model(x), y) for x, y in data]).mean())]
    return td.scree(model, loss_of, data, layer="*", ks=WIDTHS, features=features, progress=False).loss.tolist()
