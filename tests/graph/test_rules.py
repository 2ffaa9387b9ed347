"""Each condition in the table of operations, by a network that would be wrong without it.

`benchmarks/mutate_rules.py` takes the conditions away one by one, and sees that a test fails.
"""

import pytest
import torch
from helpers.oracle import masked
from helpers.sizes import (
    Do,
    M,
    assert_exact,
    assert_exact_unread,
    converted,
    images,
    of,
    runs,
    sequences,
    vectors,
)
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from taildropout import TailDropout
from taildropout.pruning.cuts import Reading


def with_parts(forward, **parts):
    model = M(forward)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def mixed(s, x):
    """Constant features behind others that are not."""
    return torch.cat([s.a(x), s.h(x).cos()], -1)


def behind_dynamic_weight(s, x):
    return F.linear(s.h(x).cos(), s.b.weight * x.mean(), s.b.bias)


def shared(s, x):
    return s.b(s.h(x).cos()) + s.b(s.h(x) + 1)


def shared_with_zeros(s, x):
    return s.b(s.h(x).cos()) + s.b(s.h(x))


def weighted_by_the_input(s, x):
    return s.b(F.prelu(s.h(x) - 1, s.a(x).mean(0)))


def weighted_by_the_batch(s, x):
    weight = x.mean().expand(1)
    return s.b(F.prelu(s.h(x) - 1, weight))


def normalised_by_the_batch(s, x):
    mean, var = s.a(x).mean(0), s.a(x).var(0, correction=0) + 1
    return s.b(F.batch_norm(s.h(x) + 1, mean, var))


def two_layers_of_zeros(s, x):
    return s.b((s.h(x) / s.t(s.a(x) * 2)).nan_to_num(nan=1.0))


