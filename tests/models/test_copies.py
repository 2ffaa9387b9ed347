"""Copies that share tensors, and the names of all tensors."""

import pytest
from helpers.oracle import Net
from torch import nn

from taildropout.models.copies import structural_copy, tensors_by_name, with_own_buffers


def test_a_structural_copy_shares_tensors_but_no_modules():
    model = Net(None)
    copied = structural_copy(model)
    ours, theirs = tensors_by_name(model), tensors_by_name(copied)
    assert list(ours) == list(theirs)
    assert "mean" in ours
    assert all(theirs[name] is tensor for name, tensor in ours.items())
    assert not set(map(id, model.modules())) & set(map(id, copied.modules()))


def test_tied_tensors_have_all_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(tensors_by_name(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


class Settings:
    def __init__(self):
        self.use_cache = True


@pytest.mark.parametrize("copied", [structural_copy, with_own_buffers])
def test_a_copy_returns_no_cache_and_the_model_still_does(copied):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.config = model[1].config = Settings()
    small = copied(model)
    assert small.config is small[1].config is not model.config
    assert (small.config.use_cache, model.config.use_cache) == (False, True)
