import copy
import io
import math
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, stack_module_state
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from taildropout import TailDropout
from taildropout.functional import keep_prefix, tail_dropout
from taildropout.layers.fitted import FittedTailDropout
from taildropout.lengths import Exponential, Full, InGroups, LogUniform, Mixed, Sizes, Uniform

BATCH, FEATURES = 500, 20


def assert_equal(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def lengths_of(output, dim=-1):
    """How many features of each sample are not zero; for an input without zeros this is k."""
    return output.ne(0).sum(dim)


def assert_drops(layer, p):
    """Stratified draws miss the mean of a monotone function, here the fraction, by 1 / batch."""
    dropped = 1 - lengths_of(layer(torch.ones(BATCH, FEATURES))).double().mean() / FEATURES
    assert abs(dropped.item() - p) < 1 / BATCH + 1e-12


def model_with(dropout):
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), dropout, nn.Linear(8, 3))


# --- mode by mode -----------------------------------------------------------------------------


def test_training_is_the_function_of_the_same_name():
    x = torch.randn(6, 5, 7, 9)
    layer = TailDropout(0.3, [0, 2], 1, lengths=Uniform(min_k=2), stratified=False)
    torch.manual_seed(1)
    expected = tail_dropout(x, 0.3, True, [0, 2], 1, lengths=Uniform(min_k=2), stratified=False)
    torch.manual_seed(1)
    assert_equal(layer(x), expected)


def test_training_draws_a_fresh_k_for_each_sample_in_each_call(assert_drawn_from):
    layer = TailDropout(0.3)
    x = torch.ones(10_000, FEATURES)
    first, second = lengths_of(layer(x)), lengths_of(layer(x))
    for k in (first, second):
        assert_drawn_from(k, Exponential(0.3).pmf(FEATURES))
    assert not torch.equal(first, second)


def test_p_is_one_half_by_default():
    assert TailDropout().p == 0.5
    assert_drops(TailDropout(), 0.5)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_eval_returns_the_input_itself(dtype, inplace):
    x = torch.ones(3, 4, dtype=dtype)
    assert TailDropout(inplace=inplace).eval()(x) is x
    assert_equal(x, torch.ones(3, 4, dtype=dtype))


BOTH_MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@BOTH_MODES
@pytest.mark.parametrize("k", [0, 2, 4, torch.tensor(2)], ids=str)
def test_a_set_k_keeps_the_first_k_features_without_scaling(k, training):
    x = torch.randn(3, 4)
    layer = TailDropout().train(training)
    layer.set_k(k)
    expected = x.clone()
    expected[:, int(k) :] = 0
    assert_equal(layer(x), expected)


@BOTH_MODES
def test_a_set_tensor_has_one_k_per_sample(training):
    layer = TailDropout().train(training)
    layer.set_k(torch.tensor([0, 4, 1]))
    expected = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert_equal(layer(torch.ones(3, 4)), expected)


@pytest.mark.parametrize("batch_dim", [(0, 1), (1, 0), (-3, -2), (-2, 0)])
def test_a_set_tensor_is_indexed_by_the_batch_dims_in_their_order(batch_dim):
    x = torch.randn(2, 3, 6)
    k = torch.arange(6).reshape([x.shape[d] for d in batch_dim])
    layer = TailDropout(batch_dim=batch_dim)
    layer.set_k(k)
    output = layer(x)
    for i in range(2):
        for j in range(3):
            index = {0: i, 1: j}
            expected = x[i, j].clone()
            expected[k[tuple(index[d % 3] for d in batch_dim)] :] = 0
            assert_equal(output[i, j], expected)


def test_a_set_tensor_is_shared_along_the_dims_that_are_neither_batch_nor_features():
    x = torch.ones(2, 6, 3)
    layer = TailDropout(batch_dim=-1, dropout_dim=1)
    layer.set_k(torch.tensor([5, 0, 2]))
    assert lengths_of(layer(x), dim=1).tolist() == [[5, 0, 2], [5, 0, 2]]


@pytest.mark.parametrize("batch_dim", [0, [0, 1], ()])
def test_a_tensor_without_dims_is_one_k_for_all_samples(batch_dim):
    layer = TailDropout(batch_dim=batch_dim)
    layer.set_k(torch.tensor(2))
    assert_equal(lengths_of(layer(torch.ones(2, 3, 4))), torch.full((2, 3), 2))


@BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_any_dtype_passes_with_k_set(dtype, training):
    layer = TailDropout().train(training)
    layer.set_k(1)
    expected = torch.tensor([[1, 0, 0]]).to(dtype)
    assert_equal(layer(torch.ones(1, 3, dtype=dtype)), expected)


def as_list(k):
    return k.tolist() if isinstance(k, torch.Tensor) else k


@pytest.mark.parametrize("k", [2, torch.tensor([0, 3, 1])], ids=["int", "tensor"])
def test_k_is_what_was_set(k):
    layer = TailDropout()
    assert layer.k is None
    layer.set_k(k)
    assert as_list(layer.k) == as_list(k)