# Vectors: (batch, 12).
CONSTANTS = {
    "by_itself": lambda s, x: s.b((s.h(x) / s.h(x)).nan_to_num(nan=1.0)),
    "zero_by_zero": two_layers_of_zeros,
    "divided_by_zero": lambda s, x: s.b((1 / s.h(x)).clamp(-9, 9)),
    "divides": lambda s, x: s.b((s.a(x) / s.h(x)).clamp(-9, 9)),
    "logarithm_of_zero": lambda s, x: s.b(s.h(x).abs().log().clamp(min=-2.0)),
    "plus_what_is_not_constant": lambda s, x: s.b(s.h(x) + s.a(x)),
    "minus_what_is_not_constant": lambda s, x: s.b(s.a(x) - s.h(x).cos()),
    "chosen_of_two_constants": lambda s, x: s.b(
        torch.where(x.sum(-1, True) > 0, s.h(x), s.h(x).cos())
    ),
    "chosen_of_a_number": lambda s, x: s.b(torch.where(x.sum(-1, True) > 0, 0.3, s.h(x).cos())),
    "chosen_of_the_same": lambda s, x: s.b(torch.where(x.sum(-1, True) > 0, 1.0, s.h(x).cos())),
    "chosen_of_others": lambda s, x: s.b(torch.where(x.sum(-1, True) > 0, s.a(x), s.h(x))),
    "masked_by_a_number": lambda s, x: s.b(s.h(x).masked_fill(x.sum(-1, True) > 0, 0.3)),
    "masked_by_the_same": lambda s, x: s.b(s.h(x).cos().masked_fill(x.sum(-1, True) > 0, 1.0)),
    "masked_by_a_tensor": lambda s, x: s.b(s.h(x).masked_fill(x.sum(-1, True) > 0, x.mean())),
    "masked_by_a_size": lambda s, x: s.b(s.h(x).masked_fill(x.sum(-1, True) > 0, x.shape[0])),
    "sums_of_all_pairs": lambda s, x: s.b((s.h(x)[:, None] + s.h(x)[..., None]).cos().amax(2)),
    "prelu_of_the_input": weighted_by_the_input,
    "prelu_of_the_batch": weighted_by_the_batch,
    "batch_norm_of_the_input": normalised_by_the_batch,
    "batch_norm_in_training": lambda s, x: s.b(F.batch_norm(s.h(x) + 1, None, None, training=True)),
    "half_is_constant": lambda s, x: s.c(F.glu(mixed(s, x).flip(-1), dim=-1)),
    "other_half_is_constant": lambda s, x: s.c(F.glu(mixed(s, x), dim=-1)),
    "halves_are_constant": lambda s, x: s.c(F.glu(torch.cat([s.h(x) + 1, s.h(x)], -1))),
    "halves_of_another_dim": lambda s, x: s.b(
        F.glu(torch.stack([s.h(x) + 1, s.h(x).cos()], 1), dim=1)[:, 0]
    ),
    "stacked_constants": lambda s, x: s.b(torch.stack([s.h(x).cos(), s.h(x)], 1)[:, 0]),
    "stacked_apart": lambda s, x: s.b(torch.stack([s.h(x).cos(), s.h(x)], 1)),
    "concatenated_in_the_batch": lambda s, x: s.b(torch.cat([s.h(x).cos(), s.h(x)])),
    "concatenated_with_others": lambda s, x: s.b(torch.cat([s.h(x).cos(), s.a(x)])),
    "groups_of_other_constants": lambda s, x: s.b(
        (s.h(x) + s.p[0]).unflatten(-1, (2, 6)).sum(1).repeat(1, 2)
    ),
    "pairs_of_other_constants": lambda s, x: s.b(
        (s.h(x) + s.p[0]).unflatten(-1, (-1, 2)).amax(-1).repeat(1, 2)
    ),
    "shared_with_other_constants": shared,
    "shared_with_zeros": shared_with_zeros,
    "shared_with_the_same": lambda s, x: s.b(s.h(x).cos()) + s.b(s.h(2 * x).cos()),
    "bias_of_its_own_and_elsewhere": lambda s, x: s.b(s.h(x).cos()) + s.b.bias,
    "weight_behind_the_layer": lambda s, x: F.linear(s.h(x).cos(), s.t(s.b.weight), s.b.bias),
    "weight_of_the_input": behind_dynamic_weight,
    "product_with_constants": lambda s, x: s.b(s.h(x).cos() @ s.p[:12]),
    "sum_of_products": lambda s, x: s.b(s.h(x)[:, :, None].cos() @ s.p[:1] @ s.p[0]),
    "rows_of_a_table": lambda s, x: s.b(s.h(x)[:, None] + s.p),
    "entries_of_a_table": lambda s, x: s.b(s.h(x)[:, None] * s.p + s.times),
    "ones_like": lambda s, x: s.b(torch.ones_like(s.h(x)) - s.h(x)),
    "full_like_a_size": lambda s, x: s.b(torch.full_like(s.h(x), x.shape[0]) + s.h(x)),
    "full_like": lambda s, x: s.b(torch.full_like(s.h(x), 0.3) + s.h(x)),
    "full_in_half": lambda s, x: s.b(torch.full((12,), 0.3, dtype=torch.half) + s.h(x)),
    "full_like_integers": lambda s, x: s.b(torch.full_like(s.h(x).long(), 2.7) + s.h(x)),
    "full_like_in_half": lambda s, x: s.b(torch.full_like(s.h(x), 0.3, dtype=torch.half) + s.h(x)),
}


@of(CONSTANTS)
@pytest.mark.parametrize("batch", [3, 1])
def test_constants(forward, batch):
    model = with_parts(forward, c=nn.Linear(12, 2))
    small = assert_exact(model, first_that_runs(model, (batch, 3), (2, 3)), vectors())
    assert small is not None


@torch.no_grad()
def first_that_runs(model, *shapes):
    examples = [(torch.randn(shape).double(),) for shape in shapes]
    return next(example for example in examples if runs(model.double(), example))


