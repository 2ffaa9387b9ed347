"""What does pruning take away, what does it cost, and what does it gain?

Four tables. First: well-known architectures at usual sizes, with random weights, half
of the features of their hidden layers pruned; "difference" is the largest between the outputs of
the small network and of the masked one, in float32, as a fraction of the largest output. Second:
the time and the peak memory of planning and applying, for a transformer of 100 M parameters.
Third: the time of planning against that of one torch.export of the same network, in CPU seconds
of one thread, at small and at large inputs and depths. Fourth: the speed of a pruned MLP at
k = n / 4 against the masked one.

    python benchmarks/pruning.py [--quick] [--json FILE]
    python benchmarks/pruning.py --planning
"""

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import networks
import torch
import transformers
from timing import human, machine, parser, take_turns, write_json
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import taildropout as td
from taildropout import TailDropout

IMAGE = {"pixel_values": torch.zeros(1, 3, 224, 224)}
WORDS = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
PIXELS = {"input": torch.zeros(1, 3, 224, 224)}
SEQUENCE = {"input": torch.zeros(1, 32, 768)}
CLICK = {"numbers": torch.zeros(1, 13), "categories": torch.zeros(1, 26, dtype=torch.int64)}
TEXTS = {**WORDS, "decoder_input_ids": torch.zeros(1, 16, dtype=torch.int64)}


@dataclass(frozen=True)
class Case:
    """A network and the modules, by patterns, behind which layers are inserted."""

    name: str
    build: Callable[[], nn.Module]
    behind: str
    inputs: dict[str, Tensor]
    dropout_dim: int = -1

    def model(self) -> nn.Module:
        model = self.build()
        names = [name for name, _ in model.named_modules()]
        patterns = self.behind.split()
        for name in [name for name in names if any(fnmatchcase(name, p) for p in patterns)]:
            td.insert(model, name, TailDropout(dropout_dim=self.dropout_dim))
        return model.eval()


