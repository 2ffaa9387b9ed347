"""Architectures, small and random: those of torchvision by hand, those of transformers as they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from helpers.zoo.case import with_random_weights
from torch import nn

Place = tuple[str, str, int, int, str]


@dataclass(frozen=True)
class Architecture:
    """A model and what can be nested in it.

    Attributes:
        build: makes the model.
        inputs: for a number of samples and another size, random ones.
        sizes: the example's, and others.
        places: module, side, n, multiple_of and kind of each, in order.
        positions: of the places with several layers, how many.
        reasons: words of why there is no other, by place.
        streams: whether residual streams are asked for.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    sizes: tuple[tuple[int, ...], ...]
    places: list[Place]
    positions: dict[str, int]
    reasons: dict[str, str]
    streams: bool = False

    def make(self) -> nn.Module:
        """With random weights, in float64."""
        return with_random_weights(self.build()).double().eval()


# ------------------------------------------------------------------------------ inputs


def vectors(samples: int) -> torch.Tensor:
    return torch.randn(samples, 5, dtype=torch.float64)


def images(samples: int, size: int) -> torch.Tensor:
    return torch.randn(samples, 3, size, size, dtype=torch.float64)


def pixels(samples: int, size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": images(samples, size)}


def words(samples: int, length: int) -> torch.Tensor:
    return torch.randint(3, 50, (samples, length))


def text(samples: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": words(samples, length)}


def two_texts(samples: int, length: int) -> dict[str, torch.Tensor]:
    return {**text(samples, length), "decoder_input_ids": words(samples, length + 1)}


# ------------------------------------------------------------------------------ by hand


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 3)
    )


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def conv(before: int, after: int, size: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, bias=False, **options)


class Block(nn.Module):
    """Of a ResNet: two convolutions, or with `bottleneck` three."""

    def __init__(self, before: int, after: int, stride: int = 1, bottleneck: int = 0) -> None:
        super().__init__()
        inner = bottleneck or after
        self.conv1 = conv(before, inner, 1) if bottleneck else conv(before, inner, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(inner)
        if bottleneck:
            self.conv3, self.bn3 = conv(inner, after, 1), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                conv(before, after, 1, stride=stride), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, layer1: nn.Module, layer2: nn.Module, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = layer1, layer2
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def resnet() -> nn.Module:
    return ResNet(nn.Sequential(Block(6, 6), Block(6, 6)), nn.Sequential(Block(6, 10, 2)), 10)


def resnet_of_bottlenecks() -> nn.Module:
    stage = nn.Sequential(Block(6, 12, bottleneck=4), Block(12, 12, bottleneck=4))
    return ResNet(stage, nn.Sequential(Block(12, 10, 2, bottleneck=5)), 10)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(n, n, 7, padding=3, groups=n)
        self.norm = nn.LayerNorm(n)
        self.pwconv1 = nn.Linear(n, 4 * n)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * n, n)
        self.layer_scale = nn.Parameter(torch.full((n, 1, 1), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.layer_scale * self.pwconv2(self.act(self.pwconv1(h))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6)),
        ConvNeXtBlock(6),
        nn.Sequential(LayerNorm2d(6), nn.Conv2d(6, 8, 2, 2)),
        ConvNeXtBlock(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(LayerNorm2d(8), nn.Flatten(), nn.Linear(8, 4)),
    )


def twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.pool = twice(3, 4), twice(4, 6), nn.MaxPool2d(2)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, 2), twice(8, 5)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x)
        up = self.up(self.down2(self.pool(skip)))
        return self.out(self.last(torch.cat([skip, up], 1)))


# ------------------------------------------------------------------------------ of transformers