# What mixes features: all of them are needed.
READ_AT_ONCE = {
    "smallest_as_norm": lambda s, x: s.h(x).norm(-float("inf"), dim=-1),
    "norm_of_a_negative_order": lambda s, x: (s.h(x).abs() + 0.0).norm(-1, dim=-1),
    "count_as_norm": lambda s, x: s.h(x).norm(0, dim=-1),
    "largest_as_norm": lambda s, x: s.h(x).norm(float("inf"), dim=-1),
    "norm": lambda s, x: s.h(x).norm(dim=-1),
    "sum": lambda s, x: s.h(x).sum(-1),
    "sum_of_constants": lambda s, x: s.h(x).cos().sum(-1),
    "mean": lambda s, x: s.h(x).mean(-1),
    "largest": lambda s, x: (s.h(x).abs() - 9).amax(-1),
    "product": lambda s, x: (s.h(x) + 1).prod(-1),
    "softmax": lambda s, x: s.b(s.h(x).softmax(-1)),
    "logsumexp": lambda s, x: s.h(x).logsumexp(-1),
    "variance": lambda s, x: s.h(x).var(-1),
    "cosine": lambda s, x: F.cosine_similarity(s.h(x), s.a(x).cos(), dim=-1),
    "cosine_with_constants": lambda s, x: F.cosine_similarity(s.h(x).cos(), s.a(x), dim=-1),
    "cosine_with_a_row": lambda s, x: F.cosine_similarity(s.h(x).cos(), s.a(x[:1]), dim=-1),
    "cosine_with_one_number": lambda s, x: F.cosine_similarity(s.h(x), x[:, :1], dim=-1),
    "diagonal": lambda s, x: torch.einsum("bii->bi", s.h(x)[:, :, None] * s.h(x).cos()[:, None]),
    "ellipsis": lambda s, x: torch.einsum("...i->...", s.h(x)),
    "three_factors": lambda s, x: torch.einsum("bi,bi,bi->b", s.h(x), s.h(x), s.a(x)),
    "einsum_of_constants": lambda s, x: torch.einsum("bi->b", s.h(x).cos()),
    "einsum_of_two": lambda s, x: torch.einsum("bi,bi->b", s.h(x).cos(), s.a(x)),
    "outer_product": lambda s, x: torch.einsum("bi,bj->bij", s.h(x), s.h(x)).cos().sum((1, 2)),
    "layer_norm": lambda s, x: s.b(F.layer_norm(s.h(x), (12,))),
    "rms_norm": lambda s, x: s.b(F.rms_norm(s.h(x), (12,))),
    "sorted": lambda s, x: s.b(s.h(x).sort(-1).values),
    "positions": lambda s, x: s.h(x).argmax(-1),
    "cumulative_sum": lambda s, x: s.b(s.h(x).cumsum(-1)),
    "reversed_cumulative_sum": lambda s, x: s.b(s.h(x).flip(-1).cumsum(-1)),
    "interpolated": lambda s, x: s.b(F.interpolate(s.h(x)[:, None], 12, mode="linear")[:, 0]),
    "pooled": lambda s, x: s.b(F.avg_pool1d(s.h(x)[:, None], 3, 1, 1)[:, 0]),
    "reflected": lambda s, x: s.c(F.pad(s.h(x)[:, None], (1, 1), mode="reflect")),
    "circular": lambda s, x: s.c(F.pad(s.h(x)[:, None], (1, 1), mode="circular")),
    "padded_before": lambda s, x: s.c(F.pad(s.h(x), (2, 0))),
    "padded_behind": lambda s, x: s.c(F.pad(s.h(x), (0, 2), value=0.3)),
    "rolled": lambda s, x: s.b(s.h(x).roll(1, -1)),
    "rolled_in_a_row": lambda s, x: s.b(s.h(x).roll(1)),
    "reversed": lambda s, x: s.b(s.h(x).flip(-1)),
    "every_second": lambda s, x: s.d(s.h(x)[:, ::2]),
    "last": lambda s, x: s.d(s.h(x)[:, -6:]),
    "middle": lambda s, x: s.d(s.h(x)[:, 3:9]),
    "first_of_parts": lambda s, x: s.d(s.h(x).split(6, -1)[0]),
    "second_of_parts": lambda s, x: s.d(s.h(x).split([4, 6, 2], -1)[1]),
    "second_of_chunks": lambda s, x: s.d(s.h(x).chunk(2, -1)[1]),
    "shuffled": lambda s, x: s.b(F.channel_shuffle(s.h(x)[:, :, None], 3)[..., 0]),
    "repeated": lambda s, x: s.b(s.h(x).repeat(1, 2)[:, 6:18]),
    "each_twice": lambda s, x: s.b(s.h(x).repeat_interleave(2, -1)[:, 6:18]),
    "heads": lambda s, x: s.d(s.h(x).unflatten(-1, (2, 6)).softmax(1).sum(1)),
    "written_heads": lambda s, x: s.d(s.h(x).view(-1, 2, 6).cos().sum(1)),
    "dropped_at_random": lambda s, x: s.b(F.dropout(s.h(x), 0.0, training=True)),
}


