import pytest
import torch
from torch import nn
from torch.testing import assert_close

from taildropout.models.inputs import (
    as_arguments,
    call,
    count_samples,
    first_samples,
    of_twice_the_batch,
    pair_of,
    random_like,
    repeat_first_sample,
    tensors_of,
    to_device,
)

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


@pytest.mark.parametrize("batch", [(X, Y), [X, Y]])
def test_a_batch_is_a_pair(batch):
    assert pair_of(batch) == (X, Y)


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y), {"x": X, "y": Y}, None])
def test_what_is_no_pair_is_refused(batch):
    with pytest.raises(ValueError, match=r"must yield pairs \(inputs, target\), got "):
        pair_of(batch)


LENGTHS = torch.tensor(7)  # no samples lie along its dims: it has none
NESTED = {
    "x": torch.arange(12.0).view(4, 3),
    "more": [torch.arange(4), "text"],
    "length": LENGTHS,
    "flag": True,
}


def test_tensors_are_found_in_order():
    x, more, length = tensors_of(NESTED)
    assert x is NESTED["x"]
    assert more is NESTED["more"][0]
    assert length is LENGTHS


class Movable:
    def to(self, device):
        return f"on {device}"


def test_whatever_can_be_moved_is_moved():
    moved = to_device({"a": [Movable()], "x": torch.ones(2), "b": None, "c": "text"}, "meta")
    assert (moved["a"], moved["x"].device.type) == (["on meta"], "meta")
    assert (moved["b"], moved["c"]) == (None, "text")
    assert to_device(NESTED, None) is NESTED


@pytest.mark.parametrize(("inputs", "count"), [(NESTED, 4), ((X, Y), 1), (torch.ones(5, 0), 5)])
def test_samples_are_counted(inputs, count):
    assert count_samples(inputs) == count


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ((torch.ones(2), torch.ones(3)), r"\[2, 3\]"),
        (torch.ones(0, 2), r"\[0\]"),
        (LENGTHS, r"\[\]"),
    ],
)
def test_inputs_without_one_number_of_samples_are_refused(inputs, sizes):
    with pytest.raises(ValueError, match=f"one number of samples, got {sizes} samples"):
        count_samples(inputs)


@pytest.mark.parametrize(("take", "samples"), [(2, [0, 1]), (9, [0, 1, 2, 3])])
def test_the_first_samples(take, samples):
    assert_same_but_for_samples(first_samples(NESTED, take), samples)


def test_the_first_sample_many_times():
    assert_same_but_for_samples(repeat_first_sample(NESTED, 3), [0, 0, 0])


def test_the_batch_twice():
    assert_same_but_for_samples(of_twice_the_batch(NESTED), [0, 1, 2, 3, 0, 1, 2, 3])


def assert_same_but_for_samples(actual, samples):
    assert_close(actual["x"], NESTED["x"][samples])
    assert_close(actual["more"][0], NESTED["more"][0][samples])
    assert (actual["more"][1], actual["length"], actual["flag"]) == ("text", LENGTHS, True)
    assert list(actual) == list(NESTED)


def test_twice_the_batch_leaves_what_has_another_length():
    """The first tensor says how many samples there are: a mask of positions has none."""
    x, mask = of_twice_the_batch((torch.ones(2, 3), torch.ones(3, 3)))
    assert (x.shape, mask.shape) == ((4, 3), (3, 3))
    assert of_twice_the_batch((LENGTHS, "text")) == (LENGTHS, "text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_random_numbers_are_gaussian_and_always_the_same(dtype):
    like = torch.zeros(200, 50, dtype=dtype)
    values = random_like(like)
    assert (values.shape, values.dtype) == (like.shape, dtype)
    assert_close(values.abs().double().square().mean().item(), 1.0, rtol=0.05, atol=0)
    torch.rand(1)
    assert torch.equal(random_like(like), values)


def test_random_integers_and_flags_occurred_already():
    tokens = torch.tensor([[3, 900], [3, 41]])
    many = random_like(tokens.repeat(100, 1))
    assert set(many.flatten().tolist()) == {3, 900, 41}
    assert random_like(torch.ones(5, dtype=torch.bool)).all()
    assert random_like(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2)
    assert random_like("text") == "text"