@pytest.mark.parametrize("k", [2, torch.tensor([0, 3, 1])], ids=["int", "tensor"])
@pytest.mark.parametrize(
    "clear",
    [
        lambda model: model[2].set_k(None),
        lambda model: model[2].train(),
        lambda model: model[2].eval(),
        lambda model: model.train(),
        lambda model: model.eval(),
    ],
    ids=["set_k(None)", "train", "eval", "parent's train", "parent's eval"],
)
@BOTH_MODES
def test_k_is_cleared(training, clear, k):
    model = model_with(TailDropout()).train(training)
    model[2].set_k(k)
    clear(model)
    assert model[2].k is None
    assert_drops(model[2].train(), 0.5)
    x = torch.ones(3, 8)
    assert model[2].eval()(x) is x


def test_train_and_eval_return_the_layer():
    layer = TailDropout()
    assert layer.train() is layer
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training


# --- using_k ----------------------------------------------------------------------------------


@BOTH_MODES
@pytest.mark.parametrize("before", [None, 3, torch.tensor([3, 1])], ids=["none", "int", "tensor"])
def test_using_k_holds_inside_and_restores_what_was_set(before, training):
    layer = TailDropout().train(training)
    layer.set_k(before)
    with layer.using_k(2) as inside:
        assert inside is layer
        assert lengths_of(layer(torch.ones(2, 4))).tolist() == [2, 2]
    assert as_list(layer.k) == as_list(before)
    assert layer.training is training


def test_using_k_nests():
    layer, x, seen = TailDropout().eval(), torch.ones(2, 4), []
    with layer.using_k(3):
        with layer.using_k(torch.tensor([0, 1])):
            with layer.using_k(None):
                assert layer(x) is x
            seen.append(lengths_of(layer(x)).tolist())
        seen.append(lengths_of(layer(x)).tolist())
    assert layer(x) is x
    assert seen == [[0, 1], [3, 3]]


@pytest.mark.parametrize("before", [None, 3])
def test_using_k_restores_after_an_exception(before):
    layer = TailDropout()
    layer.set_k(before)
    with pytest.raises(KeyboardInterrupt), layer.using_k(2):
        raise KeyboardInterrupt
    assert layer.k == before


def test_using_k_restores_what_was_set_also_where_the_mode_changes_inside():
    layer = TailDropout()
    layer.set_k(3)
    with layer.using_k(2):
        layer.eval()
    assert layer.k == 3


# --- multiple_of --------------------------------------------------------------------------------