@of(READ_AT_ONCE)
def test_what_mixes_features(forward):
    parts = {"c": nn.Linear(14, 2), "d": nn.Linear(6, 2)}
    small = assert_exact(with_parts(forward, **parts), (torch.randn(3, 3),), vectors())
    assert small is not None


def heads(h):
    return h.unflatten(-1, (-1, 6)).transpose(1, 2)


def attention_with_zero_queries(s, x):
    """The second head of the queries is zero: it takes the mean of the values."""
    h = F.scaled_dot_product_attention(heads(s.h(x)), heads(s.a(x)), heads(s.a(x)))
    return s.b(h.transpose(1, 2).flatten(2))


def attention_with_zero_values(s, x):
    h = F.scaled_dot_product_attention(heads(s.a(x)), heads(s.a(x)), heads(s.h(x)))
    return s.b(h.transpose(1, 2).flatten(2))


# Sequences: constants along the features, and what mixes the others.
ALONG_OTHER_DIMS = {
    "layer_norm_over_time": lambda s, x: s.b(F.layer_norm(s.h(x).mT, (7,)).mT),
    "layer_norm_over_time_of_constants": lambda s, x: s.b(F.layer_norm(s.h(x).mT + 1, (7,)).mT),
    "layer_norm_with_another_bias": lambda s, x: s.b(s.over_time(s.h(x).mT).mT),
    "layer_norm_over_both": lambda s, x: s.b(F.layer_norm(s.h(x).cos(), (7, 12))),
    "rms_norm_over_time": lambda s, x: s.b(F.rms_norm(s.h(x).mT + 2, (7,)).mT),
    "group_norm": lambda s, x: s.b(F.group_norm(s.h(x).mT, 3).mT),
    "instance_norm": lambda s, x: s.b(F.instance_norm(s.h(x).mT + 1).mT),
    "instance_norm_over_features": lambda s, x: s.b(F.instance_norm(s.h(x) + 1)),
    "table_of_seven": lambda s, x: s.b(s.h(x) + s.seven),
    "table_of_seven_times": lambda s, x: s.b(s.h(x).cos() * s.seven),
    "column_of_seven": lambda s, x: s.b(s.h(x) + s.seven[:, :1]),
    "softmax_over_seven": lambda s, x: s.b((s.h(x) + s.seven).softmax(1)),
    "attention_of_constants": lambda s, x: s.b(
        F.scaled_dot_product_attention(s.h(x), s.h(x), s.h(x).cos())
    ),
    "attention_by_constants": lambda s, x: s.b(
        F.scaled_dot_product_attention(s.h(x).cos(), s.h(x).cos(), s.a(x))
    ),
    "attention_of_zeros": lambda s, x: s.b(F.scaled_dot_product_attention(s.a(x), s.a(x), s.h(x))),
    "attention_with_zero_queries": attention_with_zero_queries,
    "attention_with_zero_values": attention_with_zero_values,
    "products_of_rows": lambda s, x: (s.h(x).cos() @ s.a(x).mT).sum(-1),
    "products_of_columns": lambda s, x: s.b(s.a(x).mT @ s.h(x).cos()),
    "states": lambda s, x: s.gru(s.h(x) + 1)[0],
    "time_as_features": lambda s, x: s.of_seven(s.h(x).cos().mT),
    "flattened": lambda s, x: s.of_all(s.h(x).cos().flatten(1)),
    "flattened_the_other_way": lambda s, x: s.of_all(s.h(x).cos().mT.flatten(1)),
    "flattened_with_a_table": lambda s, x: s.of_all((s.h(x) + s.seven).flatten(1)),
    "windows_of_time": lambda s, x: s.b(s.h(x).cos().unfold(1, 3, 2).sum(-1)),
    "padded_in_time": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 1, 0))),
    "padded_in_time_with_the_same": lambda s, x: s.b(F.pad(s.h(x).cos(), (0, 0, 1, 0), value=1.0)),
    "padded_in_both": lambda s, x: s.c(F.pad(s.h(x).cos(), (1, 1, 1, 0), value=0.3)),
}


