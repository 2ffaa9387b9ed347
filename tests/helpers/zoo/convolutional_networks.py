"""Whole networks of convolutions."""

import torch
import transformers
from helpers.zoo.case import ANY, Case, Shapes, batch_norm, columns, image, insert, module
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout


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


def mobilenet(tf_padding: bool = False) -> nn.Module:
    """Of its blocks one with a stride, one with neither stride nor branch, two with a branch."""
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.1,
        min_depth=4,
        depth_divisible_by=4,
        num_labels=5,
        tf_padding=tf_padding,
    )
    model = transformers.MobileNetV2ForImageClassification(config)
    whole = model.mobilenet_v2
    whole.layer = nn.ModuleList(whole.layer[i] for i in (1, 5, 6, 9))
    whole.conv_1x1.convolution = nn.Conv2d(12, 1280, 1, bias=False)
    # In block 0 the layer stands behind the depthwise convolution, in block 2 before it.
    places = ["mobilenet_v2.layer.0.conv_3x3", "mobilenet_v2.layer.2.expand_1x1"]
    return insert(model, places, dropout_dim=1)


def mobilenet_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k, width in zip((0, 2), ks, (4, 8), strict=True):
        block = f"mobilenet_v2.layer.{i}"
        result |= module(f"{block}.expand_1x1.convolution", k, width, 1, 1, bias=False)
        result |= batch_norm(f"{block}.expand_1x1.normalization", k)
        result |= module(f"{block}.conv_3x3.convolution", k, 1, 3, 3, bias=False)
        result |= batch_norm(f"{block}.conv_3x3.normalization", k)
        result |= columns(f"{block}.reduce_1x1.convolution", width, k, 1, 1)
        # The constants of a batch norm between the two have nowhere else to go.
        result |= {f"{block}.reduce_1x1.convolution.bias": ANY}
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


CASES = {
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
    "MobileNetV2, padded as its sizes need": Case(
        lambda: mobilenet(tf_padding=True),
        image(3, 32, 32),
        (24, 48),
        mobilenet_shapes,
        zero=False,
        long=True,
    ),
    "U-Net": Case(UNet, image(2, 8, 8), (4, 8), unet_shapes, zero=False),
    "autoencoder": Case(autoencoder, image(2, 12, 12), (8, 6), autoencoder_shapes, zero=False),
}
