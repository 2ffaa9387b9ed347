"""Networks to prune, small and with random weights, and what is left of each, worked out by hand.

`NETWORKS` are whole architectures, those of the transformers library among them. `PARTS` are the
structures that they consist of, one at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import taildropout as td
from taildropout import TailDropout

Shapes = dict[str, tuple[int, ...] | None]
ANY = None  # a shape that is not stated


@dataclass(frozen=True)
class Case:
    """A network, and what becomes of it.

    Attributes:
        build: makes the model, its layers in place; call `make` for random weights in float64.
        inputs: random arguments for a number of samples.
        n: the width of each layer, in the order of `td.tail_dropouts`.
        shapes: from the k of each layer to the shape of every tensor that is smaller then. What
            is not named keeps its shape; `ANY` leaves it open.
        stays: for each record of what stays, a word that its name or reason must hold.
        zero: whether at k = 0 no feature is left of anything; else one is kept, for torch has no
            convolution over no channels.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    n: tuple[int, ...]
    shapes: Callable[..., Shapes]
    stays: tuple[str, ...] = ()
    zero: bool = True

    def make(self) -> nn.Module:
        return with_random_weights(self.build()).double().eval()

    def ks(self, place: str) -> dict[str, int]:
        """A k for each layer. With several layers each stands at another place."""
        places = ["one", "half", "all but one", "all"]
        if place == "none":
            chosen = [0 for _ in self.n]
        else:
            at = places.index(place)
            chosen = [
                {"one": 1, "half": n // 2, "all but one": n - 1, "all": n}[
                    places[(at + i) % 3] if at < 3 else "all"
                ]
                for i, n in enumerate(self.n)
            ]
        return dict(zip(td.tail_dropouts(self.build()), chosen, strict=True))


@torch.no_grad()
def with_random_weights(model: nn.Module) -> nn.Module:
    """No parameter or statistic is at its initial 0 or 1, and no activation is driven to its end."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.normal_(std=fan_in**-0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(vocabulary, shape)


# ------------------------------------------------------------------------------ shapes, for short


def module(name: str, rows: int, *rest: int, bias: bool = True) -> Shapes:
    """The parameters of a Linear or Conv."""
    result: Shapes = {f"{name}.weight": (rows, *rest)}
    return result | ({f"{name}.bias": (rows,)} if bias else {})


def columns(name: str, rows: int, *rest: int) -> Shapes:
    """The weight of a Linear or Conv that keeps its rows."""
    return {f"{name}.weight": (rows, *rest)}


def batch_norm(name: str, k: int) -> Shapes:
    return {
        f"{name}.{tensor}": (k,) for tensor in ("weight", "bias", "running_mean", "running_var")
    }


# ------------------------------------------------------------------------------ networks for images


def insert(model: nn.Module, names: list[str], **options: Any) -> nn.Module:
    for name in names:
        td.insert(model, name, TailDropout(0.5, **options))
    return model


class Bottleneck(nn.Module):
    """Of ResNet-50: 1x1, 3x3 and 1x1 convolutions around which the input is added."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # one module for all three places
        self.tail1 = TailDropout(dropout_dim=1)
        self.tail2 = TailDropout(dropout_dim=1)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.tail1(self.relu(self.bn1(self.conv1(x))))
        out = self.tail2(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Bottleneck(8, 4, 16), Bottleneck(16, 4, 16))
        self.layer2 = nn.Sequential(Bottleneck(16, 6, 24, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def bottleneck_shapes(block: str, inputs: int, outputs: int, k1: int, k2: int) -> Shapes:
    return (
        module(f"{block}.conv1", k1, inputs, 1, 1, bias=False)
        | batch_norm(f"{block}.bn1", k1)
        | module(f"{block}.conv2", k2, k1, 3, 3, bias=False)
        | batch_norm(f"{block}.bn2", k2)
        | columns(f"{block}.conv3", outputs, k2, 1, 1)
    )


def hf_resnet() -> nn.Module:
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5
        )
    )
    return insert(model, [f"{HF_BLOCK}.0", f"{HF_BLOCK}.1"], dropout_dim=1)


HF_BLOCK = "resnet.encoder.stages.1.layers.1.layer"


def hf_resnet_shapes(k1: int, k2: int) -> Shapes:
    return (
        module(f"{HF_BLOCK}.0.convolution", k1, 24, 1, 1, bias=False)
        | batch_norm(f"{HF_BLOCK}.0.normalization", k1)
        | module(f"{HF_BLOCK}.1.convolution", k2, k1, 3, 3, bias=False)
        | batch_norm(f"{HF_BLOCK}.1.normalization", k2)
        | columns(f"{HF_BLOCK}.2.convolution", 24, k2, 1, 1)
    )


