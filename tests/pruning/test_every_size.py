"""Pruned on one example, equal on every other input: of other batches, lengths and resolutions.

Each case is a network that looks prunable at the size of its example and is not, or not in that
way, at others. The oracle is the large network with k set, at each size that it takes.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.oracle import as_trained, assert_same, masked, snapshot
from helpers.sizes import (
    Do,
    K,
    M,
    assert_equal,
    assert_exact,
    converted,
    images,
    of,
    prune_or_refuse,
    sequences,
    vectors,
)
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout

# ------------------------------------------------------------------------ sequences, any function


def halve_until_one_is_left(s, x):
    h = s.h(x).cos()
    while h.shape[1] > 1:
        h = h[:, ::2]
    return s.b(h)


def recurrence(s, x):
    state = torch.zeros(len(x), 12, dtype=x.dtype)
    for i in range(x.shape[1]):
        state = (0.5 * state + s.h(x[:, i])).cos()
    return s.b(state)


def in_windows_of_four(s, x):
    h = F.pad(s.h(x).cos(), (0, 0, 0, (-x.shape[1]) % 4))
    return s.b(h.reshape(len(x), -1, 4, 12).sum(2))


def the_first_that_fits(s, x):
    for length in (2, 8):
        if x.shape[1] <= length:
            return s.b(s.h(x).cos() * length)
    return s.b(s.h(x).softmax(-1))


def causal(s, x):
    length = x.shape[1]
    mask = torch.ones(length, length, dtype=x.dtype).tril()
    return s.b(mask @ s.h(x).cos())


def cached(s, x):
    h = s.h(x).cos()
    return s.b(torch.cat([h, h[:, -1:]], 1).cumsum(1))


PATHS = {
    "compared_before_it_is_a_number": lambda s, x: s.b(
        torch.stack((s.h(x) if x.shape[1] < 3 else s.h(x).cos()).unbind(1), 1)
    ),
    "compared_before_it_is_tied": lambda s, x: s.b(
        (s.h(x) if x.shape[1] < 3 else s.h(x).cos()).reshape(-1, 7 if x.shape[1] == 7 else 1, 12)
    ),
    "softmax_if_it_is_long": lambda s, x: s.b(s.h(x).softmax(-1) if x.shape[1] > 8 else s.h(x)),
    "softmax_if_there_are_many": lambda s, x: s.b(s.h(x).softmax(-1) if len(x) > 4 else s.h(x)),
    "softmax_if_there_are_many_in_dim_0": lambda s, x: s.b(
        s.h(x).softmax(-1) if x.shape[0] > 4 else s.h(x)
    ),
    "softmax_if_there_is_one": lambda s, x: s.b(s.h(x).softmax(-1) if len(x) == 1 else s.h(x)),
    "cosine_if_there_is_one": lambda s, x: s.b(s.h(x).cos() if len(x) == 1 else s.h(x)),
    "cosine_if_it_is_short": lambda s, x: s.b(s.h(x).cos() if x.shape[1] < 3 else s.h(x)),
    "cosine_if_it_is_one": lambda s, x: s.b(s.h(x).cos() if x.shape[1] == 1 else s.h(x)),
    "cosine_if_it_is_odd": lambda s, x: s.b(s.h(x).cos() if x.shape[1] % 2 else s.h(x)),
    "cosine_if_all_are_many": lambda s, x: s.b(s.h(x).cos() if x.numel() > 50 else s.h(x)),
    "sorted_if_it_is_long": lambda s, x: s.b(s.h(x).sort(-1)[0] if x.shape[1] > 8 else s.h(x)),
    "reversed_if_long": lambda s, x: s.b(s.h(x).flip(-1) if x.shape[1] > 8 else s.h(x)),
    "more_weights_if_long": lambda s, x: s.b(s.h(x) + s.p[0] if x.shape[1] > 8 else s.h(x)),
    "not_through_the_layer": lambda s, x: s.b(s.h(x) if x.shape[1] < 9 else s.a(x)),
    "two_branches": lambda s, x: s.b(
        s.h(x).cos() if x.shape[1] > 8 else s.h(x) + 1 if len(x) > 3 else s.h(x)
    ),
    "sum_over_a_loop": lambda s, x: s.b(sum(s.h(x[:, i]).cos() for i in range(x.shape[1]))),
    "product_over_a_loop": lambda s, x: s.b(
        torch.stack([s.h(v).cos() for v in x.unbind(1)]).prod(0)
    ),
    "loop_over_the_batch": lambda s, x: s.b(sum(s.h(v).cos() for v in x)),
    "recurrence": recurrence,
    "halve_until_one_is_left": halve_until_one_is_left,
    "the_first_that_fits": the_first_that_fits,
}

NUMBERS = {
    "count_of_steps": lambda s, x: s.b(s.h(x) + sum(1 for _ in x[0])),
    "at_most_five": lambda s, x: s.b(s.h(x) + min(x.shape[1], 5)),
    "at_least_five": lambda s, x: s.b(s.h(x).cos() * max(x.shape[1], 5)),
    "clamped_by_the_length": lambda s, x: s.b(s.h(x).clamp(min=x.shape[1])),
    "plus_the_length": lambda s, x: s.b(s.h(x) + x.shape[1]),
    "plus_the_batch": lambda s, x: s.b(s.h(x) + len(x)),
    "times_the_length": lambda s, x: s.b(s.h(x).cos() * x.shape[1]),
    "to_the_power_of_the_length": lambda s, x: s.b((0.5 * s.h(x).cos()) ** x.shape[1]),
    "by_the_root_of_the_length": lambda s, x: s.b(s.h(x).cos() / x.shape[1] ** 0.5),
    "plus_all_entries": lambda s, x: s.b(s.h(x) + x.numel()),
    "full_of_the_length": lambda s, x: s.b(s.h(x) + torch.full((12,), x.shape[1] / 2).to(x)),
    "a_tensor_of_the_length": lambda s, x: s.b(s.h(x) + torch.tensor(x.shape[1]).to(x)),
    "where_it_is_long": lambda s, x: s.b(torch.where(torch.tensor(x.shape[1] > 8), 1.0, s.h(x))),
    "scale_of_attention": lambda s, x: s.b(
        F.scaled_dot_product_attention(s.h(x), s.h(x), s.h(x).cos(), scale=1 / x.shape[1])
    ),
}

CONSTANTS = {
    "positions": lambda s, x: s.b(s.h(x) + s.p[: x.shape[1]]),
    "positions_times": lambda s, x: s.b(s.h(x).cos() * s.p[: x.shape[1]]),
    "positions_by_index": lambda s, x: s.b(s.h(x) + s.e(torch.arange(x.shape[1]))),
    "buffer_of_times": lambda s, x: s.b(s.h(x) + s.times[: x.shape[1]]),
    "last_of_the_positions": lambda s, x: s.b(s.h(x) + s.p[x.shape[1] - 1]),
    "arange": lambda s, x: s.b(s.h(x) + torch.arange(x.shape[1])[:, None]),
    "linspace": lambda s, x: s.b(s.h(x) + torch.linspace(0, 1, x.shape[1]).to(x)[:, None]),
    "ones_summed": lambda s, x: s.b(s.h(x) + torch.ones_like(s.h(x)).sum(1, keepdim=True)),
    "ones_counted": lambda s, x: s.b(s.h(x).cos() * torch.ones_like(s.h(x)).cumsum(1)),
    "mask_by_arange": lambda s, x: s.b(
        s.h(x).masked_fill(torch.arange(x.shape[1])[:, None] > 3, 1.0)
    ),
    "padded_to_eight": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 0, (-x.shape[1]) % 8))),
    "padded_in_the_batch": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 0, 0, 0, (-len(x)) % 4))),
    "padded_with_a_half": lambda s, x: s.b(F.pad(s.h(x), (0, 0, 1, 1), value=0.5)),
    "padded_with_the_same": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 1, 1), value=1.0)),
    "padded_by_its_edge": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 1, 1), mode="replicate")),
    "padded_features": lambda s, x: s.b(F.pad(s.h(x).cos()[..., 1:], (1, 0))),
    "windows": in_windows_of_four,
    "causal": causal,
    "cached": cached,
}

MIXING = {
    "einsum": lambda s, x: s.b(torch.einsum("btc->bc", s.h(x).cos())),
    "einsum_over_the_batch": lambda s, x: s.b(torch.einsum("btc->tc", s.h(x).cos())),
    "einsum_with_ones": lambda s, x: s.b(
        torch.einsum("btc,bt->bc", s.h(x).cos(), torch.ones_like(x[..., 0]))
    ),
    "sum": lambda s, x: s.b(s.h(x).cos().sum(1)),
    "sum_kept": lambda s, x: s.b(s.h(x) + s.h(x).cos().sum(1, keepdim=True)),
    "sum_of_two_dims": lambda s, x: s.b(s.h(x).cos().sum((0, 1))),
    "mean": lambda s, x: s.b(s.h(x).cos().mean(1)),
    "largest": lambda s, x: s.b(s.h(x).cos().amax(1)),
    "product": lambda s, x: s.b((2 * s.h(x).cos()).prod(1)),
    "norm": lambda s, x: s.b(s.h(x).cos().norm(dim=1)),
    "norm_of_order_three": lambda s, x: s.b(s.h(x).cos().norm(3, dim=1)),
    "largest_as_norm": lambda s, x: s.b(s.h(x).cos().norm(float("inf"), dim=1)),
    "count_as_norm": lambda s, x: s.b(s.h(x).norm(0, dim=1)),
    "cumulative_sum": lambda s, x: s.b(s.h(x).cos().cumsum(1)),
    "cumulative_product": lambda s, x: s.b((2 * s.h(x).cos()).cumprod(1)),
    "cumulative_logsumexp": lambda s, x: s.b(s.h(x).logcumsumexp(1)),
    "logsumexp": lambda s, x: s.b(s.h(x).logsumexp(1)),
    "softmax_over_time": lambda s, x: s.b(s.h(x).softmax(1)),
    "log_softmax_over_time": lambda s, x: s.b(s.h(x).log_softmax(1)),
    "normalised_over_time": lambda s, x: s.b(F.normalize(s.h(x).cos(), dim=1)),
    "variance": lambda s, x: s.b(s.h(x).cos().var(1, correction=0)),
    "deviation": lambda s, x: s.b((s.h(x).cos().var(1, correction=0) + 1).sqrt()),
    "centred": lambda s, x: s.b(s.h(x).cos() - s.h(x).cos().mean(1, keepdim=True)),
    "median": lambda s, x: s.b(s.h(x).cos().median(1)[0]),
    "sum_by_matmul": lambda s, x: s.b(torch.ones_like(x[:, :, :1]).mT @ s.h(x).cos()),
    "gram_matrix": lambda s, x: s.b(s.h(x).cos().mT @ s.h(x).cos()),
    "similarities": lambda s, x: (s.h(x).cos() @ s.h(x).cos().mT).softmax(-1),
    "attention": lambda s, x: s.b(
        F.scaled_dot_product_attention(s.h(x), s.h(x).cos(), s.h(x).cos())
    ),
    "causal_attention": lambda s, x: s.b(
        F.scaled_dot_product_attention(s.h(x), s.h(x), s.h(x).cos(), is_causal=True)
    ),
    "doubled": lambda s, x: s.b(torch.cat([s.h(x), s.h(x)], 1).cos().sum(1)),
    "repeated": lambda s, x: s.b(s.h(x).cos().repeat(1, 2, 1).sum(1)),
    "expanded": lambda s, x: s.b(s.h(x[:, :1]).cos().expand(-1, x.shape[1], -1).sum(1)),
    "stacked": lambda s, x: s.b(torch.stack([s.h(x).cos(), s.h(x)]).sum(0)),
    "differences": lambda s, x: s.b(s.h(x).cos().diff(dim=1)),
    "interpolated": lambda s, x: s.b(F.interpolate(s.h(x).cos().mT, size=4, mode="linear").mT),
    "pooled": lambda s, x: s.b(F.avg_pool1d(s.h(x).cos().mT, 3, 1, 1).mT),
    "recurrent": lambda s, x: s.gru(s.h(x).cos())[0],
    "flattened": lambda s, x: s.b(s.h(x).cos().flatten(0, 1)).sum(0),
    "folded_into_the_batch": lambda s, x: s.b(s.h(x).cos().reshape(-1, 12)).view(len(x), -1, 2),
    "rows_of_the_triangle": lambda s, x: s.b(s.h(x).cos().tril()),
    "rolled": lambda s, x: s.b(s.h(x).cos().roll(1, 1) * s.h(x)),
}

OVER_THE_BATCH = {
    "sum": lambda s, x: s.b(s.h(x).cos().sum(0)),
    "softmax": lambda s, x: s.b(s.h(x).softmax(0)),
    "cumulative_sum": lambda s, x: s.b(s.h(x).cos().cumsum(0)),
    "norm": lambda s, x: s.b(s.h(x).cos().norm(dim=0)),
    "product": lambda s, x: s.b(s.h(x).cos().prod(0)),
    "variance": lambda s, x: s.b(s.h(x).cos().var(0, correction=0)),
    "logsumexp": lambda s, x: s.b(s.h(x).logsumexp(0)),
    "gram_matrix": lambda s, x: s.b(s.h(x).cos().mT @ s.h(x).cos()),
    "similarities": lambda s, x: s.b((s.h(x) @ s.h(x).mT).softmax(-1) @ s.h(x).cos()),
    "einsum": lambda s, x: s.b(torch.einsum("bi->i", s.h(x).cos())),
    "all_at_once": lambda s, x: s.b(s.h(x)) + s.h(x).cos().sum(),
    "largest_of_all": lambda s, x: s.b(s.h(x).cos() / s.h(x).cos().amax()),
    "ones_for_each": lambda s, x: s.b(torch.ones(len(x), len(x)).to(x) @ s.h(x).cos()),
    "batch_statistics": lambda s, x: s.b(F.batch_norm(s.h(x), None, None, training=True)),
    "by_the_batch": lambda s, x: s.b(s.h(x).cos() / len(x)),
    "padded": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 0, (-len(x)) % 4)))[: len(x)],
}


@of(PATHS | NUMBERS | CONSTANTS | MIXING)
@pytest.mark.parametrize("length", [7, 1, pytest.param(8, marks=pytest.mark.long)])
def test_sequences(forward, length):
    assert_exact(M(forward), (torch.randn(2, length, 3),), sequences())


@pytest.mark.long
@of(PATHS | NUMBERS | CONSTANTS | MIXING)
def test_one_sequence(forward):
    assert_exact(M(forward), (torch.randn(1, 3, 3),), sequences())


@of(OVER_THE_BATCH)
@pytest.mark.parametrize("batch", [3, 1, pytest.param(2, marks=pytest.mark.long)])
def test_over_the_batch(forward, batch):
    assert_exact(M(forward), (torch.randn(batch, 3),), vectors())


# --------------------------------------------------------------------------------------- images


BEHIND = {
    "padded": lambda: nn.Conv2d(12, 4, 3, padding=1),
    "padded_only_in_height": lambda: nn.Conv2d(12, 4, 3, padding=(1, 0)),
    "padded_by_more_than_the_kernel": lambda: nn.Conv2d(12, 4, 1, padding=1),
    "padded_with_strides": lambda: nn.Conv2d(12, 4, 3, stride=3, padding=1),
    "same": lambda: nn.Conv2d(12, 4, 3, padding="same"),
    "valid": lambda: nn.Conv2d(12, 4, 2, padding="valid"),
    "dilated": lambda: nn.Conv2d(12, 4, 2, dilation=2, padding=1),
    "without_bias": lambda: nn.Conv2d(12, 4, 2, padding=1, bias=False),
    "circular": lambda: nn.Conv2d(12, 4, 3, padding=1, padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(12, 4, 3, padding=1, padding_mode="replicate"),
    "reflect": lambda: nn.Conv2d(12, 4, 2, padding=1, padding_mode="reflect"),
    "of_one_pixel": lambda: nn.Conv2d(12, 4, 1),
    "grouped": lambda: nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), conv()),
    "transposed_with_gaps": lambda: nn.ConvTranspose2d(12, 4, 1, 2),
    "transposed_side_by_side": lambda: nn.ConvTranspose2d(12, 4, 2, 2),
    "transposed_overlapping": lambda: nn.ConvTranspose2d(12, 4, 3),
    "transposed_padded": lambda: nn.ConvTranspose2d(12, 4, 3, padding=1),
    "transposed_output_padded": lambda: nn.ConvTranspose2d(12, 4, 2, 2, output_padding=1),
    "transposed_dilated": lambda: nn.ConvTranspose2d(12, 4, 2, 2, dilation=2),
    "average_at_the_border": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), conv()),
    "average_of_what_is_there": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv()
    ),
    "average_rounded_up": lambda: nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), conv()),
    "average_rounded_up_at_the_border": lambda: nn.Sequential(
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), conv()
    ),
    "average_over_three": lambda: nn.Sequential(nn.AvgPool2d(1, divisor_override=3), conv()),
    "largest": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), conv()),
    "adaptive_average": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(3), conv()),
    "power_average": lambda: nn.Sequential(nn.LPPool2d(2, 2, ceil_mode=True), conv()),
    "padded_with_zeros": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(12, 4, 2)),
    "padded_with_a_half": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(12, 4, 2)),
    "padded_with_a_third": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.3), nn.Conv2d(12, 4, 2)),
    "larger": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv()),
    "shuffled": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)),
    "channel_norm": lambda: nn.Sequential(nn.GroupNorm(12, 12), conv()),
    "instance_norm": lambda: nn.Sequential(nn.InstanceNorm2d(12, affine=True), conv()),
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(12), conv()),
    "flattened": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 2)),
    "unfolded": lambda: nn.Sequential(nn.Unfold(1), nn.Conv1d(12, 4, 1)),
    "mean": lambda: Do(lambda h: h.mean((2, 3)), nn.Linear(12, 2)),
    "sum": lambda: Do(lambda h: h.sum((2, 3)), nn.Linear(12, 2)),
    "sum_of_rows": lambda: Do(lambda h: h.sum(2), nn.Conv1d(12, 2, 1)),
    "norm": lambda: Do(lambda h: h.flatten(2).norm(dim=2), nn.Linear(12, 2)),
    "softmax": lambda: Do(lambda h: h.flatten(2).softmax(-1), nn.Conv1d(12, 2, 1)),
    "cumulative": lambda: Do(lambda h: h.cumsum(-1), nn.Conv2d(12, 2, 1)),
    "squeeze_and_excite": lambda: Do(lambda h: h * h.sum((2, 3), True), nn.Conv2d(12, 2, 1)),
    "divided_by_the_height": lambda: Do(lambda h: h / h.shape[2], nn.Conv2d(12, 2, 1)),
    "resized_to_the_square": lambda: Do(
        lambda h: F.interpolate(h, size=(h.shape[2], h.shape[2])), nn.Conv2d(12, 2, 1)
    ),
    "padded_to_four": lambda: Do(
        lambda h: F.pad(h, (0, -h.shape[3] % 4, 0, -h.shape[2] % 4)), nn.Conv2d(12, 2, 1)
    ),
    "padded_as_its_sizes_need": lambda: Do(
        lambda h: F.pad(h, (*padding(h.shape[3]), *padding(h.shape[2]))), nn.Conv2d(12, 2, 3, 2)
    ),
    "tokens": lambda: Do(lambda h: h.flatten(2).mT.softmax(1), nn.Linear(12, 2)),
}


def padding(size):
    """Of a convolution over three entries, two apart, as TensorFlow does it."""
    along = 1 if size % 2 == 0 else max(3 - size % 2, 0)
    return along // 2, along - along // 2


def conv():
    return nn.Conv2d(12, 4, 1)


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 4)], ids="{0[0]}x{0[1]}".format)
def test_images(behind, size):
    layers = [nn.Conv2d(3, 12, 1), TailDropout(dropout_dim=1), nn.Sigmoid(), behind()]
    assert_exact(nn.Sequential(*layers), (torch.randn(2, 3, *size),), images())


OF_ONE_DIM = {
    "padded": lambda: nn.Conv1d(12, 4, 3, padding=1),
    "padded_with_strides": lambda: nn.Conv1d(12, 4, 3, stride=3, padding=1),
    "same": lambda: nn.Conv1d(12, 4, 2, padding="same"),
    "transposed_with_gaps": lambda: nn.ConvTranspose1d(12, 4, 1, 2),
    "average": lambda: nn.Sequential(nn.AvgPool1d(3, 1, 1), nn.Conv1d(12, 4, 1)),
    "zeros": lambda: nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.Conv1d(12, 4, 2)),
    "causal": lambda: Do(lambda h: F.pad(h, (2, 0)), nn.Conv1d(12, 4, 3)),
}
OF_THREE_DIMS = {
    "padded": lambda: nn.Conv3d(12, 4, 3, padding=1),
    "padded_along_one": lambda: nn.Conv3d(12, 4, (1, 1, 3), padding=(0, 0, 1)),
    "transposed_with_gaps": lambda: nn.ConvTranspose3d(12, 4, 1, 2),
    "average": lambda: nn.Sequential(nn.AvgPool3d(3, 1, 1), nn.Conv3d(12, 4, 1)),
}


@pytest.mark.parametrize("behind", OF_ONE_DIM.values(), ids=OF_ONE_DIM)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_signals(behind, size):
    layers = [nn.Conv1d(3, 12, 1), TailDropout(dropout_dim=1), nn.Sigmoid(), behind()]
    assert_exact(nn.Sequential(*layers), (torch.randn(2, 3, size),), images(d=1))


@pytest.mark.parametrize("behind", OF_THREE_DIMS.values(), ids=OF_THREE_DIMS)
@pytest.mark.parametrize("size", [1, 2])
def test_volumes(behind, size):
    layers = [nn.Conv3d(3, 12, 1), TailDropout(dropout_dim=1), nn.Sigmoid(), behind()]
    others = [(torch.randn(2, 3, *size),) for size in itertools.product([1, 2, 3, 5], repeat=3)]
    assert_exact(nn.Sequential(*layers), (torch.randn(2, 3, *[size] * 3),), others)


# -------------------------------------------------------------- widths that the code reads as numbers


def attention_with_two_heads(s, x):
    h = s.h(x).view(len(x), -1, 2, 6).transpose(1, 2)
    h = F.scaled_dot_product_attention(h, h, h.cos())
    return s.b(h.transpose(1, 2).reshape(len(x), -1, 12))


def difference_of_two_by_parity(s, x):
    h = s.h(x)
    both = [h.cos(), h.sin()]
    return s.b(both.pop(h.shape[-1] % 2) - both.pop())


WIDTHS = {
    "divided_by_the_width": lambda s, x: s.b(s.h(x) / s.h(x).shape[-1]),
    "divided_by_the_root": lambda s, x: s.b(s.h(x) * s.h(x).shape[-1] ** -0.5),
    "divided_by_out_features": lambda s, x: s.b(s.h(x) / s.a.out_features),
    "divided_by_in_features": lambda s, x: s.b(s.h(x)) / s.b.in_features,
    "divided_by_the_weight": lambda s, x: s.b(s.h(x)) / s.b.weight.shape[1],
    "divided_by_all_weights": lambda s, x: s.b(s.h(x)) / s.b.weight.numel(),
    "penalty_of_the_weights": lambda s, x: s.b(s.h(x)) + s.a.weight.square().sum(),
    "softmax_if_wide": lambda s, x: s.b(s.h(x).softmax(-1) if s.h(x).shape[-1] > 8 else s.h(x)),
    "another_sign_if_wide": lambda s, x: s.b(s.h(x) * (1 if s.h(x).shape[-1] > 8 else -1)),
    "sine_if_wide": lambda s, x: s.b((torch.sin if s.b.in_features > 8 else torch.tanh)(s.h(x))),
    "mean_over_the_width": lambda s, x: s.b(s.h(x)) + s.h(x).sum(-1, True) / s.h(x).shape[-1],
    "mean": lambda s, x: s.b(s.h(x)) + s.h(x).mean(-1, keepdim=True),
    "two_heads": attention_with_two_heads,
    "last_of_the_width": lambda s, x: s.b(s.h(x)) + s.h(x)[..., s.h(x).shape[-1] - 1 :],
    "last": lambda s, x: s.b(s.h(x)) + s.h(x)[..., -1:],
    "of_the_width": lambda s, x: s.b(s.h(x)) * torch.arange(s.h(x).shape[-1]).sum(),
    "numel": lambda s, x: s.b(s.h(x)) * (s.h(x).numel() / x.numel()),
    "strides": lambda s, x: s.b(s.h(x)) * s.h(x).stride(0),
    "wired_by_the_width": difference_of_two_by_parity,
    "ones_of_the_width": lambda s, x: s.b(s.h(x)) * torch.ones(s.h(x).shape[-1] // 4).sum(),
    "a_tensor_of_the_width": lambda s, x: s.b(s.h(x)) * torch.tensor(float(s.b.in_features)),
    "longer_than_wide": lambda s, x: s.b(s.h(x)) * (1 + (x.shape[1] > 3 + s.b.in_features)),
    "count_of_parameters": lambda s, x: s.b(s.h(x)) / sum(p.numel() for p in s.parameters()),
}


@of(WIDTHS)
@pytest.mark.parametrize("length", [7, 1])
def test_widths_that_are_read_as_numbers(forward, length):
    """The features that they count stay, so none of these is refused."""
    assert assert_exact(M(forward), (torch.randn(2, length, 3),), sequences()) is not None


def test_bytes_are_not_counted_with_symbols():
    model = M(lambda s, x: s.b(s.h(x)) * (s.h(x).nbytes / x.nbytes))
    assert_exact(model, (torch.randn(2, 7, 3),), sequences())


# ------------------------------------------------------------------------------- forms of outputs


@dataclass
class Output:
    logits: torch.Tensor
    width: int


OUTPUTS = {
    "with_the_width": lambda s, x: (s.b(s.h(x)), s.h(x).shape[-1]),
    "with_the_length": lambda s, x: (s.b(s.h(x)), x.shape[1]),
    "with_the_batch": lambda s, x: {"logits": s.b(s.h(x)), "count": len(x)},
    "with_a_scale": lambda s, x: {"logits": s.b(s.h(x)), "scale": s.b.in_features**-0.5},
    "nested": lambda s, x: {"logits": [s.b(s.h(x)), (s.h(x).mean(),)], "none": None},
    "with_a_word": lambda s, x: (s.b(s.h(x)), f"{s.h(x).shape[-1]} features"),
    "with_the_shape": lambda s, x: (s.b(s.h(x)), tuple(s.h(x).shape)),
    "with_the_features": lambda s, x: (s.b(s.h(x)), s.h(x)),
    "with_the_weight": lambda s, x: (s.b(s.h(x)), s.b.weight),
    "with_the_input": lambda s, x: (s.b(s.h(x)), x),
    "with_an_index": lambda s, x: (s.b(s.h(x)), s.h(x).argmax(-1)),
    "with_signs": lambda s, x: (s.b(s.h(x)), s.h(x) > 0),
    "twice": lambda s, x: [s.b(s.h(x))] * 2,
    "as_many_as_steps": lambda s, x: [s.b(v) for v in s.h(x).cos().unbind(1)],
    "one_if_it_is_long": lambda s, x: s.b(s.h(x)) if x.shape[1] > 8 else (s.b(s.h(x)), x.sum()),
}


@of(OUTPUTS)
def test_forms_of_outputs(forward):
    assert_exact(M(forward), (torch.randn(2, 7, 3),), sequences())


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("width", ["features", "length"])
def test_outputs_of_a_class(registered, width):
    kind = dataclass(type("Output", (), {"__annotations__": Output.__annotations__}))
    if registered:
        torch.export.register_dataclass(kind)

    def forward(s, x):
        h = s.h(x)
        return kind(s.b(h), h.shape[-1] if width == "features" else h.shape[1])

    model = M(forward)
    _, small = prune_or_refuse(model, (torch.randn(2, 7, 3),))
    for (x,) in sequences() if small is not None else []:
        x = x.double()
        expected, actual = masked(model, {"t": K}, x), copy.deepcopy(small).eval()(x)
        assert_equal((actual.logits, actual.width), (expected.logits, expected.width))


# ----------------------------------------------------------------- arguments that are no tensors


ARGUMENTS = {  # forward, the argument's name, its value in the example, and others
    "steps": (lambda s, x, n: s.b(s.h(x)[:, :n].sum(1)), "n", 3, (1, 2, 4)),
    "steps_of_ones": (lambda s, x, n: s.b(s.h(x)[:, :n].cos().sum(1)), "n", 1, (2, 3, 4)),
    "factor": (lambda s, x, n: s.b(s.h(x).cos() * n), "n", 3, (1, 2, 4)),
    "summand": (lambda s, x, n: s.b(s.h(x) + n), "n", 0, (1, -1)),
    "shift": (lambda s, x, n: s.b(s.h(x).roll(n, -1)), "n", 3, (0, 1, 4)),
    "features": (lambda s, x, n: s.b(F.pad(s.h(x)[..., :n], (0, 12 - n))), "n", 3, (1, 6, 12)),
    "repeats": (lambda s, x, n: s.b(s.h(x).repeat(1, n, 1).cos().sum(1)), "n", 1, (2, 3)),
    "dim": (lambda s, x, n: s.b(s.h(x).softmax(n)), "n", 1, (2, 0)),
    "number": (lambda s, x, n: s.b(s.h(x).cos() * n), "n", 0.5, (2.0, 1.0)),
    "deep": (
        lambda s, x, deep: s.b(s.h(x).softmax(-1) if deep else s.h(x)),
        "deep",
        False,
        (True,),
    ),
    "mode": (
        lambda s, x, mode: s.b(s.h(x).cos() if mode == "cos" else s.h(x)),
        "mode",
        "none",
        ("cos",),
    ),
    "weights": (
        lambda s, x, w: s.b(s.h(x) if w is None else s.h(x) + w),
        "w",
        None,
        (torch.randn(12), torch.randn(1)),
    ),
    "no_weights": (
        lambda s, x, w: s.b(s.h(x).cos() if w is None else s.h(x) + w),
        "w",
        torch.randn(1),
        (None,),
    ),
}


class Named(M):
    """The argument's name stands in the signature."""

    def forward(self, x, n=None, deep=None, mode=None, w=None, **other):
        given = [v for v in (n, deep, mode, w) if v is not None]
        return self.function(self, x, given[0] if given else None)


