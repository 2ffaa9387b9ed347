"""Which tensors of a width are slices of the whole ones."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from taildropout.pruning.cuts import Cut
from taildropout.shipping.sliced import Sliced


def plan(keep):
    """Of a Linear that keeps some outputs."""

    def verified_copy(model):
        small = nn.Linear(3, len(keep))
        small.load_state_dict({name: t[list(keep)] for name, t in model.state_dict().items()})
        return small

    cuts = [Cut(name, 0, 4, keep) for name in ("weight", "bias")]
    return SimpleNamespace(cuts=cuts, rescales=[], to_linears=[], verified_copy=verified_copy)


def test_what_does_not_lie_around_the_narrower_width_is_stored_by_itself():
    model = nn.Linear(3, 4)
    sliced = Sliced(model, [plan((0, 1)), plan((1, 2, 3)), plan((0, 1, 2))])
    assert [own.keys() for own in sliced.own] == [set(), {"weight", "bias"}, set()]
    assert_close(sliced.own[1]["bias"], model.bias[1:].detach(), rtol=0, atol=0)
    added = [torch.cat([*sliced.added(i), torch.empty(0, dtype=torch.uint8)]) for i in range(3)]
    assert [len(data) for data in added] == [4 * 2 * (3 + 1), 0, 4 * (3 + 1)]


def test_other_numbers_than_those_of_the_model_are_stored_by_themselves():
    model, one = nn.Linear(3, 4), plan((0, 1))

    def with_another_bias(model):
        small = plan((0, 1)).verified_copy(model)
        small.bias.data += 1
        return small

    one.verified_copy = with_another_bias
    assert [own.keys() for own in Sliced(model, [one]).own] == [{"bias"}]