@of(ALONG_OTHER_DIMS)
def test_what_mixes_other_dims(forward):
    parts = {
        "c": nn.Linear(14, 2),
        "seven": nn.Parameter(torch.randn(7, 12)),
        "over_time": nn.LayerNorm(7),
        "of_seven": nn.Linear(7, 2),
        "of_all": nn.Linear(84, 2),
    }
    small = assert_exact(with_parts(forward, **parts), (torch.randn(2, 7, 3),), sequences(), 6)
    assert small is not None


class Alike(nn.Module):
    """A transposed convolution whose kernel is the same at each of its places."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4, 1, 1))
        self.bias = nn.Parameter(torch.randn(4))
        self.options = options

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(h, self.weight.expand(-1, -1, 2, 2), self.bias, **self.options)


def with_a_bias_of_zeros(module):
    del module.bias
    module.register_buffer("bias", torch.zeros(12))
    return module


IMAGES = {
    "padded": lambda: nn.Conv2d(12, 4, 3, padding=1),
    "same": lambda: nn.Conv2d(12, 4, 3, padding="same"),
    "unpadded": lambda: nn.Conv2d(12, 4, 2),
    "grouped": lambda: nn.Sequential(nn.Conv2d(12, 6, 3, groups=6), nn.Conv2d(6, 2, 1)),
    "grouped_without_bias": lambda: nn.Sequential(
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.Conv2d(12, 2, 1)
    ),
    "grouped_with_a_bias_of_zeros": lambda: nn.Sequential(
        with_a_bias_of_zeros(nn.Conv2d(12, 12, 3, padding=1, groups=12)), nn.Conv2d(12, 2, 1)
    ),
    "transposed_places_differ": lambda: nn.ConvTranspose2d(12, 4, 2, 2),
    "transposed_alike": lambda: Alike(stride=2),
    "transposed_alike_and_overlapping": lambda: Alike(stride=1),
    "transposed_alike_with_gaps": lambda: Alike(stride=3),
    "transposed_alike_and_padded": lambda: Alike(stride=2, padding=1),
    "transposed_alike_and_larger": lambda: Alike(stride=2, output_padding=1),
    "transposed_alike_and_dilated": lambda: Alike(stride=2, dilation=2),
    "average": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(12, 4, 1)),
    "average_at_the_border": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(12, 4, 1)),
    "average_rounded_up": lambda: nn.Sequential(
        nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(12, 4, 1)
    ),
    "average_over_three": lambda: nn.Sequential(
        nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(12, 4, 1)
    ),
    "largest": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(12, 4, 1)),
    "places_of_the_largest": lambda: Do(
        lambda h: F.max_pool2d(h, 2, return_indices=True)[1].to(h.dtype), nn.Conv2d(12, 4, 1)
    ),
    "instance_norm": lambda: nn.Sequential(nn.InstanceNorm2d(12, affine=True), nn.Conv2d(12, 4, 1)),
    "instance_norm_of_statistics": lambda: nn.Sequential(
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True), nn.Conv2d(12, 4, 1)
    ),
    "group_norm": lambda: nn.Sequential(nn.GroupNorm(4, 12), nn.Conv2d(12, 4, 1)),
    "shuffled_constants": lambda: nn.Sequential(
        nn.BatchNorm2d(12), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1)
    ),
    "unshuffled_constants": lambda: nn.Sequential(
        nn.BatchNorm2d(12), nn.PixelUnshuffle(2), nn.Conv2d(48, 4, 1)
    ),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 4, 1)),
    "padded_with_a_half": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(12, 4, 2)),
    "padded_with_a_third": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.3), nn.Conv2d(12, 4, 2)),
    "more_channels": lambda: Do(
        lambda h: F.pad(h, (0, 0, 0, 0, 1, 1), value=0.5), nn.Conv2d(14, 4, 2)
    ),
    "softmax_over_channels": lambda: nn.Sequential(nn.Softmax2d(), nn.Conv2d(12, 4, 1)),
}


@pytest.mark.parametrize("behind", IMAGES.values(), ids=IMAGES)
def test_images(behind):
    """At the smallest image that the network takes: there all windows may be alike."""
    model = nn.Sequential(nn.Conv2d(3, 12, 1), TailDropout(dropout_dim=1), nn.Sigmoid(), behind())
    smallest = first_that_runs(model, *((2, 3, size, size) for size in (1, 2, 3)))
    assert assert_exact(model, smallest, images()) is not None


@pytest.mark.parametrize("bias", [True, False])
def test_tied_modules_that_read_the_same_constants(bias):
    """A constant that one of them took in would be missing in the other, or be there twice."""
    model = with_parts(
        lambda s, x: s.b(s.h(x).cos()) - 2 * s.c(s.h(2 * x).cos()),
        b=nn.Linear(12, 2, bias=bias),
        c=nn.Linear(12, 2, bias=bias),
    )
    model.c.weight, model.c.bias = model.b.weight, model.b.bias
    assert_exact_unread(model, (torch.randn(3, 3),), vectors())


@pytest.mark.parametrize("bias", [True, False])
def test_zeros_in_a_grouped_convolution(bias):
    """Its bias is left of them, at the border too."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        TailDropout(dropout_dim=1),
        nn.Conv2d(12, 12, 3, padding=1, groups=6, bias=bias),
        nn.Conv2d(12, 4, 1),
    )
    small = assert_exact(model, (torch.randn(2, 3, 1, 1),), images(), 6)
    assert small[3].weight.shape[1] == 6


