"""Random networks as programs in Python: from a seed, and readable when one is printed.

A network is a list of statements, each one line of a `forward`. They are drawn from the tables
below, one after the other, and kept if they run on the example. So all that torch can do may stand
in the tables, and whatever runs is a network.

In the tables `{0}` is the value that a statement reads, `{1}` another one, `{n}` its number of
features, `{m}` a number of outputs, `{d}` and `{e}` two of its dims, and what stands between two
`@` is a module, parameter or buffer of the network, made in its `__init__`.

Each letter of `roles` is a dim: batch, time, height, width, features F, heads N. A small letter is
a dim of size 1, G another dim whose size is fixed.
"""

import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taildropout import TailDropout, tail_dropouts

LARGEST = 30_000  # entries of one value on the example
RARE = ("TBF", "BNTF", "BTNF", "BGF", "BHWF")
FREE = "BTHW"  # dims whose size the caller chooses


# ------------------------------------------------------------------------------------ the tables

ELEMENTWISE = [
    "{0}.relu()",
    "{0}.sigmoid()",
    "{0}.tanh()",
    "{0}.cos()",
    "{0}.abs()",
    "{0}.square()",
    "{0}.exp().clamp(max=9)",
    "{0}.clamp(-1, 2)",
    "F.gelu({0})",
    "F.silu({0})",
    "F.softplus({0})",
    "F.elu({0})",
    "F.leaky_relu({0})",
    "F.hardswish({0})",
    "F.logsigmoid({0})",
    "F.hardtanh({0})",
    "-{0}",
    "{0} + 1",
    "1 - {0}",
    "{0} * 0.5",
    "1 / (1 + {0}.abs())",
    "{0}.abs() ** 1.5",
    "{0} + {0}.sigmoid()",
    "torch.where({0} > 0.1, {0}, 0.3)",
    "{0}.masked_fill({0} > 0.7, 0.0)",
    "{0}.masked_fill({0} < 0.1, 1.0)",
    "{0} * ({0} > 0.1)",
    "F.dropout({0}, training=self.training)",
    "@nn.Dropout()@({0})",
    "@nn.ReLU(inplace=True)@({0})",
    "@nn.ReLU(inplace=True)@({0} + 0)",
    "torch.zeros_like({0}) + {0}",
    "torch.full_like({0}, 0.5) * {0}",
    "{0}.clone()",
    "@nn.Parameter(torch.tensor(0.7))@ * {0}",
]

ALONG_A_DIM = [
    "{0}.softmax({d})",
    "{0}.log_softmax({d})",
    "{0}.cumsum({d})",
    "{0}.cumprod({d})",
    "{0}.logcumsumexp({d})",
    "{0}.cummax({d}).values",
    "{0}.sort({d}).values",
    "{0}.flip({d})",
    "{0}.roll(1, {d})",
    "F.normalize({0}, dim={d})",
    "F.normalize({0}, dim={d}, eps=0.1)",
    "{0} - {0}.mean({d}, keepdim=True)",
    "{0} * {0}.sum({d}, keepdim=True).tanh()",
    "{0} * {0}.amax({d}, keepdim=True)",
    "{0} / (1 + {0}.norm(dim={d}, keepdim=True))",
    "{0} * torch.rsqrt({0}.var({d}, keepdim=True, correction=0) + 0.1)",
    "torch.cat([{0}, {0}.cos()], {d}).chunk(2, {d})[1]",
    "torch.ones_like({0}).cumsum({d}) * {0}",
    "{0}.narrow({d}, 0, max(1, {0}.shape[{d}] - 1))",
]

SIZES = [  # what reads the sizes of the input in Python
    "{0} / {0}.shape[{d}]",
    "{0} * min({0}.shape[{d}], 5)",
    "{0} * {0}.shape[-1] ** -0.5",
    "{0} + len({0})",
    "{0} + sum(1 for _ in {0})",
    "{0}.clamp(max={0}.shape[{d}] / 4)",
    "{0} + {0}.numel() / 100",
    "{0}.softmax({d}) if {0}.shape[{e}] > 4 else {0}",
    "{0}.cos() if {0}.shape[{d}] % 2 else {0}.sigmoid()",
    "{0}.cos() if {0}.shape[{d}] == 1 else {0}",
    "{0} if {0}.shape[{d}] < 3 else {0} + 1",
    "{0}.narrow({d}, 0, min(2, {0}.shape[{d}]))",
    "{0} + torch.arange({0}.shape[-1])",
    "{0} * torch.arange(1, {0}.shape[-1] + 1)",
    "{0} * {0}.new_full(({0}.shape[-1],), 0.5)",
    "{0} + {0}.new_zeros({0}.shape)",
    "{0} * torch.linspace(0, 1, {0}.shape[-1], dtype={0}.dtype)",
]

