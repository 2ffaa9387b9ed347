"""Does the small network compute what the large one computes with k set, at every size?

Random networks, over the whole table of operations, are pruned at one size and compared in float64
at many others, with the large network as the oracle, wherever that one runs. A network that is
wrong is printed as a program, and `--shrink` takes away what it is not wrong by.

    python -m benchmarks.attack_pruning [--count 10000] [--seed 0] [--processes 2]
    python -m benchmarks.attack_pruning --only SEED [--shrink]

It exits with 1 if any network is wrong or another exception escapes, or too few are cut.
"""

import argparse
import copy
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.random_networks import Network, draw_network, smaller_networks
from taildropout import PruningError, plan_pruning, tail_dropouts

SECONDS = 30  # of a processor, for one network
AT_LEAST_CUT = 0.6
CUT, KEPT = "equal, and cut", "equal, and kept"
REFUSED, WRONG, OTHER, SLOW = "refused", "wrong", "another exception", "slow"
FAILURES = (WRONG, OTHER, SLOW)


@dataclass(frozen=True)
class Outcome:
    """What became of one network: a kind from above, in words, and at how many sizes."""

    seed: int
    kind: str
    words: str = ""
    sizes: int = 0


def attack(network: Network) -> Outcome:
    """Prune a network and compare."""
    large = network.build()
    example = network.example()
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = plan_pruning(large, network.k, example).apply(large)
    except (PruningError, ValueError, TypeError) as error:
        return Outcome(network.seed, REFUSED, _words(error))
    except _TooSlow:
        return Outcome(network.seed, SLOW, f"more than {SECONDS} s")
    except Exception as error:
        return Outcome(network.seed, OTHER, _words(error))
    for name, layer in tail_dropouts(large).items():
        layer.set_k(network.k[name])
    sizes = 0
    for inputs, words in _others(network):
        try:
            expected = _run(large, inputs)
        except Exception:  # no size of this network
            continue
        if not all(x.isfinite().all() for x in tree_leaves(expected) if isinstance(x, Tensor)):
            continue
        sizes += 1
        try:
            actual = _run(small, inputs)
        except Exception as error:
            return Outcome(network.seed, WRONG, f"raises at {words}: {_words(error)}")
        difference = _difference(expected, actual)
        if difference is not None and _all_finite(network, inputs):
            return Outcome(network.seed, WRONG, f"differs at {words}: {difference}")
    cut = any(small.get_parameter(n).numel() < p.numel() for n, p in large.named_parameters())
    return Outcome(network.seed, CUT if cut else KEPT, "", sizes)


def _others(network: Network) -> Iterator[tuple[tuple[Tensor, ...], str]]:
    """The example's sizes with other values, one dim of another size, all dims of others."""
    yield network.example(1), "the example's sizes"
    yield tree_map(lambda x: 3 * x if x.is_floating_point() else x, network.example(2)), "3 x"
    yield tree_map(torch.zeros_like, network.example(3)), "zeros"
    picks = random.Random(network.seed)
    others = {
        dim: sorted({1, 2, 3, size - 1, size + 1, 11} - {0, size})
        for dim, size in network.sizes.items()
    }
    chosen = [{dim: size} for dim, sizes in others.items() for size in sizes]
    chosen += [{dim: picks.choice(sizes) for dim, sizes in others.items()} for _ in range(4)]
    for sizes in chosen:
        words = ", ".join(f"{dim} = {size}" for dim, size in sizes.items())
        yield network.example(4, **sizes), words


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(*copy.deepcopy(inputs))


def _difference(expected: Any, actual: Any) -> str | None:
    ones, others = tree_leaves(expected), tree_leaves(actual)
    if len(ones) != len(others):
        return f"{len(others)} outputs instead of {len(ones)}"
    for one, other in zip(ones, others, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return f"{other} instead of {one}"
        if not isinstance(one, Tensor):
            if one != other:
                return f"{other} instead of {one}"
            continue
        if one.shape != other.shape:
            return f"shape {tuple(other.shape)} instead of {tuple(one.shape)}"
        if one.numel() == 0:
            continue
        largest, scale = (one - other).abs().max().item(), one.abs().max().item()
        if not largest <= 1e-9 * (1 + scale):
            return f"by {largest:.2g} of {scale:.2g}"
    return None


def _all_finite(network: Network, inputs: tuple[Tensor, ...]) -> bool:
    """Whether all values inside are: nothing is promised where they are not."""
    model = network.build(all_values=True)
    for name, layer in tail_dropouts(model).items():
        layer.set_k(network.k[name])
    return all(bool(x.isfinite().all()) for x in tree_leaves(_run(model, inputs)))


class _TooSlow(BaseException):
    pass


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def shrink(network: Network) -> Network:
    """The smallest network found that fails in the same way."""
    kind = attack(network).kind
    found = True
    while found:
        found = False
        for smaller in smaller_networks(network):
            try:
                model = smaller.build()
                with torch.no_grad():
                    model(*smaller.example())
            except Exception:
                continue
            ks = {name: k for name, k in network.k.items() if f"self.{name}(" in smaller.source()}
            smaller = replace(smaller, k=ks)
            if smaller.k and attack(smaller).kind == kind:
                network, found = smaller, True
                break
    return network


def _attack_seed(seed: int) -> Outcome:
    torch.set_num_threads(1)
    return attack(draw_network(seed))


def _attack_all(seeds: range, processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(_attack_seed, seeds)
        return
    with get_context("spawn").Pool(processes, maxtasksperchild=500) as pool:
        yield from pool.imap_unordered(_attack_seed, seeds, chunksize=4)


def table(outcomes: list[Outcome]) -> str:
    """How many of each kind, and of each refusal."""
    counts = Counter(outcome.kind for outcome in outcomes)
    lines = [
        f"{count:7,}  {count / len(outcomes):6.1%}  {kind}" for kind, count in counts.most_common()
    ]
    refusals = Counter(
        outcome.words[:100] for outcome in outcomes if outcome.kind in (REFUSED, OTHER)
    )
    lines += [f"{count:7,}  {words}" for words, count in refusals.most_common(12)]
    sizes = sum(outcome.sizes for outcome in outcomes)
    lines.append(f"{sizes:7,}  comparisons")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="the seed of one network, which is printed")
    parser.add_argument(
        "--shrink", action="store_true", help="print failures without what they do not need"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.count)
    if args.only is not None:
        seeds, args.processes = range(args.only, args.only + 1), 1
    start, outcomes = time.perf_counter(), []
    for outcome in _attack_all(seeds, args.processes):
        outcomes.append(outcome)
        if len(outcomes) % 100 == 0:
            print(f"{len(outcomes):,} networks", file=sys.stderr, flush=True)
        if outcome.kind in FAILURES or args.only is not None:
            network = draw_network(outcome.seed)
            if args.shrink:
                network = shrink(network)
                outcome = attack(network)
            print(f"\n# seed {outcome.seed}: {outcome.kind}, {outcome.words}")
            print(network.describe(), flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{table(outcomes)}\n{len(outcomes) / seconds:.1f} networks per second")
    failed = [outcome.seed for outcome in outcomes if outcome.kind in FAILURES]
    print(f"failed: {sorted(failed)}" if failed else "none failed")
    cut = sum(outcome.kind == CUT for outcome in outcomes) / len(outcomes)
    return int(bool(failed) or (args.only is None and cut < AT_LEAST_CUT))


if __name__ == "__main__":
    sys.exit(main())