def convnext() -> nn.Module:
    model = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, num_labels=5, patch_size=2
        )
    )
    return insert(model, [f"convnext.encoder.stages.{i}.layers.0.act" for i in (0, 1)])


def convnext_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, (k, width) in enumerate(zip(ks, (4, 6), strict=True)):
        block = f"convnext.encoder.stages.{i}.layers.0"
        result |= module(f"{block}.pwconv1", k, width) | columns(f"{block}.pwconv2", width, k)
    return result


def mobilenet() -> nn.Module:
    model = transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(
            depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=5
        )
    )
    # In block 1 the layer stands behind the depthwise convolution, in block 6 before it.
    places = ["mobilenet_v2.layer.1.conv_3x3", "mobilenet_v2.layer.6.expand_1x1"]
    return insert(model, places, dropout_dim=1)


def mobilenet_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k, width in zip((1, 6), ks, (4, 8), strict=True):
        block = f"mobilenet_v2.layer.{i}"
        result |= module(f"{block}.expand_1x1.convolution", k, width, 1, 1, bias=False)
        result |= batch_norm(f"{block}.expand_1x1.normalization", k)
        result |= module(f"{block}.conv_3x3.convolution", k, 1, 3, 3, bias=False)
        result |= batch_norm(f"{block}.conv_3x3.normalization", k)
        result |= columns(f"{block}.reduce_1x1.convolution", width, k, 1, 1)
        # The constants of a batch norm between the two have nowhere else to go.
        result |= {f"{block}.reduce_1x1.convolution.bias": ANY}
    return result


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    return insert(model, [f"vit.layers.{i}.mlp.activation_fn" for i in (0, 1)])


def vit_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k in enumerate(ks):
        result |= module(f"vit.layers.{i}.mlp.fc1", k, 8) | columns(f"vit.layers.{i}.mlp.fc2", 8, k)
    return result


class Pair(nn.Sequential):
    """Two convolutions, as at each level of a U-Net."""

    def __init__(self, inputs: int, outputs: int, tail: bool = False) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
            TailDropout(dropout_dim=1) if tail else nn.Identity(),
        )


