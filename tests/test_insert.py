import pytest
import torch
from torch import nn

from taildropout import TailDropout, TailMLP, tail_dropouts
from taildropout.insert import as_arguments, call


def test_layers_are_found_by_their_qualified_names_in_order():
    first, second, third = TailDropout(), TailDropout(0.1), TailDropout(0.2)
    model = nn.Sequential(first, nn.Sequential(nn.ReLU(), second), nn.ModuleDict({"x": third}))
    assert list(tail_dropouts(model).items()) == [("0", first), ("1.1", second), ("2.x", third)]


def test_a_model_that_is_a_layer_has_the_empty_name():
    layer = TailDropout()
    assert tail_dropouts(layer) == {"": layer}


def test_the_layer_of_a_tail_mlp_is_found():
    mlp = TailMLP(3, 4)
    assert tail_dropouts(nn.Sequential(mlp)) == {"0.dropout": mlp.dropout}


def test_a_model_without_layers_has_none():
    assert tail_dropouts(nn.Sequential(nn.Dropout(), nn.Linear(2, 2))) == {}


X, Y = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (X, ((X,), {})),
        ((X, Y), ((X, Y), {})),
        ([X, Y], ((X, Y), {})),
        ({"a": X, "b": Y}, ((), {"a": X, "b": Y})),
    ],
)
def test_inputs_become_arguments(inputs, expected):
    assert as_arguments(inputs) == expected


class Difference(nn.Module):
    def forward(self, a, b):
        return a - b


@pytest.mark.parametrize("inputs", [(X, Y), [X, Y], {"b": Y, "a": X}])
def test_a_model_is_called_with_them(inputs):
    assert call(Difference(), inputs).item() == 1
