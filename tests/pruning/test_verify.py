"""A wrong cut is caught, and the module that differs is named."""

import dataclasses

import pytest
import torch
from helpers.oracle import Net, assert_computes, assert_same, chain, masked, snapshot
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.pruning.cuts import Reading

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def with_cuts(plan, change):
    return dataclasses.replace(plan, cuts=[change(cut) for cut in plan.cuts])


PLANTED = {
    "the first rows go, not the last": lambda p: with_cuts(
        p, lambda cut: dataclasses.replace(cut, keep=(2, 3))
    ),
    "wrong columns": lambda p: with_cuts(
        p, lambda cut: dataclasses.replace(cut, keep=(1, 0) if cut.dim else cut.keep)
    ),
    "no constant": lambda p: dataclasses.replace(p, folds=[]),
    "a constant that is off by a millionth": lambda p: dataclasses.replace(
        p, folds=[dataclasses.replace(f, constant=f.constant * (1 + 1e-6)) for f in p.folds]
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_plan_is_caught(name):
    model = chain(4, nn.Sigmoid())
    wrong = PLANTED[name](td.plan_pruning(model, 2, X))
    before = snapshot(model)
    with pytest.raises(PruningError, match=r"must compute what .* with k=\{'1': 2\}, but differs"):
        wrong.apply(model)
    assert_same(snapshot(model), before)


def test_a_wrong_analysis_is_caught(monkeypatch):
    honest = Reading.find

    def lying(*args, **options):
        found = honest(*args, **options)
        cuts = [dataclasses.replace(cut, keep=(1, 2)) for cut in found.cuts]
        return dataclasses.replace(found, cuts=cuts)

    monkeypatch.setattr(Reading, "find", lying)
    with pytest.raises(PruningError, match="but differs by up to"):
        td.prune(chain(4), 2, X)


def test_inputs_that_hide_a_wrong_cut_are_not_relied_on():
    """On zeros, without biases, any two rows give the same: random inputs tell."""
    model = chain(4, bias=False)
    plan = td.plan_pruning(model, 2, torch.zeros(3, 5))
    wrong = with_cuts(plan, lambda cut: dataclasses.replace(cut, keep=(2, 3)))
    with pytest.raises(PruningError, match="but differs by up to"):
        wrong.apply(model)


def test_weights_that_changed_since_planning_are_caught():
    model = chain(4, nn.Sigmoid())
    plan = td.plan_pruning(model, 2, X)
    with torch.no_grad():
        model[-1].weight[:, 3] += 1
    with pytest.raises(
        PruningError, match="the weights have changed since plan_pruning, plan again"
    ):
        plan.apply(model)


def test_the_module_that_differs_first_is_named():
    model = nn.Sequential(nn.Linear(5, 4), TailDropout(), nn.Linear(4, 4), nn.Linear(4, 3))
    plan = td.plan_pruning(model, 2, X)
    wrong = dataclasses.replace(
        plan, cuts=[dataclasses.replace(cut, keep=(2, 3)) for cut in plan.cuts]
    )
    with pytest.raises(PruningError, match=r"k=\{'1': 2\}.* first in the output of module '2'"):
        wrong.apply(model)


class ForTwo(nn.Module):
    """Cut wrongly, it is right for batches of two samples."""

    def forward(self, x):
        return x if len(x) == 2 else 2 * x


def test_other_batch_sizes_are_verified(monkeypatch):
    model = nn.Sequential(*chain(4), ForTwo())
    plan = td.plan_pruning(model, 2, torch.zeros(2, 5))
    cut_copy = type(plan)._cut_copy

    def wrong(plan, model):
        small = cut_copy(plan, model)
        small[-1].forward = lambda x: x
        return small

    monkeypatch.setattr(type(plan), "_cut_copy", wrong)
    with pytest.raises(PruningError, match="differs by up to"):
        plan.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verification_in_a_dtype_that_is_asked_for(dtype):
    seen = []
    model = chain(4)
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    plan = td.plan_pruning(model, 2, X)
    seen.clear()
    plan.apply(model, dtype=dtype)
    assert set(seen) == {dtype}


def test_a_cut_of_one_side_only_is_caught():
    model = chain(4)
    plan = td.plan_pruning(model, 2, X)
    wrong = dataclasses.replace(plan, cuts=plan.cuts[:2])
    with pytest.raises(PruningError, match=r"the pruned network does not run: .*shapes"):
        wrong.apply(model)


OTHERS = [
    (chain(5), r"the plan cuts '0.weight' of size 4 along dim 0, and .* shape \(5, 5\)"),
    (nn.Sequential(nn.Linear(5, 4)), "the plan cuts '3.weight' .* has none"),
]


@pytest.mark.parametrize(("other", "words"), OTHERS, ids=["width", "depth"])
def test_a_plan_for_another_model(other, words):
    plan = td.plan_pruning(chain(4, nn.Sigmoid()), 2, X)
    with pytest.raises(PruningError, match=words):
        plan.apply(other)


def test_one_plan_serves_a_model_trained_further():
    """Without constants nothing of the weights is in the plan."""
    model = chain(4, nn.Tanh()).double()
    plan = td.plan_pruning(model, 2, X.double())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert_computes(plan.apply(model), model, {"1": 2}, (7, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_stays_and_is_verified(dtype):
    model = chain(4, nn.Sigmoid(), bias=False).to(dtype)
    small = td.prune(model, 2, torch.randn(3, 5, dtype=dtype)).eval()
    x = torch.randn(7, 5, dtype=dtype)
    assert {t.dtype for t in small.state_dict().values()} == {dtype}
    rounding = 8 * torch.finfo(dtype).eps
    assert_close(small(x), masked(model, {"1": 2}, x), rtol=rounding, atol=rounding)


def test_a_model_that_insists_on_its_dtype_is_verified_in_it():
    model = Net(lambda m, x: m.consumer(m.tail(m.producer(x.float())).sigmoid()))
    small = td.prune(model, 2, torch.randn(3, 5)).eval()
    x = torch.randn(7, 5)
    assert_close(small(x), masked(model, {"tail": 2}, x), rtol=1e-5, atol=1e-6)