@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS)
@torch.no_grad()
def test_other_values_of_an_argument_are_right_or_named_by_a_condition(case):
    forward, name, value, others = case
    model, x = Named(forward), torch.randn(2, 7, 3).double()
    plan, small = prune_or_refuse(model, {"x": x, name: converted(value)})
    assert plan is not None
    large = copy.deepcopy(model).eval()
    large.t.set_k(K)
    small.eval()
    assert_close(small(x, **{name: converted(value)}), large(x, **{name: converted(value)}))
    wrong = []
    for other in map(converted, others):
        expected = large(x, **{name: other})
        try:
            assert_close(small(x, **{name: other}), expected, rtol=1e-9, atol=1e-10)
        except (AssertionError, RuntimeError):
            wrong.append(other)
    named = [c for c in plan.conditions if f"{name!r}" in c or f"{name} " in c or f"`{name}`" in c]
    assert named or not wrong, f"wrong at {wrong}, and no condition names {name!r}"


def test_values_must_be_finite():
    """Zero times infinity is no zero: what the large network makes of it, the small one does not."""
    model = M(lambda s, x: s.b(s.h(x) * x.sum(-1, keepdim=True)))
    plan, _ = prune_or_refuse(model, (torch.randn(2, 7, 3),))
    assert any("finite" in condition for condition in plan.conditions)