def test_with_multiple_of_whole_groups_are_drawn_and_p_is_exact(assert_drawn_from):
    layer = TailDropout(0.3, multiple_of=4)
    k = lengths_of(layer(torch.ones(20_000, 24)))
    assert_drawn_from(k, InGroups(Exponential(0.3), 4).pmf(24))
    assert_drawn_from(k // 4, Exponential(0.3).pmf(6))
    assert (k % 4 == 0).all()


def test_the_groups_have_the_lengths_that_are_given(assert_drawn_from):
    layer = TailDropout(lengths=Uniform(), multiple_of=3)
    k = lengths_of(layer(torch.ones(10_000, 12)))
    assert_drawn_from(k // 3, Uniform().pmf(4))


@BOTH_MODES
def test_a_width_is_rounded_up_to_whole_groups(training):
    layer = TailDropout(multiple_of=4).train(training)
    for width, k in [(0.0, 0), (0.01, 4), (0.25, 4), (1 / 3, 4), (0.34, 8), (0.7, 12), (1.0, 12)]:
        with layer.using_width(width):
            assert lengths_of(layer(torch.ones(2, 12))).tolist() == [k, k]


@BOTH_MODES
def test_k_must_be_a_multiple(training):
    layer = TailDropout(multiple_of=4).train(training)
    for k in (0, 4, 12, torch.tensor([4, 8])):
        with layer.using_k(k):
            assert_equal(layer(x := torch.randn(2, 12)), keep_prefix(x, k))
    for k in (1, 6, torch.tensor([4, 9])):
        with pytest.raises(ValueError, match="k must be a multiple of multiple_of=4, got k="):
            layer.set_k(k)
    message = "k must be a multiple of multiple_of=4, got k=3"
    with pytest.raises(ValueError, match=message), layer.using_width(3):
        pass
    assert layer.k is None


def test_the_number_of_features_must_be_a_multiple():
    layer, x = TailDropout(multiple_of=4), torch.ones(2, 10)
    message = "number of features must be a multiple of multiple_of=4, got n=10"
    with pytest.raises(ValueError, match=message):
        layer(x)
    for w in (0.5, 4):
        with pytest.raises(ValueError, match=message), layer.using_width(w):
            layer(x)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(
    ("multiple_of", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)],
)
def test_multiple_of_must_be_a_count(multiple_of, error):
    with pytest.raises(error, match=r"multiple_of must be (an int|at least 1), got"):
        TailDropout(multiple_of=multiple_of)


def test_multiple_of_is_said():
    assert "multiple_of=4" in repr(TailDropout(multiple_of=4))
    assert "multiple_of" not in repr(TailDropout())


# --- using_width ------------------------------------------------------------------------------


@BOTH_MODES
@pytest.mark.parametrize(
    ("w", "k"),
    [(0.0, 0), (0.01, 1), (0.5, 3), (0.51, 4), (0.99, 6), (1.0, 6), (0, 0), (1, 1), (4, 4)],
)
def test_using_width_keeps_a_fraction_rounded_up_or_k(w, k, training):
    layer, x = TailDropout().train(training), torch.randn(3, 6)
    with layer.using_width(w) as inside:
        assert inside is layer
        assert_equal(layer(x), keep_prefix(x, k))
    assert layer.k is None


def test_a_width_of_k_nths_is_k():
    layer = TailDropout()
    for n in range(1, 201):
        x = torch.ones(1, n)
        with layer.using_width(1 / n):
            assert lengths_of(layer(x)).item() == 1
        for k in range(n + 1):
            with layer.using_width(k / n):
                assert layer.set_k_for(n) == k


def test_a_width_is_that_of_each_input():
    layer = TailDropout(dropout_dim=1)
    with layer.using_width(0.5):
        kept = [lengths_of(layer(torch.ones(2, n, 3)), 1).unique().item() for n in (1, 2, 7, 10)]
    assert kept == [1, 1, 4, 5]


def test_a_width_outlasts_train_and_eval():
    layer, x = TailDropout(), torch.ones(2, 4)
    with layer.using_width(0.5):
        for change in (layer.eval, layer.train, lambda: layer.set_k(None)):
            change()
            assert lengths_of(layer(x)).tolist() == [2, 2]
    assert layer.eval()(x) is x


def test_a_k_that_is_set_inside_a_width_is_in_force_until_it_is_cleared():
    layer, x, seen = TailDropout().eval(), torch.ones(2, 4), []
    layer.set_k(1)
    with layer.using_width(0.5):
        seen.append(lengths_of(layer(x)).tolist())
        layer.set_k(torch.tensor([0, 3]))
        seen.append(lengths_of(layer(x)).tolist())
        layer.eval()
        seen.append(lengths_of(layer(x)).tolist())
        with layer.using_k(4):
            seen.append(lengths_of(layer(x)).tolist())
    seen.append(lengths_of(layer(x)).tolist())
    assert seen == [[2, 2], [0, 3], [2, 2], [4, 4], [1, 1]]


def test_using_width_nests_and_none_is_no_width():
    layer, x, seen = TailDropout().eval(), torch.ones(2, 4), []
    with layer.using_width(0.75):
        with layer.using_width(1):
            with layer.using_width(None):
                assert layer(x) is x
                assert layer.eval()(x) is x
            seen.append(lengths_of(layer(x)).tolist())
        seen.append(lengths_of(layer(x)).tolist())
    assert layer(x) is x
    assert seen == [[1, 1], [3, 3]]


def test_without_a_width_training_draws(assert_drawn_from):
    layer = TailDropout(0.3)
    with layer.using_width(0.5), layer.using_width(None):
        k = lengths_of(layer(torch.ones(10_000, FEATURES)))
    assert_drawn_from(k, Exponential(0.3).pmf(FEATURES))


@pytest.mark.parametrize("before", [None, 3])
def test_using_width_restores_after_an_exception(before):
    layer, x = TailDropout().eval(), torch.ones(2, 4)
    layer.set_k(before)
    with pytest.raises(KeyboardInterrupt), layer.using_width(0.5):
        raise KeyboardInterrupt
    assert layer.k == before
    assert_equal(layer(x), keep_prefix(x, 4 if before is None else before))


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (1.5, ValueError, r"w is the fraction of the features to keep, in \[0, 1\], got 1.5"),
        (-0.1, ValueError, r"w is the fraction of the features to keep, in \[0, 1\], got -0.1"),
        (math.nan, ValueError, r"w is the fraction .* got nan"),
        (-1, ValueError, "k must be at least 0, got k=-1"),
        (True, TypeError, r"w must be a width in \[0, 1\] or an int, which is a k, got True"),
        ("half", TypeError, r"w must be a width in \[0, 1\] or an int, which is a k, got 'half'"),
    ],
)
def test_a_bad_width_is_refused_and_changes_nothing(w, error, message):
    layer = TailDropout()
    layer.set_k(2)
    with pytest.raises(error, match=message), layer.using_width(w):
        pass
    assert layer.k == 2


def test_an_int_above_the_number_of_features_is_refused_in_the_call():
    layer = TailDropout()
    with (
        layer.using_width(7),
        pytest.raises(ValueError, match=r"k must be at most .* n=6, got k=7"),
    ):
        layer(torch.ones(2, 6))


@BOTH_MODES
def test_in_a_fitted_layer_the_width_is_that_of_its_own_features(training):
    layer = FittedTailDropout.fit(TailDropout().train(training), width=4, size=8)
    x = torch.ones(2, 6)
    with layer.using_width(0.5):
        assert lengths_of(layer(x)).tolist() == [2, 2]
        with layer.using_width(3):
            assert lengths_of(layer(x)).tolist() == [3, 3]
        with layer.using_width(None):
            assert lengths_of(layer.eval()(x)).tolist() == [4, 4]
    assert layer(x).shape == (2, 8)


# --- p ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.93, 1])
def test_p_is_the_expected_fraction_dropped(p):
    assert_drops(TailDropout(p), p)


def test_p_can_be_changed():
    layer = TailDropout(0.5)
    for p in (0.1, 0.9, 0, 1):
        layer.p = p
        assert layer.p == p
        assert_drops(layer, p)


