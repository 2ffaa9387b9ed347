"""Checks of whole networks, beside those of `checks`."""

import copy
import pickle

import pytest
import torch
from helpers.zoo.checks import each, shapes
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import taildropout as td
from taildropout.models.inputs import call


@each("half")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_stand_alone(p, duplicate):
    twin = duplicate(p.small)
    inputs = p.case.inputs(3)
    with torch.no_grad():
        expected = p.small(*inputs)
        assert_close(twin(*inputs), expected, rtol=0, atol=0)
        for parameter in twin.parameters():
            parameter.zero_()
        for layer in td.tail_dropouts(twin).values():
            layer.set_k(0)
        assert_close(p.small(*inputs), expected, rtol=0, atol=0)


@each("half")
def test_every_parameter_of_the_small_network_learns(p):
    """Those that learn in the large one do in the small one, in training mode."""
    new = shapes(p.small).keys() - shapes(p.model).keys()  # biases that take in constants
    learning = []
    for model in (p.model, p.small):
        model = copy.deepcopy(model).train()
        outputs = tree_leaves(call(model, p.case.inputs(4)))
        sum(out.square().sum() for out in outputs if out.is_floating_point()).backward()
        learning.append({name for name, t in model.named_parameters() if t.grad is not None})
        assert all(t.grad is None or t.grad.isfinite().all() for t in model.parameters())
    assert learning[0] | new == learning[1]