def test_an_argument_that_is_a_tensor_may_have_any_value():
    model = M(lambda s, x, scale: s.b(s.h(x).cos() * scale))
    others = [(torch.randn(2, 4, 3), torch.tensor(scale)) for scale in (0.0, 1.0, -2.0)]
    assert assert_exact(model, (torch.randn(2, 7, 3), torch.tensor(1.0)), others) is not None


# ---------------------------------------------------------------- refused without need, until now


def doubles(module, inputs, output):
    return output * 2


def with_a_hook():
    model = M(lambda s, x: s.b(s.h(x)))
    model.a.register_forward_hook(doubles)
    return model


def with_a_hook_before():
    model = M(lambda s, x: s.b(s.h(x)))
    model.b.register_forward_pre_hook(lambda module, inputs: (inputs[0].cos(),))
    return model


NO_NEED = {
    "divided_by_the_width": lambda: M(WIDTHS["divided_by_the_width"]),
    "hook": with_a_hook,
    "hook_before": with_a_hook_before,
    "if_wide": lambda: M(WIDTHS["softmax_if_wide"]),
    "sine_if_wide": lambda: M(WIDTHS["sine_if_wide"]),
    "plus_the_batch": lambda: M(lambda s, x: s.b(s.h(x) + len(s.h(x)))),
    "sum_over_the_batch": lambda: M(OVER_THE_BATCH["sum"]),
    "softmax_over_the_batch": lambda: M(OVER_THE_BATCH["softmax"]),
}