class Logits(nn.Module):
    """A model of transformers, of which only the logits are asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs, use_cache=False).logits


TRANSFORMER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def vit() -> nn.Module:
    config = transformers.ViTConfig(**TRANSFORMER, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**TRANSFORMER, **TEXT)
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, n_inner=20
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TRANSFORMER, **TEXT, num_key_value_heads=2, head_dim=6)
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return Logits(transformers.T5ForConditionalGeneration(config))


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=2,
        mlp_ratio=1.5,
    )
    return transformers.SwinForImageClassification(config)


# ------------------------------------------------------------------------------ all of them


def blocks(*places: tuple[str, str, int, int, str], count: int = 2) -> list[Place]:
    """The same places in each block: `{}` is its number."""
    return [(name.format(i), *rest) for i in range(count) for name, *rest in places]


def hidden(name: str, n: int = 20) -> Place:
    return name, "input", n, 1, "hidden"


def heads(name: str, n: int = 16, multiple_of: int = 4) -> Place:
    return name, "input", n, multiple_of, "heads"


def channels(name: str, n: int, at: str = "input") -> Place:
    return name, at, n, 1, "channels"


MEAN = "subtracts the mean over all n features"

ARCHITECTURES = {
    "MLP": Architecture(
        mlp,
        vectors,
        ((2,), (1,), (5,)),
        [hidden("2", 12), hidden("4", 8)],
        {},
        {"output of 4": "must keep its shape"},
    ),
    "LSTM tagger": Architecture(
        Tagger,
        words,
        ((2, 7), (1, 1), (3, 9)),
        [("lstm", "input", 8, 1, "embedding")],
        {},
        {"output of lstm": "lstm in module 'lstm' computes all features or none"},
    ),
    "ResNet": Architecture(
        resnet,
        images,
        ((2, 32), (3, 21)),
        [
            ("bn1", "output", 6, 1, "stream"),
            channels("layer1.0.conv2", 6),
            channels("layer1.1.conv2", 6),
            channels("layer2.0.conv2", 10),
            channels("fc", 10),
        ],
        {"bn1": 3},
        {},
        streams=True,
    ),
    "ResNet of bottlenecks": Architecture(
        resnet_of_bottlenecks,
        images,
        ((2, 32), (3, 21)),
        [
            channels("bn1", 6, "output"),
            channels("layer1.0.conv2", 4),
            channels("layer1.0.conv3", 4),
            channels("layer1.1.conv2", 4),
            channels("layer1.1.conv3", 4),
            channels("layer2.0.conv2", 5),
            channels("layer2.0.conv3", 5),
            channels("fc", 10),
        ],
        {},
        {"output of layer1.0.bn3": "2 more modules write to these features: with streams=True"},
    ),
    "ConvNeXt": Architecture(
        convnext,
        images,
        ((2, 32), (3, 48)),
        [hidden("1.pwconv2", 24), hidden("3.pwconv2", 32)],
        {},
        {"output of 0.0": MEAN},
    ),
    "U-Net": Architecture(
        UNet,
        images,
        ((2, 16), (3, 12)),
        [
            channels("down1.3", 4),
            channels("down1.4", 4, "output"),
            channels("down2.3", 6),
            channels("up", 6),
            channels("up", 4, "output"),
            channels("last.3", 5),
            channels("out", 5),
        ],
        {},
        {},
    ),
    "ViT": Architecture(
        vit,
        pixels,
        ((2,), (5,)),
        blocks(heads("vit.layers.{}.attention.o_proj"), hidden("vit.layers.{}.mlp.fc2")),
        {},
        {"output of vit.embeddings.patch_embeddings.projection": MEAN},
    ),
    "BERT": Architecture(
        bert,
        text,
        ((2, 7), (3, 11)),
        [
            *blocks(
                heads("bert.encoder.layer.{}.attention.output.dense"),
                hidden("bert.encoder.layer.{}.output.dense"),
            ),
            hidden("classifier", 16),
        ],
        {},
        {"output of bert.embeddings.word_embeddings": MEAN},
    ),
    "GPT-2": Architecture(
        gpt2,
        text,
        ((2, 7), (3, 11)),
        blocks(heads("transformer.h.{}.attn.c_proj"), hidden("transformer.h.{}.mlp.c_proj")),
        {},
        {"output of transformer.wte": MEAN},
    ),
    "Llama": Architecture(
        llama,
        text,
        ((2, 7), (3, 11)),
        [
            ("model.embed_tokens", "output", 16, 1, "stream"),
            *blocks(
                heads("model.layers.{}.self_attn.o_proj", 24, 12),
                hidden("model.layers.{}.mlp.down_proj"),
            ),
        ],
        {"model.embed_tokens": 5},
        {},
        streams=True,
    ),
    "T5": Architecture(
        t5,
        two_texts,
        ((2, 7), (3, 11)),
        [
            ("model.encoder.embed_tokens", "output", 16, 1, "stream"),
            heads("model.encoder.block.0.layer.0.SelfAttention.o", 24, 6),
            *blocks(hidden("model.encoder.block.{}.layer.1.DenseReluDense.wo")),
            heads("model.decoder.block.0.layer.0.SelfAttention.o", 24, 6),
            heads("model.decoder.block.0.layer.1.EncDecAttention.o", 24, 6),
            *blocks(hidden("model.decoder.block.{}.layer.2.DenseReluDense.wo")),
        ],
        {
            "model.encoder.embed_tokens": 12,
            "model.encoder.block.0.layer.0.SelfAttention.o": 2,
            "model.decoder.block.0.layer.0.SelfAttention.o": 2,
            "model.decoder.block.0.layer.1.EncDecAttention.o": 2,
        },
        {},
        streams=True,
    ),
    "Swin": Architecture(
        swin,
        pixels,
        ((2,), (5,)),
        [
            heads("swin.encoder.layers.0.blocks.0.attention.o_proj", 8),
            hidden("swin.encoder.layers.0.blocks.0.mlp.fc2", 12),
            heads("swin.encoder.layers.1.blocks.0.attention.o_proj", 16),
            hidden("swin.encoder.layers.1.blocks.0.mlp.fc2", 24),
        ],
        {},
        {"output of swin.embeddings.patch_embeddings.projection": MEAN},
    ),
}