class UNet(nn.Module):
    """The first layer's features go down and across, the second's through the bottom only."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = Pair(2, 4, tail=True)
        self.down2 = Pair(4, 6)
        self.bottom = Pair(6, 8, tail=True)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.across2 = Pair(12, 6)
        self.up1 = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.across1 = Pair(8, 4)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.across2(torch.cat([two, self.up2(x)], dim=1))
        x = self.across1(torch.cat([one, self.up1(x)], dim=1))
        return self.last(x)


def unet_shapes(k1: int, k2: int) -> Shapes:
    return (
        module("down1.3", k1, 4, 3, 3)
        | columns("down2.0", 6, k1, 3, 3)
        | columns("across1.0", 4, k1 + 4, 3, 3)  # of the 4 + 4 channels that are concatenated
        | module("bottom.3", k2, 8, 3, 3)
        | {"up2.weight": (k2, 6, 2, 2)}
    )


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        TailDropout(dropout_dim=1),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        TailDropout(dropout_dim=1),
        nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )


def autoencoder_shapes(k1: int, k2: int) -> Shapes:
    return (
        module("3", k1, 6, 3, 3)
        | {"5.weight": (k1, k2, 4, 4), "5.bias": (k2,)}
        | batch_norm("6", k2)
        | {"9.weight": (k2, 2, 4, 4)}
    )


# ---------------------------------------------------------------------------- networks for language


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=20,
    )
    model = transformers.BertForSequenceClassification(config)
    return insert(model, [f"bert.encoder.layer.{i}.intermediate" for i in (0, 1)])


def bert_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k in enumerate(ks):
        block = f"bert.encoder.layer.{i}"
        result |= module(f"{block}.intermediate.dense", k, 8)
        result |= columns(f"{block}.output.dense", 8, k)
    return result


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=20,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_inner=12,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    return insert(model, [f"transformer.h.{i}.mlp.act" for i in (0, 1)])


def gpt2_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k in enumerate(ks):  # a Conv1D is a Linear whose weight is transposed
        mlp = f"transformer.h.{i}.mlp"
        result |= {f"{mlp}.c_fc.weight": (8, k), f"{mlp}.c_fc.bias": (k,)}
        result |= {f"{mlp}.c_proj.weight": (k, 8)}
    return result


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=20,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return insert(model, [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)])


def llama_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k in enumerate(ks):
        mlp = f"model.layers.{i}.mlp"
        result |= module(f"{mlp}.gate_proj", k, 8, bias=False)
        result |= module(f"{mlp}.up_proj", k, 8, bias=False)
        result |= columns(f"{mlp}.down_proj", 8, k)
    return result


def t5(feed_forward: str) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        feed_forward_proj=feed_forward,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    td.replace_dropout(model, "*.DenseReluDense.dropout")
    return model


T5_MLPS = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]


def t5_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for mlp, k in zip(T5_MLPS, ks, strict=True):
        result |= module(f"{mlp}.wi", k, 8, bias=False) | columns(f"{mlp}.wo", 8, k)
    return result


def t5_gated_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for mlp, k in zip(T5_MLPS, ks, strict=True):
        result |= module(f"{mlp}.wi_0", k, 8, bias=False)
        result |= module(f"{mlp}.wi_1", k, 8, bias=False)
        result |= columns(f"{mlp}.wo", 8, k)
    return result


def words(samples: int) -> tuple[torch.Tensor, ...]:
    return (tokens(samples, 7),)


def words_with_padding(samples: int) -> tuple[torch.Tensor, ...]:
    mask = torch.ones(samples, 7, dtype=torch.int64)
    mask[-1, 4:] = 0
    return tokens(samples, 7), mask


def two_texts(samples: int) -> tuple[torch.Tensor, ...]:
    return *words_with_padding(samples), tokens(samples, 5)


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


# -------------------------------------------------------------------- networks for recommendation


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


def image(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda samples: (floats(samples, *shape),)


NETWORKS = {
    "ResNet": Case(
        ResNet,
        image(3, 32, 32),
        (4, 4, 4, 4, 6, 6),
        lambda a, b, c, d, e, f: (
            bottleneck_shapes("layer1.0", 8, 16, a, b)
            | bottleneck_shapes("layer1.1", 16, 16, c, d)
            | bottleneck_shapes("layer2.0", 16, 24, e, f)
        ),
        zero=False,
    ),
    "ResNet of transformers": Case(
        hf_resnet, image(3, 32, 32), (6, 6), hf_resnet_shapes, zero=False
    ),
    "ConvNeXt": Case(convnext, image(3, 16, 16), (16, 24), convnext_shapes),
    "MobileNetV2": Case(mobilenet, image(3, 32, 32), (24, 48), mobilenet_shapes, zero=False),
    "ViT": Case(vit, image(3, 8, 8), (12, 12), vit_shapes),
    "U-Net": Case(UNet, image(2, 8, 8), (4, 8), unet_shapes, zero=False),
    "autoencoder": Case(autoencoder, image(2, 12, 12), (8, 6), autoencoder_shapes, zero=False),
    "BERT": Case(bert, words_with_padding, (12, 12), bert_shapes),
    "GPT-2": Case(gpt2, words, (12, 12), gpt2_shapes, zero=False),
    "Llama": Case(llama, words, (12, 12), llama_shapes),
    "T5": Case(lambda: t5("relu"), two_texts, (12, 12), t5_shapes),
    "T5, gated": Case(lambda: t5("gated-gelu"), two_texts, (12, 12), t5_gated_shapes),
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


# -------------------------------------------------------------------------------- one thing at a time


class Wired(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in modules.items():
            self.add_module(name, child)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def wired(function: Callable[..., Any], **modules: Callable[[], nn.Module]) -> Callable[[], Wired]:
    return lambda: Wired(function, **{name: make() for name, make in modules.items()})


def channels() -> TailDropout:
    return TailDropout(dropout_dim=1)


def sequence(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in makers))


def linear(rows: int, cols: int, bias: bool = True) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(cols, rows, bias)


def conv(rows: int, cols: int, size: int = 3, **options: Any) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(cols, rows, size, **options)


class Scale(nn.Module):
    """The product with one parameter per feature, as ConvNeXt's and CaiT's LayerScale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * x


class Weight(nn.Module):
    """A parameter without a module that uses it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(shape))


class Output(nn.Module):
    """The first output of a recurrent module."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0]


class SqueezeAndExcitation(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(n, 3, 1), nn.Conv2d(3, n, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))