def test_what_is_random_is_not_cut():
    """Fewer features would draw fewer numbers."""
    model = M(lambda s, x: s.b(F.dropout(s.h(x), 0.5, training=True)))
    found = Reading(model, torch.randn(3, 3)).find({"t": 5})
    assert {cut.name for cut in found.cuts} <= {"a.weight", "a.bias"}


def test_channels_are_constant_and_positions_are_not():
    """Of as many channels as positions, between a layer for each."""
    model = nn.Sequential(
        nn.Conv1d(3, 12, 1),
        TailDropout(dropout_dim=1),
        nn.BatchNorm1d(12),
        TailDropout(dropout_dim=2),
        nn.Linear(12, 2),
    )
    others = [(torch.randn(batch, 3, 12),) for batch in (1, 2, 5)]
    assert assert_exact(model, (torch.randn(3, 3, 12),), others, {"1": 5, "3": 8}) is not None


def test_channels_are_not_constant_where_a_layer_drops_positions():
    model = nn.Sequential(
        nn.Conv1d(3, 12, 1),
        TailDropout(dropout_dim=1),
        nn.BatchNorm1d(12),
        TailDropout(dropout_dim=2),
        Do(lambda h: torch.cat([h, h[..., :1]], -1), nn.Conv1d(12, 2, 1)),
        nn.Linear(13, 2),
    )
    others = [(torch.randn(batch, 3, 12),) for batch in (1, 2, 5)]
    assert_exact_unread(model, (torch.randn(3, 3, 12),), others, {"1": 5, "3": 8})


@pytest.mark.parametrize("k", [0, 5])
def test_one_number_stands_for_all_only_where_all_are_of_it(k):
    model = M(
        lambda s, x: s.b(((s.h(x) + s.p[0])[:, None] + (s.h(x) + s.p[1])[..., None]).cos().amax(2))
    )
    assert assert_exact(model, (torch.randn(3, 3),), vectors(), k) is not None


def over_the_batch(s, x):
    """Features in the dim of the batch, and as many channels."""
    h = (s.h(x).T[:, None]).expand(-1, 12, -1)
    return s.b(s.c(h).mean(1).T)


def test_a_grouped_convolution_of_samples_that_are_zero():
    """Of them its bias is left, channel by channel."""
    model = with_parts(over_the_batch, c=nn.Conv1d(12, 12, 1, groups=12))
    assert_exact_unread(model, (torch.randn(4, 3),), vectors())


def test_a_truth_value_is_known():
    model = M(lambda s, x: s.b((~(s.h(x) > 0)).to(x.dtype)))
    assert assert_exact(model, (torch.randn(3, 3),), vectors()).b.weight.shape == (2, 5)