@pytest.mark.parametrize("make", NO_NEED.values(), ids=NO_NEED)
@pytest.mark.parametrize("shape", [(3, 3), (2, 7, 3)], ids=["vectors", "sequences"])
def test_what_can_be_kept_is_not_refused(make, shape):
    others = vectors() if len(shape) == 2 else sequences()
    assert assert_exact(make(), (torch.randn(shape),), others) is not None


def test_casts_inside_are_not_refused():
    """In bfloat16 the two networks round differently, so the bound is that of bfloat16."""
    model = M(lambda s, x: s.b(s.h(x).to(torch.bfloat16).cos().to(x.dtype)))
    _, small = prune_or_refuse(model, (torch.randn(2, 7, 3),))
    assert small is not None
    for (x,) in converted(sequences()):
        assert_close(small.eval()(x), masked(model, {"t": K}, x), rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------- no other exceptions


def bag(s, tokens, offsets):
    return s.b(s.t(s.bag(tokens, offsets)))


def sorted_tokens(s, tokens):
    assert bool((tokens.diff() >= 0).all()), "tokens must be sorted"
    return s.b(s.t(s.e(tokens)))


def in_range(s, x):
    assert bool((x.abs() <= 1).all()), "pixels must lie between -1 and 1"
    return s.b(s.h(x))


def in_range_or_raise(s, x):
    if not torch.all(x >= 0):
        raise ValueError("probabilities must not be negative")
    return s.b(s.h(x))


def checked_by_torch(s, x):
    torch._assert(bool((x.sum(-1) - 1).abs().max() < 1e-6), "rows must sum to one")
    return s.b(s.h(x))


def by_condition(s, x):
    return s.b(torch.cond(x.sum() > 0, lambda h: h.cos(), lambda h: h.sin(), (s.h(x),)))


def of_an_index(s, x, index):
    return s.b(s.h(x)[torch.arange(len(x)), index])


def padded_and_packed(s, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(s.h(x), lengths, batch_first=True)
    return s.gru(packed)[1][0]


def with_bag():
    model = M(bag)
    model.bag = nn.EmbeddingBag(16, 12, mode="sum")
    return model


PARTS = (torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 3]))
OTHER_PARTS = [
    (torch.tensor([1, 2, 4]), torch.tensor([0])),
    (torch.arange(11), torch.tensor([0, 1, 1, 5])),
]
PIXELS = torch.rand(2, 7, 3)
VALID = {  # model, example, others: inputs that the model checks, so random ones won't do
    "bag": (with_bag, PARTS, OTHER_PARTS),
    "sorted": (lambda: M(sorted_tokens), (torch.tensor([[1, 2, 7]]),), [(torch.tensor([[0, 9]]),)]),
    "range": (lambda: M(in_range), (PIXELS,), [(torch.rand(3, 2, 3),)]),
    "raised": (lambda: M(in_range_or_raise), (PIXELS,), [(torch.rand(3, 2, 3),)]),
    "sums": (lambda: M(checked_by_torch), (PIXELS.softmax(-1),), [(torch.rand(1, 3).softmax(-1),)]),
    "index": (
        lambda: M(of_an_index),
        (torch.randn(3, 7, 3), torch.tensor([0, 6, 2])),
        [(torch.randn(2, 4, 3), torch.tensor([0, 3]))],
    ),
    "tokens": (
        lambda: M(lambda s, tokens: s.b(s.t(s.e(tokens)))),
        (torch.tensor([[1, 15]]),),
        [(torch.tensor([[0, 3, 9]]),)],
    ),
    "packed": (
        lambda: M(padded_and_packed),
        (torch.randn(2, 7, 3), torch.tensor([7, 3])),
        [(torch.randn(3, 4, 3), torch.tensor([4, 3, 1]))],
    ),
    "condition": (lambda: M(by_condition), (PIXELS,), [(PIXELS,), (-PIXELS,), (PIXELS[:1],)]),
    "order": (
        lambda: M(lambda s, x: s.b(s.h(x).index_select(-1, s.order))),
        (PIXELS,),
        sequences(),
    ),
    "order_by_brackets": (
        lambda: M(lambda s, x: s.b(s.h(x)[..., s.order])),
        (PIXELS,),
        sequences(),
    ),
    "gathered": (
        lambda: M(lambda s, x: s.b(s.h(x).gather(-1, s.order.expand(*x.shape[:-1], -1)))),
        (PIXELS,),
        sequences(),
    ),
    "some_of_them": (
        lambda: M(lambda s, x: s.first(s.h(x).index_select(-1, s.order[:2]))),
        (PIXELS,),
        sequences(),
    ),
    "times_by_index": (
        lambda: M(lambda s, x: s.b(s.h(x) + s.p.index_select(0, torch.arange(x.shape[1])))),
        (PIXELS,),
        sequences(),
    ),
}
MAY_BE_REFUSED = {"raised", "range", "sums", "sorted", "condition", "packed"}


