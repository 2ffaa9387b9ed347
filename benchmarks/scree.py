"""How much faster is the loss at all ks in one pass than one run of the network for each k?

The plain loop sets k, runs the network and takes the loss, for each k of each batch. It is timed
on some of the ks and multiplied, since all take the same time. `td.scree` measures all ks, with
its checks of the first batch. Both take turns; printed are medians of the CPU time.

    python benchmarks/scree.py [--quick] [--json FILE]
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from networks import UNet
from timing import human, machine, parser, write_json
from torch import Tensor, nn
from torch.nn import functional as F

import taildropout as td

SIZES = range(0, 1025, 8)  # as many as the default
BATCHES = 4


@dataclass
class Case:
    """A network with one TailDropout layer, and the data it is measured on."""

    name: str
    model: nn.Module
    loss: Callable[[object, Tensor], Tensor]
    data: list[tuple[object, Tensor]]
    ks: Sequence[int]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


# --- networks in which all goes through the layer -------------------------------------------------


def convolutional(samples: int) -> Case:
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), td.TailDropout(), nn.Linear(128, 10)),
    )
    name = "CNN, layer of 128 before the last Linear"
    return Case(name, model, cross_entropy, images(samples), range(129))


def perceptron(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), td.TailDropout(), nn.Linear(512, 10))
    name = "MLP 784-512-10, layer of 512"
    return Case(name, model, cross_entropy, images(samples), range(513))


def autoencoder(samples: int) -> Case:
    model = nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32), td.TailDropout()),
        *(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784)),
    )
    data = [(inputs, inputs) for inputs, _ in images(samples)]
    return Case("autoencoder 784-256-32-256-784", model, squared_error, data, range(33))


def images(samples: int, batch: int = 500) -> list[tuple[Tensor, Tensor]]:
    pixels, classes = torch.rand(samples, 784), torch.randint(10, (samples,))
    return list(zip(pixels.split(batch), classes.split(batch), strict=True))


# --- networks with residual connections, or others around the layer -------------------------------


def bert(block: int) -> Case:
    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    td.insert(model, f"bert.encoder.layer.{block}.intermediate", td.TailDropout())
    data = [({"input_ids": tokens}, torch.randint(3, (16,))) for tokens in sentences()]

    def loss(output: transformers.utils.ModelOutput, target: Tensor) -> Tensor:
        return cross_entropy(output.logits, target)

    return Case(f"BERT of 8 blocks, in the MLP of block {block + 1}", model, loss, data, SIZES)


def gpt(block: int) -> Case:
    config = transformers.GPT2Config(
        vocab_size=1000,
        n_embd=256,
        n_layer=8,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    td.insert(model, f"transformer.h.{block}.mlp.act", td.TailDropout())
    data = [({"input_ids": tokens}, tokens) for tokens in sentences()]

    def loss(output: transformers.utils.ModelOutput, target: Tensor) -> Tensor:
        return cross_entropy(output.logits[:, :-1].transpose(1, 2), target[:, 1:]).mean(1)

    name = f"GPT-2 of 8 blocks, in the MLP of block {block + 1}"
    return Case(name, model, loss, data, SIZES)


def sentences() -> list[Tensor]:
    return list(torch.randint(1000, (BATCHES, 16, 64)))


class Block(nn.Module):
    """A bottleneck of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.reduce, self.norm1 = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)
        self.conv, self.norm2 = nn.Conv2d(inner, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.expand, self.norm3 = nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.reduce(x)))
        h = self.norm3(self.expand(self.relu(self.norm2(self.conv(h)))))
        h += x
        return self.relu(h)


def resnet(block: int) -> Case:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    model = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), *(Block(128) for _ in range(8)), *head)
    td.insert(model, f"{block + 1}.norm2", td.TailDropout(dropout_dim=1))
    data = [(torch.rand(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(BATCHES)]
    name = f"ResNet of 8 bottlenecks, in block {block + 1}"
    return Case(name, model, cross_entropy, data, range(65))


def unet() -> Case:
    model = UNet((16, 32, 64, 128))
    td.insert(model, "down.3.5", td.TailDropout(dropout_dim=1))
    data = [(torch.rand(8, 3, 32, 32), torch.randint(2, (8, 32, 32))) for _ in range(BATCHES)]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target).flatten(1).mean(1)

    return Case("U-Net of 4 levels, at the lowest", model, loss, data, range(129))


def measure(case: Case, rounds: int) -> dict[str, float]:
    model, loss, data = case.model.eval(), case.loss, case.data
    (layer,) = td.tail_dropouts(model).values()
    some, batches = case.ks[::16], data[:2]

    @torch.no_grad()
    def loop() -> None:
        for k in some:
            with layer.using_k(k):
                for inputs, target in batches:
                    loss(model(**inputs) if isinstance(inputs, dict) else model(inputs), target)

    def together() -> None:
        td.scree(model, loss, data, ks=case.ks, progress=False)

    rivals = {"loop": loop, "scree": together}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            times[name].append(seconds(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    median["loop"] *= len(data) / len(batches) * len(case.ks) / len(some)
    return median


def seconds(call: Callable[[], object]) -> float:
    """Of the CPU, which other programs on the machine don't change much."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", help="cases with this in their name")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    print("| network | ks | plain loop | scree | times faster |")
    print("|---|---|---|---|---|")
    samples = 2000 if args.quick else 10_000
    cases = [
        *(convolutional(samples), perceptron(samples), autoencoder(samples)),
        *(bert(7), bert(4), gpt(7), gpt(4), resnet(7), resnet(4), unet()),
    ]
    results = []
    for case in cases:
        if args.only not in case.name:
            continue
        times = measure(case, rounds=3 if args.quick else 5)
        print(
            f"| {case.name} | {len(case.ks)} | {human(times['loop'])} | {human(times['scree'])} | "
            f"{times['loop'] / times['scree']:.1f} |",
            flush=True,
        )
        results.append({"network": case.name, "seconds": times})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