REDUCTIONS = [  # dim d is gone, or of size 1 with `keep`
    "{0}.sum({d}{keep})",
    "{0}.mean({d}{keep})",
    "{0}.amax({d}{keep})",
    "{0}.amin({d}{keep})",
    "{0}.prod({d}{keep})",
    "{0}.logsumexp({d}{keep})",
    "{0}.norm(dim={d}{keep})",
    "{0}.norm(1, dim={d}{keep})",
    "{0}.var({d}{keep}, correction=0)",
    "{0}.var({d}{keep})",
    "{0}.max({d}{keep}).values",
    "{0}.median({d}{keep}).values",
]

TAKING_ONE = [  # dim d is gone
    "{0}.select({d}, 0)",
    "{0}.select({d}, -1)",
    "{0}.unbind({d})[0]",
    "sum({0}.select({d}, i).cos() for i in range({0}.shape[{d}]))",
]

OF_TWO = [
    "{0} + {1}",
    "{0} + {1}",
    "{0} - {1}",
    "{0} * {1}",
    "{0} * {1}.sigmoid()",
    "{0} / (1 + {1}.abs())",
    "torch.maximum({0}, {1})",
    "torch.where({0} > 0.1, {0}, {1})",
    "torch.where({1} > 0.1, {0}, {0} * 0.5)",
    "torch.lerp({0}, {1}, 0.3)",
    "torch.cat([{0}, {1}], {f})",
    "torch.stack([{0}, {1}]).mean(0)",
    "torch.stack([{0}, {1}], -1).flatten(-2)",
]

OF_FEATURES = [  # the last dim of any value
    "@nn.Linear({n}, {m})@({0})",
    "@nn.Linear({n}, {m})@({0})",
    "@nn.Linear({n}, {m})@({0})",
    "@nn.Linear({n}, {m}, bias=False)@({0})",
    "@nn.Linear({n}, {n})@({0}) + {0}",
    "@nn.LayerNorm({n})@({0})",
    "@nn.RMSNorm({n})@({0})",
    "@nn.Bilinear({n}, {n}, {m})@({0}, {0})",
    "{0} * @nn.Parameter(torch.randn({n}))@",
    "{0} + @nn.Parameter(torch.randn({n}))@",
    "{0} @ @nn.Parameter(torch.randn({n}, {m}))@",
    "F.linear({0}, @nn.Parameter(torch.randn({m}, {n}))@)",
    "{0} * @torch.randn({n})@",
    "{0}.index_select(-1, @torch.randperm({n})@)",
    "{0}[..., @torch.randperm({n})@]",
    "F.glu({0}, dim=-1)",
    "{0}.chunk(2, -1)[0] * {0}.chunk(2, -1)[1].sigmoid()",
    "{0}.split({half}, -1)[1]",
    "{0}[..., :{half}]",
    "{0}[..., 1:]",
    "{0}[..., ::2]",
    "F.pad({0}, (1, 1))",
    "F.pad({0}, (0, 2), value=0.5)",
    "{0}.repeat_interleave(2, -1)",
    "{0}.unflatten(-1, (2, -1)).sum(-2)",
    "{0}.unflatten(-1, (-1, 2)).flatten(-2)",
    "{0}.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)",
    "{0}.reshape(*{0}.shape[:-1], -1, 2).mean(-1)",
]