def test_given_lengths_take_the_place_of_p(assert_drawn_from):
    lengths = Sizes([3, 9], weights=[1, 3])
    layer = TailDropout(1, lengths=lengths, stratified=False)
    assert_drawn_from(lengths_of(layer(torch.ones(10_000, 9))), lengths.pmf(9))


OUTSIDE = pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, torch.tensor(-1.0)])
NO_NUMBER = pytest.mark.parametrize("p", ["a", None, [0.5]])
P_OUTSIDE = r"p is the expected fraction of features dropped and must be in \[0, 1\], got"
P_NO_NUMBER = r"p must be a number in \[0, 1\], got"


@OUTSIDE
def test_a_p_outside_0_to_1_is_refused(p):
    with pytest.raises(ValueError, match=P_OUTSIDE):
        TailDropout(p)


@NO_NUMBER
def test_a_p_that_is_not_a_number_is_refused(p):
    with pytest.raises(TypeError, match=P_NO_NUMBER):
        TailDropout(p)


@OUTSIDE
def test_a_new_p_outside_0_to_1_is_refused_and_changes_nothing(p):
    layer = TailDropout(0.25)
    with pytest.raises(ValueError, match=P_OUTSIDE):
        layer.p = p
    assert_drops(layer, 0.25)


@NO_NUMBER
def test_a_new_p_that_is_not_a_number_is_refused_and_changes_nothing(p):
    layer = TailDropout(0.25)
    with pytest.raises(TypeError, match=P_NO_NUMBER):
        layer.p = p
    assert_drops(layer, 0.25)


# --- bad input --------------------------------------------------------------------------------


def test_lengths_must_have_a_pmf():
    with pytest.raises(TypeError, match=r"lengths must have a pmf\(n\), .*, got 'uniform'"):
        TailDropout(lengths="uniform")


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"batch_dim": "a"}, "batch_dim must be an int or a sequence of ints, got 'a'"),
        ({"batch_dim": (0.0,)}, r"batch_dim must be an int or a sequence of ints, got \(0.0,\)"),
        ({"dropout_dim": 1.5}, "dropout_dim must be an int, got 1.5"),
    ],
)
def test_dims_must_be_ints(dims, message):
    with pytest.raises(TypeError, match=message):
        TailDropout(**dims)


@pytest.mark.parametrize(
    ("batch_dim", "dropout_dim"), [(0, 0), (-1, -1), ([0, 1], 1), ((0, -1), -1), ([2, 1, 0], 2)]
)
def test_dims_that_coincide_are_refused_at_once(batch_dim, dropout_dim):
    message = f"must be different dims, got batch_dim=.* and dropout_dim={dropout_dim}"
    with pytest.raises(ValueError, match=message):
        TailDropout(0.5, batch_dim, dropout_dim)


@pytest.mark.parametrize("k", [None, torch.tensor([1, 2, 3])], ids=["drawn", "tensor"])
@pytest.mark.parametrize(("batch_dim", "dropout_dim"), [(0, -2), (1, -1), ([0, 1], -1)])
def test_dims_that_coincide_in_the_input_are_refused_in_the_call(batch_dim, dropout_dim, k):
    layer = TailDropout(0.5, batch_dim, dropout_dim)
    layer.set_k(k)
    with pytest.raises(ValueError, match=r"must be different dims, got .*shape \(3, 4\)"):
        layer(torch.ones(3, 4))


@pytest.mark.parametrize("k", [None, torch.tensor([1, 2, 3])], ids=["drawn", "tensor"])
@pytest.mark.parametrize(
    ("batch_dim", "dropout_dim", "message"),
    [
        (2, -1, "batch_dim must be a dim of the input, got batch_dim=2 "),
        (0, 2, "dropout_dim must be a dim of the input, got dropout_dim=2 "),
        (0, -3, "dropout_dim must be a dim of the input, got dropout_dim=-3 "),
    ],
)
def test_dims_that_the_input_does_not_have_are_refused(batch_dim, dropout_dim, message, k):
    layer = TailDropout(0.5, batch_dim, dropout_dim)
    layer.set_k(k)
    with pytest.raises(IndexError, match=message + r"for an input of shape \(3, 4\)"):
        layer(torch.ones(3, 4))


def test_a_features_dim_that_the_input_does_not_have_is_refused_with_k_set():
    layer = TailDropout(dropout_dim=2)
    layer.set_k(1)
    with pytest.raises(IndexError, match="dropout_dim must be a dim of the input"):
        layer(torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_an_integer_or_boolean_input_is_refused_in_training(dtype):
    message = rf"got {dtype}: convert it, call eval\(\), or fix k with set_k\(k\)"
    with pytest.raises(TypeError, match=message):
        TailDropout()(torch.ones(3, 4, dtype=dtype))


BAD_KS = pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, "k must be at least 0, got k=-1"),
        (torch.tensor([0, -2, 3]), ValueError, "k must be at least 0, got k=-2"),
        (2.0, TypeError, r"k must be an integer or an integer tensor, got 2\.0"),
        (True, TypeError, "k must be an integer or an integer tensor, got True"),
        ("2", TypeError, "k must be an integer or an integer tensor, got '2'"),
        ([1, 2, 3], TypeError, "k must be an integer or an integer tensor, got"),
        (torch.ones(3), TypeError, r"k must be an integer tensor, got dtype torch\.float32"),
        (torch.ones(3) > 0, TypeError, r"k must be an integer tensor, got dtype torch\.bool"),
    ],
    ids=str,
)