@pytest.mark.parametrize("name", VALID)
def test_only_what_the_model_takes_is_asked_of_it(name):
    """Models that check their inputs, and operations that want valid ones."""
    make, example, others = VALID[name]
    small = assert_exact(make(), example, others)
    assert small is not None or name in MAY_BE_REFUSED


def test_a_buffer_that_is_computed_from_a_parameter():
    model = M(lambda s, x: s.b(s.h(x) * s.scale))
    model.register_buffer("scale", (model.p * 2)[0])
    model.double()
    small = td.prune(model, K, PIXELS.double())
    x = torch.randn(5, 3, 3).double()
    model.eval().t.set_k(K)
    assert_close(small.eval()(x), model(x), rtol=1e-9, atol=1e-10)


DATA_DEPENDENT = {
    "sign": lambda s, x: s.b(s.h(x).cos() if x.sum() > 0 else s.h(x)),
    "number": lambda s, x: s.b(s.h(x) * float(x.sum())),
    "selected": lambda s, x: s.b(s.h(x)[x[..., 0] > 0]),
    "nonzero": lambda s, x: s.b(s.h(x)[0, x[0, :, 0].nonzero()[:, 0]]),
    "unique": lambda s, x: s.b(s.h(x)) + x.unique().numel(),
    "printed": lambda s, x: s.b(s.h(x * len(str(x.tolist())))),
    "numpy": lambda s, x: s.b(s.h(torch.from_numpy(x.numpy() + 1))),
    "global": lambda s, x: s.b(s.h(x)) + len(COUNTED),
}
COUNTED: list[int] = []


