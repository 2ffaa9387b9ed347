"""Which sizes are symbols, so that one reading holds for all of them."""

import copy

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
            return self.b(self.h(x) * scale)

    model = as_trained(Wrapper(Scaled(None))).double()
    inputs = {"scale": torch.randn(2, 1, 1).double(), "x": torch.randn(2, 7, 3).double()}
    plan = td.plan_pruning(model, K, inputs)
    assert len(plan.reading.flow.paths.exports) == 1
    assert plan.reading.flow.paths.unread == []
    small, large = plan.apply(model).eval(), copy.deepcopy(model).eval()
    assert "forward" not in vars(small)
    assert small.model.b.weight.shape == (2, K)
    large.model.t.set_k(K)
    other = {"x": torch.randn(5, 4, 3).double(), "scale": torch.randn(5, 4, 1).double()}
    assert_close(small(**other), large(**other), rtol=1e-9, atol=1e-10)


def test_one_of_three_lengths_is_not_one_length():
    """At lengths 8 and 7 the tail adds the same, and at 10 it does not."""

    def forward(s, x):
        h = s.h(x).cos()
        return s.b(h.sum(1) if x.shape[1] % 3 == 1 else 7 * h[:, 0])

    others = [(torch.randn(2, length, 3),) for length in (7, 9, 10, 13)]
    assert assert_exact(M(forward), (torch.randn(2, 8, 3),), others) is not None
