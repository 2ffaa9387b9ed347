"""Cutting modules in place, and what the pruned modules are."""

import copy

import pytest
import torch
from helpers.oracle import Net, as_trained, assert_same, chain, snapshot
from helpers.zoo.case import floats, linear, sequence, wired
from helpers.zoo.sequences import recurrent
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout
from taildropout.models.copies import structural_copy, tensors_by_name
from taildropout.pruning.cuts import Cut, Fold
from taildropout.pruning.surgery import operate


def assert_equal(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


# --- cuts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(), (2,), (0, 1), (3, 0), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_cut_keeps_the_entries_that_are_named_in_their_order(dim, keep):
    model = nn.Linear(4, 4)
    before = copy.deepcopy(model)
    operate(model, [Cut("weight", dim, 4, keep)], [])
    rows = before.weight.detach().movedim(dim, 0).tolist()
    expected = torch.tensor([rows[i] for i in keep]).reshape(len(keep), 4).movedim(0, dim)
    assert_equal(model.weight.detach(), expected)
    assert_equal(model.bias, before.bias)


def test_one_tensor_is_cut_along_two_dims():
    model = nn.Linear(4, 3, bias=False)
    weight = model.weight.detach().clone()
    operate(model, [Cut("weight", 0, 3, (0, 2)), Cut("weight", 1, 4, (1,))], [])
    assert_equal(model.weight.detach(), torch.stack([weight[0, 1:2], weight[2, 1:2]]))
    assert (model.in_features, model.out_features) == (1, 2)


def test_what_is_cut_is_new_and_the_rest_is_the_same():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    shared = structural_copy(model)
    before = snapshot(model)
    norm = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    cut = ["0.weight", "0.bias", *norm]
    operate(shared, [Cut(name, 0, 4, (0, 1)) for name in cut], [Fold("2.bias", torch.ones(2))])
    assert_same(snapshot(model), before)
    ours, theirs = tensors_by_name(model), tensors_by_name(shared)
    assert {name for name in ours if theirs[name] is not ours[name]} == {*cut, "2.bias"}


def test_a_buffer_stays_a_buffer_and_a_parameter_a_parameter():
    model = Net(lambda m, x: m.consumer(m.tail(m.producer(x) * m.scale + m.mean)))
    small = td.prune(model, 2, torch.randn(3, 5))
    assert [name for name, _ in small.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    assert [name for name, _ in small.named_buffers()] == ["mean"]
    assert "mean" not in small.state_dict()
    assert small.mean.shape == small.scale.shape == (2,)


# --- folds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_fold_is_added_to_the_bias_in_float64_and_rounded_once(dtype):
    model = nn.Linear(4, 3, dtype=dtype)
    before, constant = model.bias.detach().clone(), torch.randn(3, dtype=torch.float64)
    operate(model, [], [Fold("bias", constant)])
    assert_equal(model.bias.detach(), (before.double() + constant).to(dtype))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("module", [nn.Linear(4, 3, bias=False), nn.Conv1d(4, 3, 2, bias=False)])
def test_a_bias_is_made_where_there_is_none(module, requires_grad):
    model = copy.deepcopy(module).to(torch.bfloat16).requires_grad_(requires_grad)
    constant = torch.randn(3, dtype=torch.float64)
    operate(model, [], [Fold("bias", constant)])
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert_equal(model.bias.detach(), constant.to(torch.bfloat16))
    assert model.bias.requires_grad is requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_by_hand(bias):
    """Behind a sigmoid each feature that went was 0.5."""
    model = chain(4, nn.Sigmoid(), bias=bias)
    small = td.prune(model, 1, torch.randn(3, 5))
    w, b = model[3].weight.double(), model[3].bias.double() if bias else torch.zeros(3)
    expected = [b[j] + 0.5 * (w[j, 1] + w[j, 2] + w[j, 3]) for j in range(3)]
    assert_close(small[3].bias, torch.stack(expected).float(), rtol=1e-6, atol=1e-7)
    assert_equal(small[3].weight, model[3].weight[:, :1])
    assert_equal(small[0].weight, model[0].weight[:1])


def test_no_bias_is_made_where_nothing_is_folded():
    small = td.prune(chain(4, nn.Tanh(), bias=False), 2, torch.randn(3, 5))
    assert list(small.state_dict()) == ["0.weight", "3.weight"]
    assert small[3].bias is None


# --- the modules afterwards ---------------------------------------------------------------------


def test_a_user_written_class_stays():
    model = Net(lambda m, x: m.consumer(m.tail(m.producer(x)).relu()))
    small = td.prune(model, 2, torch.randn(3, 5))
    assert type(small) is Net
    assert list(small.state_dict()) == list(model.state_dict())
    assert (small.producer.out_features, small.consumer.in_features) == (2, 2)
    assert_equal(small.unused.weight, model.unused.weight)


def test_no_storage_is_shared():
    model = as_trained(chain(4, nn.Sigmoid(), nn.Linear(4, 4), before=[nn.BatchNorm1d(4)]))
    small = td.prune(model, 2, torch.randn(3, 5))
    ours, theirs = (
        {t.untyped_storage().data_ptr() for t in tensors_by_name(m).values()}
        for m in (model, small)
    )
    assert len(theirs) == len(tensors_by_name(small))
    assert not ours & theirs


@pytest.mark.parametrize(
    "frozen", [[], ["0.weight"], ["3.weight"], ["0.bias", "3.weight", "3.bias"]], ids=str
)
def test_requires_grad_is_kept(frozen):
    model = chain(4, nn.Sigmoid())
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    small = td.prune(model, 2, torch.randn(3, 5))
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == frozen
    assert all(p.is_leaf and p.grad is None for p in small.parameters())


def test_what_is_cut_is_contiguous_in_memory():
    small = td.prune(chain(4), 2, torch.randn(3, 5))
    assert all(p.is_contiguous() for p in small.parameters())
    assert small[2].weight.untyped_storage().nbytes() == 2 * 3 * 4


# --- p after pruning, whichever sides were cut --------------------------------------------------

SIDES = {
    "both": (sequence(linear(16, 5), TailDropout, linear(3, 16)), (5,)),
    "the consumer only": (
        sequence(recurrent(nn.GRU, 5, 16), TailDropout, linear(3, 16)),
        (1, 5),
    ),
    "the producer only": (
        wired(lambda m, x: x + m.tail(m.inner(x)), inner=linear(16, 16), tail=TailDropout),
        (16,),
    ),
}


@pytest.mark.parametrize("side", SIDES)
def test_p_is_the_same_fraction_of_what_is_left(side, assert_drawn_from):
    build, shape = SIDES[side]
    model = build().double()
    small = td.prune(model, 6, floats(2, *shape)).train()
    (layer,) = td.tail_dropouts(small).values()
    layer.stratified = False
    small(floats(4000, *shape))
    assert_drawn_from(layer.drawn_k.flatten(), td.lengths.Exponential(0.5).pmf(6))


@pytest.mark.parametrize("side", SIDES)
def test_training_drops_a_tail_of_what_is_left(side):
    """In training the small network is, sample by sample, the large one at the k drawn."""
    build, shape = SIDES[side]
    model = build().double()
    small = td.prune(model, 6, floats(2, *shape)).train()
    inputs = floats(32, *shape)
    actual = small(inputs)
    (layer,) = td.tail_dropouts(small).values()
    (large,) = td.tail_dropouts(model).values()
    with large.using_k(layer.drawn_k):
        assert_close(actual, model(inputs), rtol=1e-9, atol=1e-10)