@BAD_KS
@pytest.mark.parametrize("before", [None, 2])
def test_a_bad_k_is_refused_where_it_is_set_and_changes_nothing(before, k, error, message):
    layer = TailDropout()
    layer.set_k(before)
    with pytest.raises(error, match=message):
        layer.set_k(k)
    assert layer.k == before


@BAD_KS
@pytest.mark.parametrize("before", [None, 2])
def test_using_a_bad_k_is_refused_and_changes_nothing(before, k, error, message):
    layer = TailDropout()
    layer.set_k(before)
    with pytest.raises(error, match=message), layer.using_k(k):
        pass
    assert layer.k == before


@BOTH_MODES
@pytest.mark.parametrize("k", [7, torch.tensor([0, 7, 1]), torch.tensor(7)])
def test_a_k_above_the_number_of_features_is_refused_in_the_call(k, training):
    layer = TailDropout().train(training)
    layer.set_k(k)
    with pytest.raises(ValueError, match="k must be at most the number of features n=6, got k=7"):
        layer(torch.ones(3, 6))


@pytest.mark.parametrize("shape", [(2,), (1,), (6,), (3, 1), (3, 6), (0,)])
def test_a_k_without_one_entry_per_sample_is_refused_in_the_call(shape):
    layer = TailDropout()
    layer.set_k(torch.ones(shape, dtype=torch.int64))
    message = r"one entry for each index of batch_dim=0, shape \(3,\), got shape .*\(3, 6\)"
    with pytest.raises(ValueError, match=message):
        layer(torch.ones(3, 6))


# --- as a module ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (TailDropout(), "p=0.5, batch_dim=0, dropout_dim=-1"),
        (TailDropout(0.1, [0, 1], 2), "p=0.1, batch_dim=(0, 1), dropout_dim=2"),
        (
            TailDropout(lengths=Sizes([4, 8])),
            "lengths=Sizes(sizes=(4, 8), weights=None), batch_dim=0, dropout_dim=-1",
        ),
        (
            TailDropout(1, stratified=False, inplace=True),
            "p=1.0, batch_dim=0, dropout_dim=-1, stratified=False, inplace=True",
        ),
    ],
)
def test_repr_names_the_arguments(layer, expected):
    assert repr(layer) == f"TailDropout({expected})"


def test_repr_names_the_k_that_is_set():
    layer = TailDropout()
    layer.set_k(3)
    assert repr(layer) == "TailDropout(p=0.5, batch_dim=0, dropout_dim=-1, k=3)"


@pytest.mark.parametrize("k", [None, 3, torch.tensor([1, 2])], ids=["none", "int", "tensor"])
def test_there_is_nothing_in_the_state_dict(k):
    layer = TailDropout()
    layer.set_k(k)
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    assert list(layer.buffers()) == []


@pytest.mark.parametrize(
    ("source", "target"), [(nn.Dropout, TailDropout), (TailDropout, nn.Dropout)]
)
def test_a_checkpoint_moves_between_dropout_and_tail_dropout_unchanged(source, target):
    source, target = model_with(source(0.2)), model_with(target(0.2))
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(4, 5)
    assert_equal(target.eval()(x), source.eval()(x))


def test_a_stray_k_in_a_checkpoint_is_ignored():
    layer = TailDropout()
    layer.load_state_dict({"k": torch.tensor(3)}, strict=True)
    assert layer.k is None


def test_a_stray_k_in_the_checkpoint_of_a_model_is_ignored():
    model = nn.ModuleDict({"part": model_with(TailDropout())})
    checkpoint = model.state_dict() | {"part.2.k": torch.tensor(3)}
    model.load_state_dict(checkpoint, strict=True)
    assert model["part"][2].k is None
    assert "part.2.k" in checkpoint


@pytest.mark.parametrize("key", ["2.mask", "2.k.x", "0.k", "k"])
def test_any_other_stray_entry_is_still_refused(key):
    model = model_with(TailDropout())
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{key}"'):
        model.load_state_dict(model.state_dict() | {key: torch.tensor(3)}, strict=True)


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)


@COPIES
@pytest.mark.parametrize("lengths", [None, Uniform(), Exponential(0.1, 2), Sizes([4])], ids=str)
def test_a_copy_draws_the_same(copied, lengths):
    layer = TailDropout(0.3, [1], 0, lengths=lengths, stratified=False)
    other = copied(layer)
    x = torch.randn(9, 100)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert_equal(other(x), expected)
    assert repr(other) == repr(layer)


@COPIES
def test_a_copy_has_no_drawn_k(copied):
    layer = TailDropout()
    layer(torch.ones(7, 4))
    assert layer.drawn_k.shape == (7,)
    assert copied(layer).drawn_k is None