@of(DATA_DEPENDENT)
def test_what_depends_on_data_is_exact_or_refused(forward):
    assert_exact(M(forward), (PIXELS,), [*sequences(), (-PIXELS,), (0 * PIXELS,)])


def test_a_model_on_meta_is_refused_in_words():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 12), TailDropout(), nn.Linear(12, 2))
    with pytest.raises((PruningError, ValueError), match="meta"):
        td.prune(model, K, torch.randn(2, 3, device="meta"))


# ------------------------------------------------------------------------------ nothing changes


class Stateful(M):
    """With everything that a model may have beside its weights."""

    def __init__(self, forward: Callable) -> None:
        super().__init__(forward)
        self.config = {"width": 12, "heads": [2, 3], "dropout": 0.1}
        self.calls = nn.Dropout(0.5)
        self.short = nn.Embedding(16, 12, max_norm=0.1)
        self.norm = nn.BatchNorm1d(12)
        self.a.weight.grad = torch.randn(12, 3)
        self.b.bias.requires_grad_(False)
        self.a.register_forward_hook(doubles)
        self.b.register_full_backward_hook(lambda module, grads, outs: None)
        self.train()
        self.calls.eval()
        self.norm.eval()


def state(model):
    """All of it, and the generators' states."""
    plain = {
        name: {
            key: copy.deepcopy(value)
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | dict | tuple | None)
            and not key.startswith("_")
            and key not in ("function",)
        }
        for name, module in model.named_modules()
    }
    return {**snapshot(model), "plain": plain, "fused": torch.backends.mha.get_fastpath_enabled()}