BY_ROLES = {
    "BF": [
        "@nn.BatchNorm1d({n})@({0})",
        "@nn.GroupNorm(2, {n})@({0})",
        "@nn.PReLU({n})@({0})",
        "@nn.GRUCell({n}, {m})@({0})",
        "@nn.LSTMCell({n}, {m})@({0})[0]",
        "{0}.unsqueeze(1) -> BtF",
        "{0}.unflatten(1, (2, -1)) -> BGF",
        "F.cosine_similarity({0}, {0}.cos(), dim=-1) -> B",
        "torch.einsum('bi,oi->bo', {0}, @nn.Parameter(torch.randn({m}, {n}))@)",
    ],
    "BTF": [
        "@nn.LSTM({n}, {m}, batch_first=True)@({0})[0]",
        "@nn.GRU({n}, {m}, batch_first=True)@({0})[0]",
        "@nn.GRU({n}, {m}, batch_first=True, bidirectional=True)@({0})[0]",
        "@nn.RNN({n}, {m}, batch_first=True)@({0})[1][0] -> BF",
        "@nn.MultiheadAttention({n}, 2, batch_first=True)@({0}, {0}, {0})[0]",
        "@nn.MultiheadAttention({n}, 1, batch_first=True)@({0}, {0}, {0}, need_weights=False)[0]",
        "{0}.transpose(1, 2) -> BFT",
        "{0}.transpose(0, 1) -> TBF",
        "{0}.unflatten(-1, (2, -1)).transpose(1, 2) -> BNTF",
        "{0}.view(len({0}), {0}.shape[1], 2, {0}.shape[2] // 2) -> BTNF",
        "{0}.reshape({0}.shape[0], {0}.shape[1], -1, 2).sum(-1)",
        "({0} @ {0}.transpose(1, 2)).softmax(-1) @ {0}",
        "{0}.transpose(1, 2) @ {0} -> BGF",
        "torch.ones({0}.shape[1], {0}.shape[1]).to({0}).tril() @ {0}",
        "{0} * torch.ones({0}.shape[1], {0}.shape[1]).to({0}).tril().sum(1)[:, None]",
        "F.scaled_dot_product_attention({0}, {0}, {0})",
        "F.scaled_dot_product_attention({0}, {0}, {0}, is_causal=True)",
        "F.scaled_dot_product_attention(@nn.Linear({n}, 4)@({0}), @nn.Linear({n}, 4)@({0}), {0})",
        "torch.einsum('bti,oi->bto', {0}, @nn.Parameter(torch.randn({m}, {n}))@)",
        "torch.einsum('btc->bc', {0}) -> BF",
        "torch.einsum('btc,bsc->bts', {0}, {0}).softmax(-1) @ {0}",
        "torch.einsum('btc,btd->bcd', {0}, {0}) -> BGF",
        "{0}[:, 1:]",
        "{0}[:, ::2]",
        "{0}[:, :2]",
        "{0}[:, -2:]",
        "{0}[:, {0}.shape[1] // 2:]",
        "{0} + @nn.Parameter(torch.randn(16, {n}))@[:{0}.shape[1]]",
        "{0} * @torch.randn(16, 1)@[:{0}.shape[1]]",
        "{0} + @nn.Embedding(16, {n})@(torch.arange({0}.shape[1]))",
        "F.pad({0}, (0, 0, 1, 1))",
        "F.pad({0}, (0, 0, 2, 0), value=0.5)",
        "F.pad({0}, (0, 0, 0, (-{0}.shape[1]) % 4))",
        "{0}.flatten(0, 1) -> BF",
        "{0}.flatten(0, 1).unflatten(0, ({0}.shape[0], -1))",
        "{0}.flatten(1) -> BF",
        "{0}.repeat(1, 1, 2)",
        "{0}.repeat(1, 2, 1)",
        "{0}.repeat_interleave(2, 1)",
        "{0}.expand(2, -1, -1, -1).sum(0)",
        "{0}.tril()",
        "torch.stack({0}.unbind(1), 1)",
        "{0}.sum((0, 1)) -> F",
        "{0}.mean((1, 2)) -> B",
        "F.cosine_similarity({0}, {0}.roll(1, 1), dim=-1) -> BT",
        "F.layer_norm({0}, {0}.shape[-1:])",
        "torch.baddbmm({0}, {0} @ {0}.transpose(1, 2), {0}, alpha=0.1)",
        "@nn.TransformerEncoderLayer({n}, 2, 8, batch_first=True)@({0})",
    ],
    "TBF": ["@nn.GRU({n}, {m})@({0})[0]", "{0}.transpose(0, 1) -> BTF", "{0}[-1] -> BF"],
    "BNTF": [
        "F.scaled_dot_product_attention({0}, {0}, {0})",
        "{0}.transpose(1, 2) -> BTNF",
        "{0}.transpose(1, 2).flatten(2) -> BTF",
        "{0}.transpose(1, 2).reshape({0}.shape[0], {0}.shape[2], -1) -> BTF",
        "{0}.sum(1) -> BTF",
    ],
    "BTNF": ["{0}.flatten(2) -> BTF", "{0}.transpose(1, 2) -> BNTF", "{0}.mean(2) -> BTF"],
    "BGF": ["{0}.flatten(1) -> BF", "{0}.sum(1) -> BF", "{0}.transpose(1, 2)"],
    "BFT": [
        "@nn.Conv1d({n}, {m}, 3)@({0})",
        "@nn.Conv1d({n}, {m}, 3, padding=1)@({0})",
        "@nn.Conv1d({n}, {m}, 1)@({0})",
        "@nn.Conv1d({n}, {m}, 3, padding='same', dilation=2, bias=False)@({0})",
        "@nn.Conv1d({n}, {n}, 3, padding=1, groups={n})@({0})",
        "@nn.Conv1d({n}, {m}, 2, padding=1, padding_mode='circular')@({0})",
        "@nn.ConvTranspose1d({n}, {m}, 2, 2)@({0})",
        "@nn.ConvTranspose1d({n}, {m}, 3, padding=1)@({0})",
        "@nn.ConvTranspose1d({n}, {m}, 1, 2)@({0})",
        "@nn.BatchNorm1d({n})@({0})",
        "@nn.GroupNorm(2, {n})@({0})",
        "@nn.GroupNorm({n}, {n})@({0})",
        "@nn.InstanceNorm1d({n}, affine=True)@({0})",
        "@nn.InstanceNorm1d({n}, track_running_stats=True)@({0})",
        "@nn.PReLU({n})@({0})",
        "F.max_pool1d({0}, 2)",
        "F.avg_pool1d({0}, 3, 1, 1)",
        "F.avg_pool1d({0}, 2, ceil_mode=True)",
        "F.avg_pool1d({0}, 3, 1, 1, count_include_pad=False)",
        "F.adaptive_avg_pool1d({0}, 2)",
        "F.adaptive_max_pool1d({0}, 1)",
        "F.lp_pool1d({0}, 2, 2)",
        "F.interpolate({0}, scale_factor=2)",
        "F.interpolate({0}, size=5, mode='linear')",
        "F.pad({0}, (1, 1))",
        "F.pad({0}, (1, 2), value=0.5)",
        "F.pad({0}, (1, 0), mode='reflect')",
        "F.pad({0}, (1, 1), mode='replicate')",
        "F.pad({0}, (0, (-{0}.shape[-1]) % 4))",
        "{0} * @nn.Parameter(torch.randn({n}, 1))@",
        "{0} * {0}.mean(-1, keepdim=True).sigmoid()",
        "{0}.transpose(1, 2) -> BTF",
        "{0}.flatten(1) -> BF",
        "F.glu({0}, dim=1)",
        "@nn.Conv1d({n}, {m}, 1)@({0}).cumsum(-1)",
    ],
    "BFHW": [
        "@nn.Conv2d({n}, {m}, 3)@({0})",
        "@nn.Conv2d({n}, {m}, 3, padding=1)@({0})",
        "@nn.Conv2d({n}, {m}, 1)@({0})",
        "@nn.Conv2d({n}, {m}, 3, stride=3, padding=1)@({0})",
        "@nn.Conv2d({n}, {m}, 2, stride=2, bias=False)@({0})",
        "@nn.Conv2d({n}, {m}, (1, 3), padding='same')@({0})",
        "@nn.Conv2d({n}, {n}, 3, padding=1, groups={n})@({0})",
        "@nn.Conv2d({n}, 2 * {n}, 3, padding=1, groups={n})@({0})",
        "@nn.Conv2d({n}, {n}, 1, groups=2)@({0})",
        "@nn.Conv2d({n}, {m}, 2, padding=1, padding_mode='reflect')@({0})",
        "@nn.ConvTranspose2d({n}, {m}, 2, 2)@({0})",
        "@nn.ConvTranspose2d({n}, {m}, 2)@({0})",
        "@nn.ConvTranspose2d({n}, {m}, 1, 2)@({0})",
        "@nn.ConvTranspose2d({n}, {m}, 3, padding=1)@({0})",
        "@nn.ConvTranspose2d({n}, {n}, 2, 2, groups=2)@({0})",
        "@nn.BatchNorm2d({n})@({0})",
        "@nn.GroupNorm(2, {n})@({0})",
        "@nn.InstanceNorm2d({n}, affine=True)@({0})",
        "@nn.PReLU({n})@({0})",
        "@nn.AvgPool2d(3, 1, 1)@({0})",
        "F.avg_pool2d({0}, 2)",
        "F.avg_pool2d({0}, 2, ceil_mode=True, padding=1)",
        "F.avg_pool2d({0}, 2, 1, divisor_override=3)",
        "F.avg_pool2d({0}, 3, 1, 1, count_include_pad=False)",
        "F.max_pool2d({0}, 2, ceil_mode=True)",
        "F.max_pool2d({0}, 3, 1, 1)",
        "F.adaptive_avg_pool2d({0}, 1)",
        "F.adaptive_avg_pool2d({0}, (3, 2))",
        "F.adaptive_max_pool2d({0}, 2)",
        "F.lp_pool2d({0}, 2, 2)",
        "F.interpolate({0}, scale_factor=2)",
        "F.interpolate({0}, scale_factor=2, mode='bilinear')",
        "F.interpolate({0}, size=(5, 4), mode='nearest-exact')",
        "F.interpolate({0}, size=(5, 4), mode='bicubic')",
        "F.pixel_shuffle({0}, 2)",
        "F.pixel_unshuffle({0}, 2)",
        "F.channel_shuffle({0}, 2)",
        "F.pad({0}, (1, 1, 0, 2))",
        "F.pad({0}, (1, 0, 0, 0), value=0.5)",
        "F.pad({0}, (1, 1, 1, 1), mode='reflect')",
        "F.pad({0}, (0, 0, 0, 0, 1, 1))",
        "{0}.flatten(2).transpose(1, 2) -> BTF",
        "{0}.mean((2, 3)) -> BF",
        "{0}.sum((2, 3)) -> BF",
        "{0}.flatten(1) -> BF",
        "{0}.permute(0, 2, 3, 1) -> BHWF",
        "{0} * @nn.Parameter(torch.randn({n}, 1, 1))@",
        "{0} * {0}.mean((2, 3), keepdim=True).sigmoid()",
        "F.glu({0}, dim=1)",
        "{0}.chunk(2, 1)[0] * {0}.chunk(2, 1)[1]",
        "torch.cat([{0}, {0}.cos()], 1)",
        "F.dropout2d({0}, training=self.training)",
    ],
    "BHWF": ["{0}.permute(0, 3, 1, 2) -> BFHW", "{0}.flatten(1, 2) -> BTF"],
}

