"""Which sizes are symbols, so that one reading holds for all of them."""

import copy

import pytest
import torch
from helpers.oracle import as_trained
from helpers.sizes import K, M, assert_equal_at, assert_exact, prune_or_refuse
from torch import nn
from torch.testing import assert_close

import taildropout as td


def plan_and_check(forward, example, others):
    """The plan of a model that is exact at these other inputs, and runs at all of them."""
    model = M(forward)
    model.flat = nn.Linear(21, 3)
    plan, small = prune_or_refuse(model, example)
    assert assert_equal_at(model, small, others) == len(others)
    return plan


def assert_is_cut(plan):
    assert {(cut.name, len(cut.keep)) for cut in plan.cuts} >= {("a.weight", K), ("b.weight", K)}


def test_batches_that_only_divide_each_other_are_symbols():
    """The batch of one input is written in a view of the other, as in cross attention."""

    def forward(s, x, memory):
        keys = s.h(memory).view(len(x), -1, 12)
        return s.b(torch.softmax(s.a(x) @ keys.mT, -1) @ keys.cos())

    example = (torch.randn(2, 7, 3), torch.randn(2, 5, 3))
    others = [(torch.randn(b, 4, 3), torch.randn(b, 6, 3)) for b in (1, 3, 11)]
    plan = plan_and_check(forward, example, others)
    assert not any("dim 0" in condition for condition in plan.conditions)


def test_what_is_flattened_comes_to_a_number_and_the_batch_does_not():
    def forward(s, x):
        return s.b(s.h(s.flat(x.flatten(1))).cos())

    others = [(torch.randn(b, 7, 3),) for b in (1, 3, 11)]
    plan = plan_and_check(forward, (torch.randn(2, 7, 3),), others)
    assert_is_cut(plan)
    assert not any("dim 0" in condition for condition in plan.conditions)


def test_also_where_the_code_catches_all_exceptions():
    def forward(s, x):
        try:
            x = s.flat(x.flatten(1))
        except Exception:
            x = x.sum(1)
        return s.b(s.h(x).cos())

    others = [(torch.randn(b, 7, 3),) for b in (1, 3)]
    assert_is_cut(plan_and_check(forward, (torch.randn(2, 7, 3),), others))


def test_sizes_where_the_code_divides_by_zero_are_none_of_the_models():
    def forward(s, x):
        return s.b(s.h(x) if x.shape[1] % (len(x) - 2) else s.h(x).tanh())

    others = [(torch.randn(shape),) for shape in [(4, 8, 3), (1, 5, 3), (5, 9, 3)]]
    assert_is_cut(plan_and_check(forward, (torch.randn(4, 7, 3),), others))


def test_arguments_that_the_signature_does_not_name_have_symbols_too():
    """Wrappers hand all of them on."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    class Scaled(M):
        def forward(self, x, scale):
            return self.b(self.h(x) * scale[..., None])

    model = as_trained(Wrapper(Scaled(None))).double()
    inputs = {"scale": torch.randn(2, 7).double(), "x": torch.randn(2, 7, 3).double()}
    plan = td.plan_pruning(model, K, inputs)
    assert len(plan.reading.flow.paths.exports) == 1
    assert plan.reading.flow.paths.unread == []
    small, large = plan.apply(model).eval(), copy.deepcopy(model).eval()
    assert "forward" not in vars(small)
    assert small.model.b.weight.shape == (2, K)
    large.model.t.set_k(K)
    other = {"x": torch.randn(5, 4, 3).double(), "scale": torch.randn(5, 4).double()}
    assert_close(small(**other), large(**other), rtol=1e-9, atol=1e-10)


def test_one_of_three_lengths_is_not_one_length():
    """At lengths 8 and 7 the tail adds the same, and at 10 it does not."""

    def forward(s, x):
        h = s.h(x).cos()
        return s.b(h.sum(1) if x.shape[1] % 3 == 1 else 7 * h[:, 0])

    others = [(torch.randn(2, length, 3),) for length in (7, 9, 10, 13)]
    assert assert_exact(M(forward), (torch.randn(2, 8, 3),), others) is not None


def test_a_size_of_one_is_read_where_it_is_not_broadcast():
    """The batch of one meets three channels; three samples would meet them one by one."""

    def forward(s, x):
        h = s.h(x)
        return s.b(h) + len(x.sum(2) * x[:, :, None, 0])

    others = [(torch.randn(b, length, 3),) for b, length in [(3, 3), (1, 3), (2, 2), (5, 5)]]
    assert_exact(M(forward), (torch.randn(1, 4, 3),), others)


class BroadcastAndCounted(nn.Module):
    """The batch of one meets three channels, and is added to the features that go."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 1), nn.Conv1d(3, 2, 1)
        self.t = td.TailDropout(dropout_dim=1)

    def forward(self, x):
        h = self.t(self.a(x).var(1, correction=0) * x.sigmoid())
        return self.b(h + len(h))