STATES = {
    "plain": lambda s, x: s.b(s.h(x)),
    "dropout": lambda s, x: s.b(s.calls(s.h(x))),
    "batch_norm": lambda s, x: s.b(s.norm(s.h(x).mT).mT),
    "max_norm": lambda s, x: s.b(s.t(s.short((x.abs() * 4).long().clamp(max=15)[..., 0]))),
    "noise": lambda s, x: s.b(s.h(x) + torch.randn_like(x[..., :1])),
    "noise_on_features": lambda s, x: s.b(s.h(x) + torch.randn_like(s.h(x))),
    "rand": lambda s, x: s.b(s.h(x)) + torch.rand(1),
    "data": DATA_DEPENDENT["sign"],
    "softmax_if_it_is_long": PATHS["softmax_if_it_is_long"],
    "divided_by_the_width": WIDTHS["divided_by_the_width"],
    "in_place": lambda s, x: s.b(s.h(x.mul_(2))),
    "grad": lambda s, x: s.b(s.h(x.requires_grad_())),
    "fails": lambda s, x: s.b(s.h(x)) + missing,  # noqa: F821
    "mode": lambda s, x: s.b(s.h(x).cos() if s.training else s.h(x)),
    "changes_itself": lambda s, x: s.b(s.h(x)) * s.norm.running_mean.add_(1).sum(),
}