PRODUCERS = {
    "BF": ["@nn.Linear({n}, {w})@({0})", "@nn.Linear({n}, {w}, bias=False)@({0})"],
    "BTF": [
        "@nn.Linear({n}, {w})@({0})",
        "@nn.Linear({n}, {w}, bias=False)@({0})",
        "@nn.LSTM({n}, {w}, batch_first=True)@({0})[0]",
        "@nn.GRU({n}, {w} // 2, batch_first=True, bidirectional=True)@({0})[0]",
    ],
    "BT": ["@nn.Embedding(7, {w})@({0}) -> BTF"],
    "BFT": ["@nn.Conv1d({n}, {w}, 3, padding=1)@({0})", "@nn.Conv1d({n}, {w}, 1)@({0})"],
    "BFHW": [
        "@nn.Conv2d({n}, {w}, 3, padding=1)@({0})",
        "@nn.Conv2d({n}, {w}, 3, bias=False)@({0})",
        "@nn.Conv2d({n}, {w}, 1, bias=False)@({0})",
        "@nn.Conv2d({n}, 2 * {n}, 3, padding=1, groups={n})@({0})",
        "@nn.ConvTranspose2d({n}, {w}, 2, 2)@({0})",
    ],
}

ANY_CONSUMER = ["@nn.Linear({n}, 2)@({0})", "@nn.Linear({n}, 3, bias=False)@({0})"]
CONSUMERS = {
    "BTF": ["@nn.RNN({n}, 2, batch_first=True)@({0})[0]", *ANY_CONSUMER],
    "BFT": ["@nn.Conv1d({n}, 2, 1)@({0})", "@nn.Conv1d({n}, 2, 2, bias=False)@({0})"],
    "BFHW": [
        "@nn.Conv2d({n}, 2, 1)@({0})",
        "@nn.Conv2d({n}, 2, 3, padding=1)@({0})",
        "@nn.Conv2d({n}, 2, 2, bias=False)@({0})",
        "@nn.ConvTranspose2d({n}, 2, 2)@({0})",
        "@nn.ConvTranspose2d({n}, 2, 2, 2, bias=False)@({0})",
    ],
}


