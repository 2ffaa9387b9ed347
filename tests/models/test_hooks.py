import pytest
import torch
from torch import nn

from taildropout.models.hooks import hooked


def counts(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def network():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)  # the user's own
    return model


def test_hooks_are_there_inside_and_gone_outside():
    model, seen = network(), []
    before = counts(model)

    def look(module, args, output):
        seen.append((module, args[0].shape, output.shape))

    with hooked({model[0]: look, model[1]: look}):
        model(torch.ones(4, 2))
    model(torch.ones(4, 2))
    assert seen == [(model[0], (4, 2), (4, 3)), (model[1], (4, 3), (4, 3))]
    assert counts(model) == before


def test_what_a_hook_returns_takes_the_place_of_the_output():
    model = network()
    with hooked({model[1]: lambda module, args, output: output + 5}):
        assert model(torch.ones(1, 2)).min() >= 5


def test_before_means_before_the_call():
    model, order = network(), []
    with (
        hooked({model: lambda module, args: order.append("before")}, before=True),
        hooked({model[0]: lambda module, args, output: order.append("inside")}),
    ):
        model(torch.ones(1, 2))
    assert order == ["before", "inside"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(error):
    model = network()
    before = counts(model)

    def fail(*_):
        raise error("stop")

    with pytest.raises(error, match="stop"), hooked({model[0]: fail, model[1]: fail}):
        model(torch.ones(1, 2))
    assert counts(model) == before


class TakesNoHooks(nn.Module):
    def register_forward_hook(self, *args, **kwargs):
        raise RuntimeError("no hooks here")


def test_where_a_module_takes_no_hook_the_others_lose_theirs():
    model = network().append(TakesNoHooks())
    before = counts(model)
    with (
        pytest.raises(RuntimeError, match="no hooks here"),
        hooked(dict.fromkeys(model, lambda *_: None)),
    ):
        pass
    assert counts(model) == before