# ------------------------------------------- as it is cut before the small network is looked at


UNREAD = {
    "diagonal": lambda s, x: s.b(
        torch.einsum("bii->bi", s.h(x)[:, :, None] * s.h(x).cos()[:, None])
    ),
    "ellipsis": lambda s, x: torch.einsum("...i->...", s.h(x)),
    "three_factors": lambda s, x: torch.einsum("bi,bi,bi->b", s.h(x), s.h(x), s.a(x)),
    "one_for_all": lambda s, x: torch.einsum("bi,bi->b", s.h(x), x[:, :1]),
    "by_a_vector": lambda s, x: s.b((s.h(x)[:, :, None] * s.a(x)[:, None]) @ s.gate),
    "times_no_parameter": lambda s, x: s.b(s.h(x) * s.numbers),
    "called_twice": lambda s, x: s.b(s.h(x)) + s.t(s.d(x)).mean(-1, keepdim=True),
    "without_its_bias": lambda s, x: F.linear(s.h(x).cos(), s.c.weight),
    "without_its_own_bias": lambda s, x: s.without(s.h(x).cos()),
    "padded": lambda s, x: s.of_14(F.pad(s.h(x), (2, 0))),
    "one_more_number": lambda s, x: s.b(s.h(x).cos() * torch.tensor([len(x)]).to(x)),
    "interleaved": lambda s, x: s.b(torch.cat([s.h(x).cos()[:, ::2], s.h(x)[:, 1::2]], -1)),
}


class Without(nn.Linear):
    """It has a bias, and does not add it."""

    def forward(self, h):
        return F.linear(h, self.weight)


@of(UNREAD)
def test_before_the_small_network_is_read(forward):
    parts = {
        "c": nn.Linear(12, 2, bias=False),
        "d": nn.Linear(3, 12),
        "of_14": nn.Linear(14, 2),
        "without": Without(12, 2),
        "numbers": torch.randn(12).double(),
        "gate": nn.Buffer(torch.tensor([1.0, 0] * 6)),
    }
    assert_exact_unread(with_parts(forward, **parts), (torch.randn(3, 3),), vectors())


def test_what_is_filled_in_stays_and_the_rest_goes():
    """Also where it is zero in the end, since the code fills in as many."""
    model = with_parts(lambda s, x: s.c(F.pad(s.h(x), (2, 0), value=1.0) * s.gate))
    model.c = nn.Linear(14, 2)
    model.register_buffer("gate", torch.tensor([0.0, 0, *[1] * 12]))
    assert assert_exact(model, (torch.randn(3, 3),), vectors()).c.weight.shape == (2, 7)


def test_a_new_bias_has_the_rows_that_stay():
    layers = [nn.Linear(3, 12), TailDropout(), nn.Sigmoid(), nn.Linear(12, 12, bias=False)]
    model = nn.Sequential(*layers, TailDropout(), nn.Linear(12, 2))
    found = assert_exact_unread(model, (torch.randn(3, 3),), vectors())
    assert [len(fold.constant) for fold in found.folds] == [5]


def test_a_layer_keeps_a_prefix():
    """Its second feature is zero, and stays: a smaller k would mean others without it."""
    model = M(lambda s, x: s.b(s.h(x) * s.gate))
    model.register_buffer("gate", torch.tensor([1.0, 0, *[1] * 10]))
    small = assert_exact(model, (torch.randn(3, 3),), vectors())
    assert small.a.weight.shape == (5, 3)
    (x,) = converted((torch.randn(3, 3),))
    assert_close(masked(small, {"t": 3}, x), masked(model, {"t": 3}, x))


def test_a_number_that_is_drawn_is_not_constant():
    found = Reading(M(lambda s, x: s.b(s.h(x) + torch.rand(1))), torch.randn(3, 3)).find({"t": 5})
    assert {cut.name for cut in found.cuts} == {"a.weight", "a.bias"}


def test_the_norm_of_columns_needs_all_rows():
    model = M(lambda s, x: s.b(s.h(x)))
    model.a = nn.utils.parametrizations.weight_norm(model.a, dim=1)
    assert assert_exact(model, (torch.randn(3, 3),), vectors()) is not None