@COPIES
@pytest.mark.parametrize("k", [1, torch.tensor([1, 2])], ids=["int", "tensor"])
def test_a_copy_has_the_k_that_is_set_and_its_own_from_then_on(copied, k):
    layer, x = TailDropout().eval(), torch.ones(2, 4)
    layer.set_k(k)
    other = copied(layer)
    assert_equal(other(x), layer(x))
    layer.set_k(4)
    layer.p = 0.9
    assert_equal(other(x), keep_prefix(x, k))
    assert other.p == 0.5


def test_a_layer_works_in_another_process():
    layer = TailDropout().eval()
    layer.set_k(torch.tensor([1, 2]))
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as processes:
        output = processes.submit(layer, torch.ones(2, 3)).result(timeout=120)
        assert_equal(output, torch.tensor([[1.0, 0, 0], [1, 1, 0]]))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_converting_the_dtype_of_a_model_leaves_p_exact(convert):
    layer = getattr(TailDropout(1e-4), convert)()
    k = lengths_of(layer(torch.ones(20_000, 100)))
    full = 20_000 * Exponential(1e-4).pmf(100)[-1].item()
    assert abs(k.eq(100).sum().item() - full) < 1


def test_a_layer_made_under_another_default_device_works():
    with torch.device("meta"):
        layer = TailDropout()
        layer.set_k(2)
    assert_equal(layer(torch.ones(1, 3)), torch.tensor([[1.0, 1, 0]]))
    layer.set_k(None)
    assert_drops(layer, 0.5)


def test_inplace_writes_into_the_input():
    x = torch.ones(2, 4)
    layer = TailDropout(inplace=True)
    layer.set_k(1)
    assert layer(x) is x
    layer.set_k(None)
    assert layer(x) is x
    assert (x[:, 1:] == 0).all()


# --- in a network -----------------------------------------------------------------------------


def test_in_a_sequence_k_is_shared_over_the_steps_of_each_sample():
    output = nn.GRU(5, 200)(torch.randn(7, 6, 5))[0]  # (time, batch, feature)
    layer = TailDropout(batch_dim=1, dropout_dim=2, lengths=Uniform())
    k = lengths_of(layer(output))  # (time, batch)
    assert_equal(k, k[:1].expand(7, 6))
    assert len(set(k[0].tolist())) == 6


def test_in_a_sequence_every_step_may_have_its_own_k():
    output = nn.GRU(5, 2000)(torch.randn(7, 6, 5))[0]
    layer = TailDropout(batch_dim=[0, 1], dropout_dim=2, lengths=Uniform())
    assert len(set(lengths_of(layer(output)).flatten().tolist())) == 42


@pytest.mark.parametrize("k", [None, 3, torch.arange(6)], ids=["drawn", "int", "tensor"])
def test_images_lose_whole_channels_and_keep_their_memory_format(k):
    image = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(3, 100, 3).to(memory_format=torch.channels_last)
    layer = TailDropout(batch_dim=0, dropout_dim=1)
    layer.set_k(k)
    features = conv(image)
    output = layer(features)
    output.sum().backward()
    kept = lengths_of(output, dim=1)  # (sample, row, column)
    assert_equal(kept, kept[:, :1, :1].expand_as(kept))
    assert_equal(output, keep_prefix(features, kept[:, 0, 0], dim=1))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_behind_batch_norm_the_running_statistics_are_those_of_all_features():
    norm, x = nn.BatchNorm1d(8), torch.randn(64, 8)
    alone = copy.deepcopy(norm)
    alone(x)
    nn.Sequential(norm, TailDropout(0.9))(x)
    assert_equal(norm.state_dict(), alone.state_dict())