class Tied(nn.Module):
    """An embedding whose table computes the output too, of what stands between."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.between = between
        self.output = nn.Linear(8, 9, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.output(self.between(self.embedding(words)))


def swiglu(m: Wired, x: torch.Tensor) -> torch.Tensor:
    gate, value = m.both(x).chunk(2, dim=-1)
    return m.out(m.tail(F.silu(gate) * value))


def swiglu_by_split(m: Wired, x: torch.Tensor) -> torch.Tensor:
    both = m.both(x)
    gate, value = both.split(both.shape[-1] // 2, dim=-1)
    return m.out(m.tail(F.silu(gate) * value))


def swiglu_by_index(m: Wired, x: torch.Tensor) -> torch.Tensor:
    both = m.both(x)
    half = both.shape[-1] // 2
    return m.out(m.tail(F.silu(both[..., :half]) * both[..., half:]))


def tail_on_the_gate(m: Wired, x: torch.Tensor) -> torch.Tensor:
    gate, value = m.both(x).chunk(2, dim=-1)
    return m.out(m.tail(F.silu(gate)) * value)


def two_halves(k: int) -> Shapes:
    return module("both", 2 * k, 5) | columns("out", 3, k)


def in_and_out(k: int) -> Shapes:
    """The shapes of `inner` and `out`."""
    return module("inner", k, 5) | columns("out", 3, k)


def heads_by_einsum(m: Wired, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (torch.einsum("btc,hcd->bthd", x, w.value) for w in (m.query, m.key, m.values))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    context = m.tail(torch.einsum("bhij,bjhd->bhid", weights, v))
    return torch.einsum("bhid,hdc->bic", context, m.out.value)


def step_by_step(m: Wired, x: torch.Tensor) -> torch.Tensor:
    hidden = None
    for values in torch.sigmoid(m.tail(m.inner(x))).unbind(1):
        hidden = m.cell(values, hidden)
    return m.out(hidden[0] if isinstance(hidden, tuple) else hidden)


def shuffled_by_hand(m: Wired, x: torch.Tensor) -> torch.Tensor:
    x = m.tail(m.inner(x))
    batch, count, height, width = x.shape
    x = x.view(batch, 2, count // 2, height, width).transpose(1, 2)
    return m.out(x.reshape(batch, count, height, width))


def self_attended(m: Wired, x: torch.Tensor) -> torch.Tensor:
    h = m.tail(m.inner(x))
    return m.out(m.attention(h, h, h, need_weights=False)[0])


def cross_attended(m: Wired, x: torch.Tensor) -> torch.Tensor:
    h = m.tail(m.inner(x))
    return m.out(m.attention(m.query(x), h, h, need_weights=False)[0])


def multihead(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


def recurrent(kind: type[nn.RNNBase], *sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Output(kind(*sizes, batch_first=True, **options))


def grouped_producer(k: int) -> Shapes:
    """Groups of 4 channels that read 3 channels each: those of the first convolution go along."""
    if k % 4:
        return open_("0", "1") | columns("3", 3, k, 3, 3)
    return module("0", 3 * k // 4, 2, 3, 3) | module("1", k, 3, 3, 3) | columns("3", 3, k, 3, 3)


def grouped_consumer(k: int) -> Shapes:
    """A group of 4 channels that reads zeros alone computes constants, and goes altogether."""
    rest = module("2", 3, 4, 3, 3) | columns("3", 3, 3, 3, 3) if k <= 4 else {}
    return module("0", k, 2, 3, 3) | rest


def open_(*modules: str) -> Shapes:
    return {f"{name}.{tensor}": ANY for name in modules for tensor in ("weight", "bias")}


VECTOR, SEQUENCE, IMAGE = image(5), image(4, 5), image(2, 7, 7)

PARTS = {
    # ------------------------------------------------------------------ convolutions
    "pixel-wise convolution": Case(
        sequence(conv(8, 2), channels, nn.GELU, conv(3, 8, 1)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | columns("3", 3, k, 1, 1),
        zero=False,
    ),
    "Linear as pixel-wise convolution": Case(
        wired(
            lambda m, x: m.out(m.tail(F.gelu(m.inner(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
            inner=linear(8, 2),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        IMAGE,
        (8,),
        lambda k: module("inner", k, 2) | columns("out", 3, k),
    ),
    "depthwise convolution behind": Case(
        sequence(conv(8, 2), channels, conv(8, 8, padding=1, groups=8), nn.ReLU, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | module("2", k, 1, 3, 3) | columns("4", 3, k, 3, 3),
        zero=False,
    ),
    "depthwise convolution before": Case(
        sequence(conv(8, 2), nn.Sigmoid, conv(8, 8, padding=1, groups=8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | module("2", k, 1, 3, 3) | columns("4", 3, k, 3, 3),
        zero=False,
    ),
    "depthwise convolution with two outputs per channel": Case(
        sequence(conv(4, 2), channels, conv(8, 4, groups=4), conv(3, 8)),
        IMAGE,
        (4,),
        lambda k: (
            module("0", k, 2, 3, 3) | module("2", 2 * k, 1, 3, 3) | columns("3", 3, 2 * k, 3, 3)
        ),
        zero=False,
    ),
    "grouped convolution as producer": Case(
        sequence(conv(6, 2), conv(8, 6, groups=2), channels, conv(3, 8)),
        IMAGE,
        (8,),
        grouped_producer,
        zero=False,
    ),
    "grouped convolution as consumer": Case(
        sequence(conv(8, 2), channels, conv(6, 8, groups=2), conv(3, 6)),
        IMAGE,
        (8,),
        grouped_consumer,
        zero=False,
    ),
    "convolution, flatten, Linear": Case(
        sequence(conv(8, 2), nn.ReLU, channels, nn.Flatten, linear(3, 8 * 25)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | columns("4", 3, 25 * k),
        zero=False,
    ),
    "interpolation": Case(
        wired(
            lambda m, x: m.out(F.interpolate(m.tail(m.inner(x)), scale_factor=2)),
            inner=conv(8, 2),
            tail=channels,
            out=conv(3, 8),
        ),
        IMAGE,
        (8,),
        lambda k: module("inner", k, 2, 3, 3) | columns("out", 3, k, 3, 3),
        zero=False,
    ),
    "upsampling": Case(
        sequence(
            conv(8, 2),
            nn.Sigmoid,
            channels,
            lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv(3, 8),
        ),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | columns("4", 3, k, 3, 3),
        zero=False,
    ),
    "pixel shuffle": Case(  # four channels become one: they go together or stay
        sequence(conv(8, 2), channels, lambda: nn.PixelShuffle(2), conv(3, 2)),
        IMAGE,
        (8,),
        lambda k: open_("0", "3"),
        zero=False,
    ),
    "squeeze and excitation behind": Case(
        sequence(conv(8, 2), channels, lambda: SqueezeAndExcitation(8), conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: (
            module("0", k, 2, 3, 3)
            | columns("2.fc1", 3, k, 1, 1)
            | module("2.fc2", k, 3, 1, 1)
            | columns("3", 3, k, 3, 3)
        ),
        zero=False,
    ),
    "squeeze and excitation before": Case(  # all channels decide over each other
        sequence(conv(8, 2), lambda: SqueezeAndExcitation(8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: columns("3", 3, k, 3, 3) | open_("1.fc2"),
        stays=("fc1",),
        zero=False,
    ),
    # ------------------------------------------------------------------ norms
    "LayerNorm before": Case(
        sequence(linear(8, 5), lambda: nn.LayerNorm(8), TailDropout, linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: columns("3", 3, k),
        stays=("norm",),
    ),
    "LayerNorm behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.LayerNorm(8), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("norm",),
    ),
    "RMSNorm before": Case(
        sequence(linear(8, 5), lambda: nn.RMSNorm(8), TailDropout, linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: columns("3", 3, k),
        stays=("norm",),
    ),
    "RMSNorm behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.RMSNorm(8), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | open_("3"),  # the tail is zero behind it, too
        stays=("norm",),
    ),
    "GroupNorm before": Case(
        sequence(conv(8, 2), lambda: nn.GroupNorm(2, 8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: columns("3", 3, k, 3, 3) | ({} if k % 4 else open_("0", "1")),
        zero=False,
    ),
    "GroupNorm behind": Case(
        sequence(conv(8, 2), channels, lambda: nn.GroupNorm(2, 8), conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | ({} if k % 4 else open_("2", "3")),
        zero=False,
    ),
    "GroupNorm of one channel each": Case(
        sequence(conv(8, 2), lambda: nn.GroupNorm(8, 8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: columns("3", 3, k, 3, 3) | open_("0", "1"),
        zero=False,
    ),
    "LayerNorm along time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.LayerNorm(4, elementwise_affine=False),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        in_and_out,
        zero=False,
    ),
    "RMSNorm along time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.RMSNorm(4),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        in_and_out,
        zero=False,
    ),
    "LayerNorm along time, a bias for each time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.LayerNorm(4),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("out",),
    ),
    "softmax behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.Softmax(-1), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("softmax",),
    ),
    # ------------------------------------------------------------------ elementwise, with parameters
    "PReLU": Case(
        sequence(
            linear(8, 5),
            lambda: nn.PReLU(8),
            TailDropout,
            lambda: nn.PReLU(8),
            nn.PReLU,
            linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | {"1.weight": (k,), "3.weight": (k,)} | columns("5", 3, k),
        zero=False,
    ),
    "LayerScale": Case(
        sequence(
            linear(8, 5), lambda: Scale(8), TailDropout, lambda: Scale(8), nn.Sigmoid, linear(3, 8)
        ),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | {"1.gamma": (k,), "3.gamma": (k,)} | columns("5", 3, k),
    ),
    "SwiGLU by chunk": Case(
        wired(swiglu, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "SwiGLU by split": Case(
        wired(swiglu_by_split, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "SwiGLU by index": Case(  # the numbers in the code might be written there
        wired(swiglu_by_index, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        lambda k: columns("out", 3, k),
        stays=("slice",),
        zero=False,
    ),
    "SwiGLU, the layer on the gate": Case(
        wired(tail_on_the_gate, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "GLU": Case(
        sequence(linear(16, 5), nn.GLU, TailDropout, linear(3, 8)),
        SEQUENCE,
        (8,),
        lambda k: module("0", 2 * k, 5) | columns("3", 3, k),
        zero=False,
    ),
    "the layer before a chunk": Case(  # the tail is the end of the second half
        wired(
            lambda m, x: m.out(torch.mul(*m.tail(m.inner(x)).chunk(2, dim=-1))),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 4),
        ),
        VECTOR,
        (8,),
        lambda k: open_("inner", "out"),
    ),
    # ------------------------------------------------------------------ branches
    "concatenation": Case(
        wired(
            lambda m, x: m.out(torch.cat([m.left(x), m.tail(m.inner(x)).relu(), m.right(x)], -1)),
            left=linear(3, 5),
            inner=linear(8, 5),
            right=linear(4, 5),
            tail=TailDropout,
            out=linear(3, 15),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | columns("out", 3, 7 + k),
        zero=False,
    ),
    "concatenation of constants": Case(
        wired(
            lambda m, x: m.out(m.norm(torch.cat([m.tail(m.inner(x)).sigmoid(), m.right(x)], -1))),
            inner=linear(8, 5),
            right=linear(4, 5),
            tail=TailDropout,
            norm=lambda: nn.BatchNorm1d(12),
            out=linear(3, 12),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | batch_norm("norm", k + 4) | columns("out", 3, k + 4),
        zero=False,
    ),
    "the layer behind a concatenation": Case(
        wired(
            lambda m, x: m.out(m.tail(torch.cat([m.left(x), m.right(x)], dim=-1))),
            left=linear(3, 5),
            right=linear(5, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: (
            (module("left", k, 5) if k < 3 else {})
            | module("right", max(k - 3, 1), 5)
            | columns("out", 3, k)
        ),
        zero=False,
    ),
    "concatenation of channels": Case(
        wired(
            lambda m, x: m.out(torch.cat([x, m.tail(m.inner(x)), x], dim=1)),
            inner=conv(8, 2, padding=1),
            tail=channels,
            out=conv(3, 12),
        ),
        IMAGE,
        (8,),
        lambda k: module("inner", k, 2, 3, 3) | columns("out", 3, 4 + k, 3, 3),
        zero=False,
    ),
    "residual branch": Case(
        wired(
            lambda m, x: m.out(x + m.tail(m.inner(x))),
            inner=linear(8, 8),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        image(8),
        (8,),
        lambda k: module("inner", k, 8),
        stays=("out",),
    ),
    "residual stream": Case(
        wired(
            lambda m, x: m.out(m.tail((h := m.first(x)) + m.inner(h))),
            first=linear(8, 5),
            inner=linear(8, 8),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: columns("out", 3, k) | open_("inner"),
        stays=("inner",),
    ),
    "a sum of two producers": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x) + m.other(x.tanh()))),
            inner=linear(8, 5),
            other=linear(8, 5, bias=False),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: in_and_out(k) | module("other", k, 5, bias=False),
    ),
    "a sum of two layers": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x)) + m.tail2(m.other(x))),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
            tail2=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8, 8),
        lambda a, b: module("inner", a, 5) | module("other", b, 5) | {"out.weight": ANY},
    ),
    "several consumers": Case(
        wired(
            lambda m, x: (m.out((h := m.tail(m.inner(x))).relu()), m.other(h.sigmoid())),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
            other=linear(4, 8),
        ),
        VECTOR,
        (8,),
        lambda k: in_and_out(k) | columns("other", 4, k),
    ),
    "a consumer that is called twice": Case(
        wired(
            lambda m, x: m.out((h := m.tail(m.inner(x))).relu()) * m.out(h.tanh()),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
    ),
    "a consumer that reads something else too": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x))) * m.out(m.other(x)),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("out",),
    ),
    "features that are read past the layer": Case(
        wired(
            lambda m, x: m.out(m.tail(h := m.inner(x))) * m.other(h),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
            other=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: columns("out", 3, k),
        stays=("other",),
    ),
    "features that are the output": Case(
        sequence(linear(8, 5), TailDropout),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("output",),
    ),
    "inputs as features": Case(
        sequence(TailDropout, linear(3, 5)),
        VECTOR,
        (5,),
        lambda k: columns("1", 3, k),
        stays=("input",),
    ),
    "several layers": Case(
        sequence(
            linear(8, 5), nn.GELU, TailDropout, linear(6, 8), nn.Sigmoid, TailDropout, linear(4, 6)
        ),
        VECTOR,
        (8, 6),
        lambda a, b: module("0", a, 5) | module("3", b, a) | columns("6", 4, b),
    ),
    # ------------------------------------------------------------------ tied weights
    "tied weights that lose the same features": Case(
        lambda: Tied(TailDropout()),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: {"embedding.weight": (9, k), "output.weight": (9, k)},
        zero=False,
    ),
    "tied weights that can't agree": Case(
        lambda: Tied(nn.Sequential(TailDropout(), nn.Linear(8, 8))),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: columns("between.1", 8, k),
        stays=("output",),
    ),
    # ------------------------------------------------------------------ recurrent networks, attention
    **{
        f"{kind.__name__} as producer": Case(
            sequence(recurrent(kind, 5, 8), TailDropout, linear(3, 8)),
            SEQUENCE,
            (8,),
            lambda k: columns("2", 3, k),
            stays=(kind.__name__.lower(),),
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    **{
        f"{kind.__name__} as consumer": Case(
            sequence(linear(8, 5), TailDropout, recurrent(kind, 8, 6), linear(3, 6)),
            SEQUENCE,
            (8,),
            lambda k: module("0", k, 5) | {"2.recurrent.weight_ih_l0": ANY},
            zero=False,
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    "self-attention as consumer": Case(
        wired(
            self_attended,
            inner=linear(8, 5),
            tail=TailDropout,
            attention=multihead(),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("attention",),
    ),
    "cross-attention as consumer": Case(
        wired(
            cross_attended,
            inner=linear(6, 5),
            query=linear(8, 5),
            tail=TailDropout,
            attention=multihead(kdim=6, vdim=6),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (6,),
        lambda k: (
            module("inner", k, 5) | {"attention.k_proj_weight": ANY, "attention.v_proj_weight": ANY}
        ),
    ),
    "self-attention as producer": Case(
        wired(
            lambda m, x: m.out(m.tail(m.attention(h := m.inner(x), h, h, need_weights=False)[0])),
            inner=linear(8, 5),
            attention=multihead(),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("attention.out_proj", k, 8) | columns("out", 3, k),
        zero=False,
    ),
    "a transformer's encoder layer": Case(
        wired(
            lambda m, x: m.out(m.encoder(m.tail(m.inner(x)))),
            inner=linear(8, 5),
            tail=TailDropout,
            encoder=lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("encoder",),
    ),
    # ------------------------------------------------------------------ sums and norms
    "normalised embeddings": Case(
        wired(
            lambda m, x: m.out(F.normalize(m.tail(m.inner(x)), dim=-1)),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
        zero=False,
    ),
    "similarities of two towers": Case(
        wired(
            lambda m, x: F.cosine_similarity(
                m.tail(m.inner(x))[:, None], m.tail(m.other(x.square()))[None], dim=-1
            ),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | module("other", k, 5),
        zero=False,
    ),
    "a similarity to a tower without a layer": Case(  # whose norm needs all features
        wired(
            lambda m, x: F.cosine_similarity(m.tail(m.inner(x)), m.other(x), dim=-1),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("cosine_similarity",),
    ),
    "an inner product": Case(  # of which either factor's zeros are enough
        wired(
            lambda m, x: (m.tail(m.inner(x)) * m.other(x)).sum(-1),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | module("other", k, 5),
        zero=False,
    ),
    "a factorisation machine": Case(
        wired(
            lambda m, x: (h := m.tail(m.inner(x))).sum(1).square() - h.square().sum(1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
    ),
    "a sum of what is not zero": Case(
        wired(
            lambda m, x: torch.sigmoid(m.tail(m.inner(x))).sum(-1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("sum",),
    ),
    "a number of features that are not zero": Case(
        wired(
            lambda m, x: m.tail(torch.sigmoid(m.inner(x))).norm(0, dim=-1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("linalg_vector_norm",),
    ),
    # ------------------------------------------------------------------ other products
    "a mixture of experts by einsum": Case(
        wired(
            lambda m, x: torch.einsum(
                "beh,eho->bo", m.tail(torch.einsum("bi,eih", x, m.inner.value)), m.out.value
            ),
            inner=lambda: Weight(3, 5, 8),
            tail=TailDropout,
            out=lambda: Weight(3, 8, 2),
        ),
        VECTOR,
        (8,),
        lambda k: {"inner.value": (3, 5, k), "out.value": (3, k, 2)},
        zero=False,
    ),
    "attention heads by einsum": Case(
        wired(
            heads_by_einsum,
            query=lambda: Weight(4, 5, 3),
            key=lambda: Weight(4, 5, 3),
            values=lambda: Weight(4, 5, 3),
            tail=lambda: TailDropout(batch_dim=0, dropout_dim=1),
            out=lambda: Weight(4, 3, 5),
        ),
        SEQUENCE,
        (4,),
        lambda k: (
            {f"{name}.value": (k, 5, 3) for name in ("query", "key", "values")}
            | {"out.value": (k, 3, 5)}
        ),
        zero=False,
    ),
    "the weight of a Linear, used by itself": Case(  # where a bias would not be added
        wired(
            lambda m, x: F.linear(torch.sigmoid(m.tail(m.inner(x))), m.out.weight),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8, bias=False),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("linear",),
    ),
    "a bilinear form": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x, x)), x),
            inner=lambda: nn.Bilinear(5, 5, 8),
            tail=TailDropout,
            out=lambda: nn.Bilinear(8, 5, 3),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5, 5) | columns("out", 3, k, 5),
        zero=False,
    ),
    "weight normalisation": Case(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), TailDropout(), nn.Linear(8, 3)
        ),
        VECTOR,
        (8,),
        lambda k: (
            {"0.parametrizations.weight.original0": (k, 1)}
            | {"0.parametrizations.weight.original1": (k, 5), "0.bias": (k,)}
            | columns("2", 3, k)
        ),
        zero=False,
    ),
    "a bag of embeddings": Case(
        sequence(lambda: nn.EmbeddingBag(9, 8, mode="sum"), TailDropout, nn.Sigmoid, linear(3, 8)),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: {"0.weight": (9, k)} | columns("3", 3, k),
        zero=False,
    ),
    **{
        f"{kind.__name__} as consumer": Case(
            wired(
                step_by_step,
                inner=linear(8, 5),
                tail=TailDropout,
                cell=lambda kind=kind: kind(8, 6),
                out=linear(3, 6),
            ),
            SEQUENCE,
            (8,),
            lambda k: module("inner", k, 5) | {"cell.weight_ih": ANY},
            zero=False,
        )
        for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
    },
    # ------------------------------------------------------------------ copies and fillings
    "one gate for all features": Case(
        wired(
            lambda m, x: m.out((h := m.tail(m.inner(x))) * m.gate(x).expand_as(h)),
            inner=linear(8, 5),
            gate=linear(1, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
        zero=False,
    ),
    "filled with a number": Case(
        wired(
            lambda m, x: m.out(torch.where((h := m.tail(m.inner(x))) > 0, h, torch.ones_like(h))),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
    ),
    "shuffled channels": Case(
        sequence(conv(8, 2), channels, lambda: nn.ChannelShuffle(2), conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3),
        stays=("channel_shuffle",),
        zero=False,
    ),
    "channels shuffled by hand": Case(  # at k = 4 the small network runs, and is wrong
        wired(shuffled_by_hand, inner=conv(8, 2), tail=channels, out=conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("inner", k, 2, 3, 3),
        stays=("view",),
        zero=False,
    ),
}