def of(kind: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of transformers by its class name; without options at its published size."""
    model_class = getattr(transformers, kind)
    return lambda: model_class(model_class.config_class(**config))


QUICK = [
    Case("ResNet-50", of("ResNetForImageClassification"), "*.layer.[01]", IMAGE, 1),
    Case("BERT base", of("BertForSequenceClassification"), "*.intermediate", WORDS),
]
ALL = [
    *QUICK,
    Case("ConvNeXt-T", of("ConvNextForImageClassification"), "*.layers.*.act", IMAGE),
    Case("MobileNetV2", of("MobileNetV2ForImageClassification"), "*.layer.*.conv_3x3", IMAGE, 1),
    Case("ViT-B/16", of("ViTForImageClassification"), "*.mlp.activation_fn", IMAGE),
    Case("GPT-2", of("GPT2LMHeadModel", use_cache=False), "*.mlp.act", WORDS),
    Case(
        "T5 small", of("T5ForConditionalGeneration", use_cache=False), "*.DenseReluDense.act", TEXTS
    ),
    Case(
        "Llama, 12 layers of 768",
        of(
            "LlamaForCausalLM",
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            use_cache=False,
        ),
        "*.mlp.act_fn",
        WORDS,
    ),
    Case("12 attentions of 12 heads", networks.attentions, "*.dropout", SEQUENCE, 1),
    Case("LSTM tagger", networks.Tagger, "embedding dropout", WORDS),
    Case("U-Net", networks.UNet, "*.5", IMAGE, 1),
    Case(
        "convolutional autoencoder",
        networks.convolutional_autoencoder,
        "2 5 8 11 14 17 20",
        PIXELS,
        1,
    ),
    Case("DLRM", networks.Recommender, "bottom.[13] top.[13]", CLICK),
]


def random_like(value: Tensor) -> Tensor:
    return torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, 1000)


def widths(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """The number of features of each layer."""
    found: dict[str, int] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, _, output, name=name: found.update(
                {name: output.shape[layer.dropout_dim]}
            )
        )
        for name, layer in td.tail_dropouts(model).items()
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def difference(small: nn.Module, model: nn.Module, ks: dict[str, int], inputs: Any) -> float:
    """The largest, relative to the largest output; leaves the ks set."""
    for name, k in ks.items():
        td.tail_dropouts(model)[name].set_k(k)
    pairs = zip(tree_leaves(model(**inputs)), tree_leaves(small(**inputs)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    model = case.model()
    inputs = {name: random_like(value) for name, value in case.inputs.items()}
    ks = {name: n // 2 for name, n in widths(model, inputs).items()}
    start = time.perf_counter()
    plan = td.plan_pruning(model, ks, inputs)
    small = plan.apply(model)
    seconds = time.perf_counter() - start
    return {
        "name": case.name,
        "layers": len(ks),
        "k": sorted({(ks[name], plan.n[name]) for name in ks}),
        "before": plan.before,
        "after": plan.after,
        "difference": difference(small, model, ks, inputs),
        "stays": sorted({f"{stay.name}: {stay.reason}" for stay in plan.stays}),
        "seconds": seconds,
    }


def flops(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count > 1e9 else f"{count / 1e6:.1f} M"


def print_row(result: dict[str, Any]) -> None:
    before, after = result["before"], result["after"]
    pairs = [f"{k} of {n}" for k, n in result["k"]]
    k = pairs[0] if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    print(
        f"| {result['name']} | {result['layers']} | {k} "
        f"| {before.parameters / 1e6:.1f} M → {after.parameters / 1e6:.1f} M "
        f"| {flops(before.flops)} → {flops(after.flops)} "
        f"| {result['difference']:.0g} | {'; '.join(result['stays']) or 'nothing'} |",
        flush=True,
    )


# ------------------------------------------------------------------------------- time and memory

LARGE = Case(
    "transformer of 100 M parameters",
    of("GPT2LMHeadModel", use_cache=False, vocab_size=20_000),
    "*.mlp.act",
    {"input_ids": torch.zeros(1, 16, dtype=torch.int64)},
)


def resident(what: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(what))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def measure_cost() -> None:
    """In a fresh process: prints what plan and apply took, and held above what was held before."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model = LARGE.model()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ks = {name: n // 2 for name, n in widths(model, LARGE.inputs).items()}
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    plan = td.plan_pruning(model, ks, LARGE.inputs)
    planned, plan_peak = time.perf_counter(), resident("VmHWM")
    plan.apply(model)
    applied, peak = time.perf_counter(), resident("VmHWM")
    print(size, planned - start, applied - planned, plan_peak - before, peak - before)


def cost(rounds: int) -> dict[str, Any]:
    names = ["model_bytes", "plan_seconds", "apply_seconds", "plan_bytes", "both_bytes"]
    runs = []
    for _ in range(rounds):
        output = subprocess.run(
            [sys.executable, __file__, "--cost"], capture_output=True, text=True, check=True
        ).stdout
        runs.append([float(word) for word in output.split()])
    return {
        name: sorted(values) for name, values in zip(names, zip(*runs, strict=True), strict=True)
    }


def middle(values: list[float]) -> float:
    return values[len(values) // 2]


# ------------------------------------------------------------------------- planning and exporting


def chain(depth: int) -> nn.Module:
    layers = [(nn.Linear(8, 8), nn.ReLU(), TailDropout()) for _ in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer), nn.Linear(8, 8))


class Block(nn.Module):
    """A block of a small GPT."""

    def __init__(self, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        self.tail = TailDropout()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.tail(nn.functional.gelu(self.up(self.between(x)))))


def gpt(blocks: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(blocks)))


def unet() -> nn.Module:
    model = networks.UNet((16, 32, 64, 128, 256))
    for name in [name for name, _ in model.named_modules() if fnmatchcase(name, "*.5")]:
        td.insert(model, name, TailDropout(dropout_dim=1))
    return model


PLANNED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain of 500 layers": (lambda: chain(500), (2, 8)),
    "chain of 1,000 layers": (lambda: chain(1000), (2, 8)),
    "GPT of 48 blocks": (lambda: gpt(48), (2, 16, 32)),
    "GPT of 96 blocks": (lambda: gpt(96), (2, 16, 32)),
    "U-Net at 64 x 64": (unet, (1, 3, 64, 64)),
    "U-Net at 512 x 512": (unet, (1, 3, 512, 512)),
    "attention of length 128": (lambda: gpt(2), (1, 128, 32)),
    "attention of length 8,192": (lambda: gpt(2), (1, 8192, 32)),
}


