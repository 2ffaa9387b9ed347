"""What networks of convolutions consist of."""

import torch
from helpers.zoo.case import (
    IMAGE,
    Case,
    Shapes,
    Wired,
    channels,
    columns,
    conv,
    linear,
    module,
    open_,
    sequence,
    wired,
)
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout


class SqueezeAndExcitation(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(n, 3, 1), nn.Conv2d(3, n, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))


def shuffled_by_hand(m: Wired, x: torch.Tensor) -> torch.Tensor:
    x = m.tail(m.inner(x))
    batch, count, height, width = x.shape
    x = x.view(batch, 2, count // 2, height, width).transpose(1, 2)
    return m.out(x.reshape(batch, count, height, width))


def grouped_producer(k: int) -> Shapes:
    """Groups of 4 channels that read 3 channels each: those of the first convolution go along."""
    if k % 4:
        return open_("0", "1") | columns("3", 3, k, 3, 3)
    return module("0", 3 * k // 4, 2, 3, 3) | module("1", k, 3, 3, 3) | columns("3", 3, k, 3, 3)


def grouped_consumer(k: int) -> Shapes:
    """A group of 4 channels that reads zeros alone computes constants, and goes altogether."""
    rest = module("2", 3, 4, 3, 3) | columns("3", 3, 3, 3, 3) if k <= 4 else {}
    return module("0", k, 2, 3, 3) | rest


CASES = {
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