def test_a_batch_of_one_that_is_broadcast_over_channels():
    others = [(torch.randn(b, 3, 5),) for b in (1, 3)]
    assert_exact(BroadcastAndCounted(), (torch.randn(1, 3, 5),), others, k=2)


def test_sizes_that_run_only_where_all_others_are_one():
    """At a width of two the layer has two features, and its k of one is not all of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.t = nn.Conv2d(3, 6, 1, bias=False), td.TailDropout()

        def forward(self, x):
            h = self.a(x)
            h = (h + h.sigmoid()).logsumexp(1)
            first = self.t(h)
            added = sum(first.select(2, i).cos() for i in range(first.shape[2]))
            return added, torch.maximum(added, h)

    others = [(torch.randn(shape),) for shape in [(7, 3, 1, 2), (1, 3, 1, 3), (4, 3, 4, 1)]]
    assert_exact(Net(), (torch.randn(8, 3, 8, 1),), others, k=1)


@pytest.mark.parametrize("taken", ["table[: x.shape[1]]", "table.cos().narrow(0, 0, len(x[0]))"])
def test_rows_of_a_table_that_are_not_taken_here_are_taken_at_other_sizes(taken):
    """A length of one is a number where it is flattened away, and so is the last row taken."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)
            self.t, self.table = td.TailDropout(), nn.Parameter(torch.randn(16, 12))

        def forward(self, x):
            h = self.t(self.a(x) + eval(taken, {"x": x, "table": self.table}))
            return self.b(h), h.flatten(1).sum(1)

    others = [(torch.randn(2, length, 3),) for length in (1, 2, 3, 7, 16)]
    small = assert_exact(Net(), (torch.randn(2, 1, 3),), others)
    assert small is not None
    assert small.table.shape == (16, K)


def test_inputs_are_left_without_marks():
    """Torch marks what it exports with, leaves that where it fails, and reads it when it compiles."""

    def forward(s, x):
        assert isinstance(x.shape[0], int), "sizes of this model can't be symbols"
        return s.b(s.h(x))

    x = torch.randn(2, 7, 3).double()
    td.plan_pruning(as_trained(M(forward)).double(), K, x)
    assert vars(x) == {}


def test_a_length_of_one_is_read_where_a_recurrent_layer_makes_lengths_numbers():
    """Torch unrolls it, and what the code compares behind it is no symbol any more."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.t, self.b = (
                nn.GRU(3, 12, batch_first=True),
                td.TailDropout(),
                nn.Linear(12, 2),
            )

        def forward(self, x):
            h = self.t(self.a(x)[0])
            return self.b(h.cos() if h.shape[1] == 1 else h)

    others = [(torch.randn(2, length, 3),) for length in (1, 2, 7, 9, 20)]
    assert_exact(Net(), (torch.randn(2, 8, 3),), others)


class BehindRecurrence(nn.Module):
    """A layer along the time of a GRU, whose lengths are numbers in an export."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.t = nn.GRU(3, 12, batch_first=True), td.TailDropout(dropout_dim=1)
        self.behind = forward

    def forward(self, x):
        return self.behind(self, self.a(x)[0])


def test_a_layer_that_has_fewer_features_only_at_a_length_of_one():
    model = BehindRecurrence(lambda s, h: s.t(h.narrow(1, 0, min(2, h.shape[1]))))
    others = [(torch.randn(2, length, 3),) for length in (1, 2, 7, 9)]
    assert_exact(model, (torch.randn(2, 8, 3),), others, k=1)


def test_a_length_that_must_be_the_size_of_the_batch():
    """Broadcast against each other, neither changes alone."""

    def forward(s, h):
        h = s.t(h)
        return torch.where(h > 0.1, h.prod(1), h.prod(1) / 2)

    others = [(torch.randn(size, size, 3),) for size in (1, 2, 7, 9)]
    assert_exact(BehindRecurrence(forward), (torch.randn(8, 8, 3),), others)


def test_what_is_left_out_at_small_lengths_behind_a_recurrent_layer():
    def forward(s, h):
        h = s.t(h)
        return s.b(h if h.shape[1] < 3 else h + 1) + 1

    model = BehindRecurrence(forward)
    model.b, model.t = nn.Linear(12, 2), td.TailDropout()
    others = [(torch.randn(2, length, 3),) for length in (1, 2, 3, 6, 8)]
    assert_exact(model, (torch.randn(2, 7, 3),), others)


def test_a_length_that_changes_with_the_batch_alone():
    """Square inputs are added to themselves across, and multiplied by their size."""

    def forward(s, h):
        h = s.t(h).cos()
        return s.b((h + h.transpose(0, 1)) * h.shape[1])

    model = BehindRecurrence(forward)
    model.b, model.t = nn.Linear(12, 2), td.TailDropout()
    others = [(torch.randn(size, size, 3),) for size in (1, 2, 7, 9)]
    assert_exact(model, (torch.randn(8, 8, 3),), others)