# ---------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Statement:
    """One line: `target = expression`, in which the values of `reads` stand as {0}, {1}."""

    target: str
    expression: str
    reads: tuple[str, ...]
    roles: str
    template: str  # as it stands in the table

    @property
    def text(self) -> str:
        return f"{self.target} = {self.expression.format(*self.reads)}"


@dataclass(frozen=True)
class Network:
    """A network and what it is pruned to.

    Attributes:
        seed: what it was drawn from; its weights are too.
        inputs: the roles of each input, by name. An input of integers has no features.
        sizes: the example's size of each dim that is free.
        made: modules, parameters and buffers: the code that makes them, by name.
        returns: "one", "tuple" or "dict".
        k: by layer name.
    """

    seed: int
    inputs: dict[str, str]
    sizes: dict[str, int]
    made: dict[str, str] = field(default_factory=dict)
    statements: tuple[Statement, ...] = ()
    returns: str = "one"
    k: dict[str, int] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """What no statement reads."""
        read = {name for statement in self.statements for name in statement.reads}
        return [s.target for s in self.statements if s.target not in read]

    def source(self, all_values: bool = False) -> str:
        """The code of the class; with `all_values` it returns every value by name."""
        code = "\n".join(statement.text for statement in self.statements)
        lines = [
            "class Network(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
        ]
        for name, maker in self.made.items():
            if f"self.{name}" in code:
                if maker.startswith("torch."):
                    lines.append(f"        self.register_buffer({name!r}, {maker})")
                else:
                    lines.append(f"        self.{name} = {maker}")
        lines += ["", f"    def forward(self, {', '.join(self.inputs)}):"]
        lines += [f"        {line}" for line in code.splitlines()]
        outputs = [s.target for s in self.statements] if all_values else self.outputs
        if all_values or self.returns == "dict":
            lines.append("        return {" + ", ".join(f"{o!r}: {o}" for o in outputs) + "}")
        else:
            lines.append(f"        return {', '.join(outputs)}")
        return "\n".join(lines)

    def build(self, all_values: bool = False) -> nn.Module:
        """The network in float64 and eval mode, with random weights and statistics."""
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "TailDropout": TailDropout}
        exec(self.source(all_values), names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = names["Network"]()
            _randomize(model)
        return model.double().eval()

    def example(self, seed: int = 0, **sizes: int) -> tuple[Tensor, ...]:
        """Inputs of the example's sizes, or of others."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {**self.sizes, **sizes}
        inputs = []
        for roles in self.inputs.values():
            shape = [sizes.get(role, 3) for role in roles]
            if "F" in roles:
                inputs.append(torch.randn(shape, generator=generator, dtype=torch.float64))
            else:
                inputs.append(torch.randint(7, shape, generator=generator))
        return tuple(inputs)

    def widths(self) -> dict[str, int]:
        """The number of features of each layer that is called, on the example."""
        model = self.build()
        found: dict[str, int] = {}

        def note(name: str, layer: TailDropout, output: Tensor) -> None:
            found[name] = output.shape[layer.dropout_dim]

        for name, layer in tail_dropouts(model).items():
            layer.register_forward_hook(lambda m, _, output, name=name: note(name, m, output))
        with torch.no_grad():
            model(*self.example())
        return found

    def describe(self) -> str:
        sizes = ", ".join(f"{dim} = {size}" for dim, size in self.sizes.items())
        inputs = ", ".join(f"{name} of {', '.join(r)}" for name, r in self.inputs.items())
        return f"{self.source()}\n\n# k = {self.k}; inputs: {inputs}; the example has {sizes}"


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """No parameter is at its initial 0 or 1, and no statistic of a norm."""
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=1.5 / fan**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


# ---------------------------------------------------------------------------------- drawing them


def draw_network(seed: int) -> Network:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about what it is asked to do
        torch.manual_seed(seed)
        return _Writer(seed).write()


class _Writer:
    """Draws statements, and keeps those that run on the example."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        layout = self.random.choice(["BF", "BTF", "BTF", "BTF", "BT", "BFT", "BFHW", "BFHW"])
        inputs = {"x": layout}
        if self.random.random() < 0.15:
            inputs["y"] = layout
        sizes = {role: self.random.choice([1, 2, 3, 4, 5, 7, 8]) for role in layout if role in FREE}
        self.network = Network(seed, inputs, sizes)
        self.self = nn.Module()
        self.names = {"torch": torch, "nn": nn, "F": F, "TailDropout": TailDropout}
        self.names |= {"self": self.self, **dict(zip(inputs, self.network.example(), strict=True))}
        self.self.eval()
        self.roles = dict(inputs)
        self.statements: list[Statement] = []
        self.made: dict[str, str] = {}

    # One statement.

    def value(self, name: str) -> Tensor:
        return self.names[name]

    def features(self, name: str) -> int:
        """The dim of its features, else the last."""
        return self.roles[name].find("F") % len(self.roles[name])

    def attempt(self, template: str, *reads: str) -> bool:
        """Append the statement if it runs."""
        expression, _, roles = template.partition(" -> ")
        value = self.value(reads[0])
        own = self.roles[reads[0]]
        f = self.features(reads[0])
        n = value.shape[f] if value.ndim else 1
        dims = [self.random.randrange(1 if value.ndim > 1 else 0, max(value.ndim, 1))] * 2
        if value.ndim > 2:
            dims[1] = self.random.choice([d for d in range(1, value.ndim) if d != dims[0]])
        if value.ndim and self.random.random() < 0.06:
            dims[0] = 0
        keep = self.random.choice(["", ", keepdim=True"]) if "{keep}" in expression else None
        made: dict[str, str] = {}

        def declare(match: re.Match[str]) -> str:
            maker = match[1].format(**words)
            same = [name for name, code in self.made.items() if code == maker]
            if same and maker.startswith("nn.") and self.random.random() < 0.3:
                return f"self.{self.random.choice(same)}"  # one module, called again
            kind = re.sub(r"\W", "", maker.partition("(")[0].rpartition(".")[2]).lower()
            kind = kind.replace("randn", "buffer").replace("randperm", "order")
            name = f"{kind}{len(self.made) + len(made) + 1}"
            made[name] = maker
            return f"self.{name}"

        words = {
            "n": n,
            "half": n // 2,
            "m": self.random.choice([4, 6, 8]),
            "w": self.random.choice([4, 6, 8, 12]),
            "d": dims[0],
            "e": dims[1],
            "f": f,
            "keep": keep or "",
            "0": "{0}",
            "1": "{1}",
        }
        expression = re.sub(
            r"\{(\w+)\}", lambda m: str(words[m[1]]), expression.replace("@ @", "\0@")
        )
        # A product of matrices is written with the same sign.
        expression = re.sub(r"@([^@\s][^@]*)@", declare, expression).replace("\0", "@ ")
        for name, maker in made.items():
            try:
                thing = eval(maker, dict(self.names))
            except Exception:
                return False
            if isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter):
                self.self.register_buffer(name, thing)
            else:
                setattr(self.self, name, thing)
        self.self.double().eval()
        target = f"h{len(self.statements) + 1}"
        statement = Statement(target, expression, reads, "", template)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                result = eval(statement.expression.format(*reads), dict(self.names))
        except Exception:
            return False
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return False
        if not 0 < result.numel() <= LARGEST or not result.isfinite().all():
            return False
        if result.abs().max() > 1e4:
            return False
        if not roles:
            roles = _roles_of(own, value, result, keep, dims[0], [self.roles[r] for r in reads])
        if len(roles) != result.ndim:
            return False
        self.names[target] = result
        self.roles[target] = roles
        self.made |= made
        self.statements.append(replace(statement, roles=roles))
        return True

    def choices(self, name: str) -> list[list[str]]:
        """The tables that fit a value, each as often as it shall be drawn from."""
        roles = self.roles[name]
        value = self.value(name)
        tables = [ELEMENTWISE] * 4 + [SIZES]
        if value.ndim > 1:
            tables += [ALONG_A_DIM, REDUCTIONS] + ([TAKING_ONE] if value.ndim > 2 else [])
        if roles.endswith("F"):
            tables += [OF_FEATURES] * 2
        tables += [BY_ROLES.get(roles, [])] * (12 if roles in RARE else 4)
        return [table for table in tables if table]

    def append_any(self, recent: list[str]) -> None:
        for _ in range(20):
            name = self.random.choice(recent[-1:] * 3 + recent)
            others = [o for o in self.roles if o != name and self.value(o).is_floating_point()]
            if others and self.random.random() < 0.2:
                if self.attempt(self.random.choice(OF_TWO), name, self.random.choice(others)):
                    return
            elif self.attempt(self.random.choice(self.random.choice(self.choices(name))), name):
                return

    def append_one_of(self, table: list[str], name: str) -> bool:
        return any(
            self.attempt(template, name) for template in self.random.sample(table, len(table))
        )

    def append_layer(self, name: str) -> bool:
        roles = self.roles[name]
        dim = self.features(name) if "F" in roles else len(roles) - 1
        if self.random.random() < 0.02 and len(roles) > 1:
            dim = self.random.randrange(1, len(roles))
        if "B" not in roles or dim == roles.index("B"):
            return False
        written = dim if self.random.random() < 0.5 or dim != len(roles) - 1 else -1
        batch = roles.index("B")
        arguments = [f"batch_dim={batch}"] if batch else []
        arguments += [f"dropout_dim={written}"] if written != -1 else []
        return self.attempt(f"@TailDropout({', '.join(arguments)})@({{0}})", name)

    # The whole network.

    def write(self) -> Network:
        for name in self.network.inputs:
            assert self.append_one_of(PRODUCERS[self.roles[name]], name)
        if len(self.statements) > 1 and self.random.random() < 0.5:
            self.attempt(self.random.choice(OF_TWO), "h1", "h2")
        for _ in range(self.random.choice([0, 0, 0, 1, 2])):
            self.append_any([s.target for s in self.statements])
        start = len(self.statements)
        for name in [s.target for s in reversed(self.statements)]:
            if self.append_layer(name):
                break
        for _ in range(self.random.choice([0, 1, 1, 2, 2, 3, 4, 5])):
            self.append_any([s.target for s in self.statements[start:]])
        if self.random.random() < 0.3:
            self.append_layer(self.statements[-1].target)
            for _ in range(self.random.choice([0, 1, 2])):
                self.append_any([s.target for s in self.statements[start:]])
        self.finish()
        network = replace(
            self.network,
            made=self.made,
            statements=tuple(self.statements),
            returns=self.random.choice(["one", "one", "dict"]),
        )
        return replace(network, k=self.ks(network))

    def finish(self) -> None:
        """Something reads the features in the end, mostly."""
        read = {name for s in self.statements for name in s.reads}
        for name in [s.target for s in self.statements if s.target not in read]:
            roles = self.roles[name]
            if self.random.random() < 0.9:
                if roles in CONSUMERS:
                    self.append_one_of(CONSUMERS[roles], name)
                elif roles.endswith("F"):
                    self.append_one_of(ANY_CONSUMER, name)

    def ks(self, network: Network) -> dict[str, int]:
        """Mostly some of the features, rarely none or all."""
        ks = {}
        for name, n in network.widths().items():
            some = self.random.randint(1, max(1, n - 1))
            ks[name] = self.random.choices([some, 0, n], [0.95, 0.03, 0.02])[0]
        return ks