def test_behind_batch_norm_the_parameters_of_the_tail_get_no_gradient():
    norm, layer = nn.BatchNorm1d(4), TailDropout()
    layer.set_k(2)
    layer(norm(torch.randn(64, 4))).square().sum().backward()
    assert norm.weight.grad.ne(0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("k", [None, 3], ids=["drawn", "int"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_neither_dtype_nor_bits(dtype, k):
    x = torch.randn(64, 100).to(dtype)
    layer = TailDropout()
    layer.set_k(k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == dtype
    assert_equal(output, keep_prefix(x, lengths_of(output)))


def test_a_bfloat16_model_trains():
    model = model_with(TailDropout(lengths=Sizes([2]))).bfloat16()
    output = model(torch.randn(4, 5, dtype=torch.bfloat16))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert model[3].weight.grad.ne(0).any(0)[2:].tolist() == 6 * [False]


def test_activation_checkpointing_draws_the_same_k_again():
    x = torch.ones(64, 100, requires_grad=True)
    layer = TailDropout()
    output = checkpoint(lambda x: layer(x) ** 2, x, use_reentrant=False)
    output.sum().backward()
    assert_equal(x.grad, 2 * output.detach())


def test_an_ensemble_under_vmap_draws_for_every_member():
    models = [nn.Sequential(nn.Linear(4, 1000), TailDropout()) for _ in range(3)]
    state = stack_module_state(models)
    x = torch.randn(5, 4)
    outputs = torch.vmap(
        lambda *state: functional_call(models[0], state, (x,)), randomness="different"
    )(*state)
    k = lengths_of(outputs)
    assert len({tuple(member) for member in k.tolist()}) == 3
    for model, output, lengths in zip(models, outputs, k, strict=True):
        assert_close(output, keep_prefix(model[0](x), lengths))


# --- torch.compile ----------------------------------------------------------------------------

# Inductor, and what it loads, announce the end of torch.jit.script.
torch_warns_about_itself = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
COMPILED_KS = pytest.mark.parametrize(
    "k", [None, 13, torch.arange(64)], ids=["drawn", "int", "tensor"]
)


def compiled(layer, backend="aot_eager", **options):
    return torch.compile(layer, backend=backend, fullgraph=True, **options)


@torch_warns_about_itself
@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @BACKENDS
    def test_training_draws_a_fresh_k_for_each_sample_in_each_call(
        self, backend, assert_drawn_from
    ):
        fast = compiled(TailDropout(0.3), backend)
        first, second = (lengths_of(fast(torch.ones(5000, FEATURES))) for _ in range(2))
        for k in (first, second):
            assert_drawn_from(k, Exponential(0.3).pmf(FEATURES))
        assert not torch.equal(first, second)

    def test_eval_returns_the_input_itself(self):
        x = torch.ones(64, 100)
        assert compiled(TailDropout().eval())(x) is x

    @BOTH_MODES
    @pytest.mark.parametrize("k", [0, 13, 100, torch.tensor(13), torch.arange(64)])
    def test_a_set_k_keeps_the_first_k_features(self, k, training):
        layer, x = TailDropout().train(training), torch.randn(64, 100)
        layer.set_k(k)
        assert_equal(compiled(layer)(x), keep_prefix(x, k))

    @pytest.mark.parametrize("stratified", [True, False])
    @pytest.mark.parametrize(
        "lengths",
        [
            Exponential(0.3),
            Exponential(0.3, min_k=2),
            Uniform(),
            Sizes([2, 9], [1, 4]),
            Mixed([Full(), LogUniform(0.25), Sizes([0.25])], [0.2, 0.6, 0.2]),
            InGroups(Exponential(0.3), 3),
        ],
        ids=str,
    )
    def test_training_draws_from_the_given_lengths(self, lengths, stratified, assert_drawn_from):
        fast = compiled(TailDropout(lengths=lengths, stratified=stratified))
        assert_drawn_from(lengths_of(fast(torch.ones(5000, 9))), lengths.pmf(9))

    def test_groups_are_kept_whole_and_nothing_recompiles(self, assert_drawn_from):
        counter, layer = CompileCounter(), TailDropout(0.3, multiple_of=4)
        fast, x = compiled(layer, counter), torch.ones(5000, 20)
        assert_drawn_from(lengths_of(fast(x)), InGroups(Exponential(0.3), 4).pmf(20))
        layer.p = 0.6
        assert_drawn_from(lengths_of(fast(x)), InGroups(Exponential(0.6), 4).pmf(20))
        assert counter.frame_count == 1
        for width, k in [(0.0, 0), (0.2, 4), (0.21, 8), (1 / 3, 8), (1.0, 20)]:
            with layer.using_width(width):
                assert lengths_of(fast(x)).unique().tolist() == [k]
        assert counter.frame_count == 2

    @pytest.mark.parametrize("k", [101, torch.full((64,), 101)], ids=["int", "tensor"])
    def test_a_k_above_the_number_of_features_keeps_all(self, k):
        layer, x = TailDropout(), torch.randn(64, 100)
        layer.set_k(k)
        assert_equal(compiled(layer)(x), x)

    @BACKENDS
    @COMPILED_KS
    def test_only_k_is_saved_and_the_gradient_is_cut_with_the_output(self, k, backend):
        layer = TailDropout()
        layer.set_k(k)
        x, saved = torch.ones(64, 500, requires_grad=True), []

        def pack(tensor):
            saved.append(tensor.untyped_storage().nbytes())
            return tensor

        fast = compiled(layer, backend)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = fast(x)
        incoming = torch.where(output == 0, math.nan, 3.0)
        (grad,) = torch.autograd.grad(output, x, incoming)
        assert_equal(grad, 3 * output.detach())
        assert 0 < sum(saved) <= 16 * 64

    @BACKENDS
    def test_nan_in_the_tail_does_not_come_through(self, backend):
        layer, k = TailDropout(), torch.arange(64)
        layer.set_k(k)
        x = torch.where(torch.arange(100) < k[:, None], 1.0, math.nan)
        assert_equal(compiled(layer, backend)(x), x.nan_to_num(0))

    @COMPILED_KS
    @pytest.mark.parametrize(
        "x",
        [
            torch.ones(64, 100),
            torch.ones(100, 64).t(),
            torch.ones(64, 100, 2, 3).to(memory_format=torch.channels_last),
        ],
        ids=["contiguous", "transposed", "channels_last"],
    )
    def test_the_output_has_the_memory_format_of_the_input(self, x, k):
        layer = TailDropout(batch_dim=0, dropout_dim=1)
        layer.set_k(k)
        assert compiled(layer)(x).stride() == x.stride()

    def test_inplace_has_the_right_gradient(self):
        layer = TailDropout(inplace=True)
        x = torch.ones(64, 100, requires_grad=True)
        output = compiled(lambda x: layer(x * 1))(x)
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert_equal(grad, output.detach())

    @pytest.mark.parametrize("k", [2, torch.arange(64) % 9], ids=["int", "tensor"])
    def test_a_model_has_the_gradients_of_the_uncompiled_one(self, k):
        model, x = model_with(TailDropout()), torch.randn(64, 5)
        model[2].set_k(k)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(model(x).square().sum(), parameters)
        actual = torch.autograd.grad(compiled(model)(x).square().sum(), parameters)
        assert_close(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
class TestRecompilation:
    @pytest.mark.parametrize(
        "ks",
        [range(6), torch.arange(6), torch.arange(24).reshape(6, 4) % 7],
        ids=["int", "0-dim tensor", "tensor"],
    )
    @BOTH_MODES
    def test_another_k_does_not_recompile(self, training, ks):
        counter, layer, x = CompileCounter(), TailDropout().train(training), torch.ones(4, 6)
        fast = compiled(layer, counter)
        for k in ks:
            layer.set_k(k)
            assert_equal(fast(x), keep_prefix(x, k))
        assert counter.frame_count == 1

    @pytest.mark.slow
    @BOTH_MODES
    def test_another_width_does_not_recompile(self, training):
        counter, layer, x = CompileCounter(), TailDropout().train(training), torch.ones(4, 6)
        fast = compiled(layer, counter)
        for w in (0.0, 0.5, 0.51, 1 / 6, 1.0):
            with layer.using_width(w):
                assert_equal(fast(x), layer(x))
        assert counter.frame_count == 1

    @pytest.mark.parametrize("stratified", [True, False])
    def test_another_p_does_not_recompile(self, stratified, assert_drawn_from):
        counter, layer = CompileCounter(), TailDropout(stratified=stratified)
        fast = compiled(layer, counter)
        for p in (0.5, 0.1, 0.9, 0.01):
            layer.p = p
            k = lengths_of(fast(torch.ones(20_000, FEATURES)))
            assert_drawn_from(k, Exponential(p).pmf(FEATURES))
        assert counter.frame_count == 1

    @pytest.mark.parametrize("p", [0, 1])
    def test_all_or_nothing_does_not_recompile(self, p):
        counter, layer, x = CompileCounter(), TailDropout(), torch.ones(50, 6)
        fast = compiled(layer, counter)
        fast(x)
        layer.p = p
        assert_equal(fast(x), (1 - p) * x)
        assert counter.frame_count == 1

    def test_setting_and_clearing_k_by_turns_compiles_each_state_once(self):
        counter, layer, x = CompileCounter(), TailDropout(), torch.ones(4, 6)
        fast = compiled(layer, counter)
        for k in range(1, 4):
            fast(x)
            with layer.using_k(k):
                fast(x)
        assert counter.frame_count == 2

    @pytest.mark.parametrize(
        "k_of", [lambda _: None, lambda _: 13, torch.arange], ids=["drawn", "int", "tensor"]
    )
    def test_a_dynamic_batch_compiles_once(self, k_of):
        counter, layer = CompileCounter(), TailDropout(0.9)
        fast = compiled(layer, counter, dynamic=True)
        for batch in (64, 63, 17):
            layer.set_k(k_of(batch))
            x = torch.ones(batch, 100)
            output = fast(x)
            assert_equal(output, keep_prefix(x, lengths_of(output)))
            assert 0 < output.sum() < x.sum()
        assert counter.frame_count == 1


# --- torch.export -----------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("k", [None, 3, torch.tensor([1, 8, 0, 4])], ids=["eval", "int", "tensor"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_computes_what_the_model_does(strict, k):
    model, x = model_with(TailDropout()).eval(), torch.randn(4, 5)
    model[2].set_k(k)
    exported = torch.export.export(model, (x,), strict=strict).module()
    other = torch.randn(4, 5)
    assert_equal(exported(other), model(other))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("k", [None, 3], ids=["eval", "int"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_takes_any_batch_size(strict, k):
    model = model_with(TailDropout()).eval()
    model[2].set_k(k)
    any_size = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(
        model, (torch.randn(4, 5),), strict=strict, dynamic_shapes=any_size
    ).module()
    x = torch.randn(9, 5)
    assert_equal(exported(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_keeps_its_k_where_the_layers_changes(strict):
    model, x = model_with(TailDropout()).eval(), torch.randn(4, 5)
    model[2].set_k(3)
    expected = model(x)
    exported = torch.export.export(model, (x,), strict=strict)
    model[2].set_k(7)
    assert_equal(exported.module()(x), expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_samples_in_a_nested_tensor_have_a_k_each(layout):
    parts = [torch.randn(length, 6) for length in (2, 5, 3)]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    layer = TailDropout(0.5)
    for k in (None, 2, torch.tensor([1, 6, 3])):
        layer.set_k(k)
        output = layer(nested)
        ks = layer.drawn_k if k is None else torch.as_tensor(k).expand(3)
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in output.unbind()), nested)
        for before, kept, slope, one in zip(
            parts, output.unbind(), gradient.unbind(), ks, strict=True
        ):
            assert_close(kept, keep_prefix(before, int(one)), rtol=0, atol=0)
            assert_close(slope, keep_prefix(torch.ones_like(before), int(one)))
    assert layer.eval()(nested) is nested
    with pytest.raises(ValueError, match="features along its last, got batch_dim=0 and dropout_di"):
        TailDropout(dropout_dim=1)(nested)