@of(STATES)
@pytest.mark.parametrize(
    "k", [K, pytest.param(0, marks=pytest.mark.long), pytest.param(12, marks=pytest.mark.long)]
)
def test_the_model_and_all_around_it_are_as_before(forward, k):
    model, x = Stateful(forward), torch.rand(2, 7, 3)
    as_trained(model)
    model.t.set_k(3)
    before, inputs = state(model), x.clone()
    try:
        plan = td.plan_pruning(model, k, x)
        assert_same(state(model), before)
        plan.apply(model)
        plan.at(4)
    except PruningError:
        pass
    assert_same(state(model), before)
    assert_close(x, inputs, rtol=0, atol=0)
    assert not x.requires_grad


def test_a_failed_apply_leaves_everything_as_before():
    model, x = Stateful(STATES["plain"]), torch.rand(2, 7, 3)
    plan = td.plan_pruning(model, K, x)
    with torch.no_grad():
        plan.model.b.weight.fill_(torch.nan)
        other = Stateful(STATES["plain"])
        other.b = nn.Linear(11, 2)
    before = state(other)
    with pytest.raises(PruningError):
        plan.apply(other)
    assert_same(state(other), before)


@pytest.mark.parametrize("k", [13, -1])
def test_a_refused_k_leaves_everything_as_before(k):
    model, x = Stateful(STATES["plain"]), torch.rand(2, 7, 3)
    before = state(model)
    with pytest.raises(ValueError, match="k"):
        td.plan_pruning(model, k, x)
    assert_same(state(model), before)