def _roles_of(
    own: str, value: Tensor, result: Tensor, keep: str | None, dim: int, all_roles: list[str]
) -> str:
    """The roles of a result whose table does not name them."""
    if keep == "" or (keep is None and result.ndim == value.ndim - 1):
        return own[:dim] + own[dim + 1 :]
    roles = max(all_roles, key=len)
    if len(roles) != result.ndim:
        return "?" * result.ndim
    if len(all_roles) > 1:
        own = roles
        for other in all_roles:
            merged = zip(own, other.rjust(len(own)), strict=True)
            own = "".join(b if a.islower() and b != " " else a for a, b in merged)
    if keep:
        own = own[:dim] + own[dim].lower() + own[dim + 1 :]
    return own


def smaller_networks(network: Network) -> Iterator[Network]:
    """The network with one statement less, in every way; for finding what a failure is made of."""
    for i, statement in reversed(list(enumerate(network.statements))):
        rest = network.statements[:i] + network.statements[i + 1 :]
        if statement.target in network.outputs:
            if rest:
                yield replace(network, statements=rest)
            continue
        for source in statement.reads:
            renamed = tuple(
                replace(s, reads=tuple(source if r == statement.target else r for r in s.reads))
                for s in rest
            )
            yield replace(network, statements=renamed)