def planning(name: str) -> dict[str, float]:
    """CPU seconds of one export, of a plan, and of a sweep over 16 ks on the same reading."""
    build, shape = PLANNED[name]
    model, x = build().eval(), torch.randn(shape)
    torch.export.export(model, (x,), strict=False)  # the first call sets torch up
    start = time.process_time()
    torch.export.export(model, (x,), strict=False)
    exported = time.process_time()
    plan = td.plan_pruning(model, 0.5, x)
    planned = time.process_time()
    for step in range(1, 17):
        plan.at(step / 16, check=False)
    return {
        "export": exported - start,
        "plan": planned - exported,
        "sweep": time.process_time() - planned,
    }


def print_planning(quick: bool) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    print("\n| network | one export | plan | plan / (3 exports + 2 s) | 16 other ks |")
    print("|---|---|---|---|---|")
    results = {}
    for name in list(PLANNED)[-2:] if quick else PLANNED:
        results[name] = seconds = planning(name)
        print(
            f"| {name} | {human(seconds['export'])} | {human(seconds['plan'])} "
            f"| {seconds['plan'] / (3 * seconds['export'] + 2):.2f} | {human(seconds['sweep'])} |",
            flush=True,
        )
    return results


# ---------------------------------------------------------------------------------------- speed


@torch.no_grad()
def speed(batch: int, features: int, n: int, rounds: int) -> dict[str, Any]:
    model = nn.Sequential(
        nn.Linear(features, n), nn.GELU(), TailDropout(), nn.Linear(n, features)
    ).eval()
    x = torch.randn(batch, features)
    small, masked = td.prune(model, n // 4, x[:2]), copy.deepcopy(model)
    masked[2].set_k(n // 4)
    rivals = {"whole": model, "masked": masked, "pruned": small}
    times = take_turns({name: (lambda m=m: m(x)) for name, m in rivals.items()}, rounds)
    return {"shape": (batch, features, n), "times": times}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cost", action="store_true", help="the second table's one run only")
    arguments.add_argument("--planning", action="store_true", help="the third table only")
    args = arguments.parse_args()
    if args.cost:
        measure_cost()
        return
    if args.planning:
        print(machine())
        print_planning(args.quick)
        return
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rounds = 3 if args.quick else 15
    print(machine())
    print("\n| network | layers | k | parameters | FLOPs | difference | what stays |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for case in QUICK if args.quick else ALL:
        results.append(measure(case))
        print_row(results[-1])

    costs = cost(1 if args.quick else 3)
    size = middle(costs["model_bytes"])
    print("\n| | weights | plan | apply | memory above the model's: plan | plan and apply |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {LARGE.name} | {size / 2**20:.0f} MiB | {human(middle(costs['plan_seconds']))} "
        f"| {human(middle(costs['apply_seconds']))} "
        f"| {middle(costs['plan_bytes']) / size:.1f} times its weights "
        f"| {middle(costs['both_bytes']) / size:.1f} times |"
    )

    threads = torch.get_num_threads()
    plans = print_planning(args.quick)
    torch.set_num_threads(threads)

    print(
        "\n| batch, features → hidden → features | whole | masked | pruned to a quarter | faster |"
    )
    print("|---|---|---|---|---|")
    speeds = []
    for features, n in [(256, 1024)] if args.quick else [(256, 1024), (768, 3072), (1024, 4096)]:
        result = speed(1024, features, n, rounds)
        speeds.append(result)
        times = result["times"]
        print(
            f"| 1024, {features} → {n} → {features} | "
            + " | ".join(human(times[name].median) for name in ("whole", "masked", "pruned"))
            + f" | {times['masked'].median / times['pruned'].median:.2f} times |",
            flush=True,
        )
    write_json(args.json, {"networks": results, "cost": costs, "planning": plans, "speed": speeds})


if __name__ == "__main__":
    main()
