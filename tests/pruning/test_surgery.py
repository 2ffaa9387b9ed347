"""Cutting modules in place, and what the pruned modules are."""

import copy

import pytest
import torch
from helpers.oracle import Net, as_trained, assert_same, chain, convs, snapshot
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


@pytest.mark.parametrize("d", [1, 2, 3])
def test_attributes_of_convolutions_and_norms(d):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1]
    model = convs(norm(4, affine=False), nn.PReLU(4), before=[norm(4), nn.PReLU()], d=d)
    small = td.prune(as_trained(model), 3, torch.randn(2, 2, *[6] * d))
    first, before, prelu, _, behind, prelus, last = small
    assert (first.in_channels, first.out_channels) == (2, 3)
    assert (last.in_channels, last.out_channels) == (3, 3)
    assert (before.num_features, behind.num_features) == (3, 3)
    assert (prelu.num_parameters, prelus.num_parameters) == (1, 3)


def test_attributes_of_linears():
    small = td.prune(chain(4, nn.ReLU()), 3, torch.randn(2, 5))
    assert repr(small) == repr(chain(3, nn.ReLU()))


BUILDS = {
    "norms": lambda n: chain(n, nn.BatchNorm1d(n), nn.Sigmoid(), before=[nn.BatchNorm1d(n)]),
    "prelu": lambda n: chain(n, nn.PReLU(n), before=[nn.PReLU(n)]),
    "flatten": lambda n: nn.Sequential(
        nn.Conv2d(2, n, 3), TailDropout(dropout_dim=1), nn.Flatten(), nn.Linear(9 * n, 3)
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_the_small_network_is_the_one_that_is_built_small(name):
    """Classes, sizes, attributes, keys and shapes; its weights load into it."""
    large, small = as_trained(BUILDS[name](4)), BUILDS[name](2)
    k = dict.fromkeys(td.tail_dropouts(large), 2)
    pruned = td.prune(large, k, torch.randn(2, *((2, 5, 5) if name == "flatten" else (5,))))
    assert repr(pruned) == repr(small)
    assert [type(m) for m in pruned.modules()] == [type(m) for m in large.modules()]
    assert list(pruned.state_dict()) == list(large.state_dict())
    small.load_state_dict(pruned.state_dict())
    assert_same(dict(small.state_dict()), dict(pruned.state_dict()))


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
