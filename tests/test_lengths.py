import dataclasses
import itertools
import math
import pickle
from collections import Counter
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from taildropout.draws import draw, draw_uniforms, inverse_cdf, most_above
from taildropout.lengths import (
    AtLeast,
    Exponential,
    Full,
    InGroups,
    LogUniform,
    Mixed,
    Sizes,
    Uniform,
)

PS = [1e-9, 1e-6, 9.9e-5, 1.01e-4, 0.01, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 1e-9]
NS = [1, 2, 3, 7, 64, 1000, 10**6]
LENGTHS = [
    Exponential(0.5),
    Exponential(0.1),
    Exponential(0.003),
    Exponential(0.97),
    Exponential(0.3, min_k=3),
    Uniform(),
    Uniform(min_k=0),
    Uniform(min_k=5),
    Sizes([2, 3, 13]),
    Sizes([0, 5, 7], weights=[1, 5, 0.5]),
    Exponential(0.3, min_k=0.25),
    Uniform(min_k=0.3),
    LogUniform(),
    LogUniform(min_k=3),
    LogUniform(min_k=0.2),
    Sizes([0.25, 3, 1.0], weights=[1, 2, 3]),
    Full(),
    Mixed([Full(), LogUniform(2), Sizes([2])], weights=[0.2, 0.6, 0.2]),
    Mixed([Exponential(0.5), Mixed([Uniform(), Full()])]),
    AtLeast(Exponential(0.7), min_k=0.3),
]


def expected_fraction(pmf, fraction):
    n = len(pmf) - 1
    return math.fsum(
        probability * fraction(k, n) / max(n, 1) for k, probability in enumerate(pmf.tolist())
    )


def dropped_fraction(pmf):
    return expected_fraction(pmf, lambda k, n: n - k)


def kept_fraction(pmf):
    return expected_fraction(pmf, lambda k, n: k)


def solved_decay_rate(p, n):
    """The a for which r = exp(-a) has (1/n) sum_{j=1..n} r^j = 1 - p, by bisection."""

    def excess(log_a):
        a = mpmath.exp(log_a)
        kept = mpmath.exp(-a) * mpmath.expm1(-a * n) / mpmath.expm1(-a) / n
        return kept - (1 - mpmath.mpf(p))

    return mpmath.exp(mpmath.findroot(excess, (-60, 10), solver="bisect", maxsteps=400))


# --- Exponential ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("p", [0, *PS, 1])
def test_exponential_drops_exactly_the_fraction_p(p, n):
    pmf = Exponential(p).pmf(n)
    assert dropped_fraction(pmf) == pytest.approx(p, rel=1e-9, abs=0)
    assert kept_fraction(pmf) == pytest.approx(1 - p, rel=1e-9, abs=0)


@given(log_odds=st.floats(-20.7, 20.7), n=st.integers(1, 3000))
def test_exponential_drops_exactly_the_fraction_p_in_between(log_odds, n):
    p = 1 / (1 + math.exp(-log_odds))  # from 1e-9 to 1 - 1e-9
    pmf = Exponential(p).pmf(n)
    assert dropped_fraction(pmf) == pytest.approx(p, rel=1e-9, abs=0)
    assert kept_fraction(pmf) == pytest.approx(1 - p, rel=1e-9, abs=0)


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("p", PS)
def test_exponential_has_the_pmf_solved_with_fifty_digits(p, n):
    pmf = Exponential(p).pmf(n)
    ks = sorted({0, n // 2, n - 1})
    with mpmath.workdps(50):
        a = solved_decay_rate(p, n)
        expected = [float(mpmath.exp(-a * k) * -mpmath.expm1(-a)) for k in ks]
        expected.append(float(mpmath.exp(-a * n)))
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(pmf[[*ks, n]], expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("r", [0.05, 0.5, 0.9, 0.999])
def test_exponential_keeps_each_further_feature_with_the_same_probability_r(r, n):
    p = 1 - math.fsum(r**j for j in range(1, n + 1)) / n
    expected = [r**j * (1 - r) for j in range(n)] + [r**n]
    assert_close(
        Exponential(p).pmf(n), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-300
    )


def test_exponential_with_two_features_and_p_one_half_has_the_golden_ratio_as_r():
    r = (math.sqrt(5) - 1) / 2  # solves (r + r^2) / 2 = 1 / 2
    expected = torch.tensor([1 - r, r * (1 - r), r**2], dtype=torch.float64)
    assert_close(Exponential(0.5).pmf(2), expected, rtol=1e-12, atol=0)


def test_exponential_with_three_features_halves_at_p_17_24ths():
    expected = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)
    assert_close(Exponential(17 / 24).pmf(3), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [0, *PS, 1])
def test_exponential_with_one_feature_drops_it_with_probability_p(p):
    expected = torch.tensor([p, 1 - p], dtype=torch.float64)
    assert_close(Exponential(p).pmf(1), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize(("p", "k"), [(0, -1), (1, 0)])
def test_exponential_at_its_ends_has_one_length(p, k, n):
    expected = torch.zeros(n + 1, dtype=torch.float64)
    expected[k] = 1
    assert_close(Exponential(p).pmf(n), expected, rtol=0, atol=0)


@pytest.mark.parametrize("min_k", [1, 3, 9])
@pytest.mark.parametrize("p", [0, 1e-9, 0.05, 0.1])
def test_min_k_features_are_always_kept_and_p_is_still_the_fraction_of_all(p, min_k):
    n = 10
    pmf = Exponential(p, min_k=min_k).pmf(n)
    behind = Exponential(p * n / (n - min_k)).pmf(n - min_k)
    assert_close(pmf[:min_k], torch.zeros(min_k, dtype=torch.float64), rtol=0, atol=0)
    assert_close(pmf[min_k:], behind, rtol=1e-9, atol=1e-300)
    assert dropped_fraction(pmf) == pytest.approx(p, rel=1e-9, abs=0)


@pytest.mark.parametrize(("p", "min_k", "n"), [(0.7, 3, 10), (0, 10, 10), (0.9, 1, 10)])
def test_the_largest_p_above_min_k_always_keeps_min_k(p, min_k, n):
    expected = torch.zeros(n + 1, dtype=torch.float64)
    expected[min_k] = 1
    assert_close(Exponential(p, min_k).pmf(n), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("p", "min_k", "n"), [(0.71, 3, 10), (0.1, 10, 10), (1, 1, 10**6)])
def test_exponential_refuses_a_p_out_of_reach_above_min_k(p, min_k, n):
    largest = f"{1 - min_k / n:g}"
    with pytest.raises(ValueError, match=f"p must be at most 1 - min_k/n = {largest}.*for n={n}"):
        Exponential(p, min_k).pmf(n)


@pytest.mark.parametrize("p", [-0.1, -1e-300, 1.1, math.inf, math.nan, np.float32(1.5)])
def test_exponential_refuses_a_p_outside_0_to_1(p):
    with pytest.raises(ValueError, match=r"p is the .* fraction .* must be in \[0, 1\], got"):
        Exponential(p)


@pytest.mark.parametrize("p", ["a", None, [0.5], 0.5j])
def test_exponential_refuses_a_p_that_is_not_a_number(p):
    with pytest.raises(TypeError, match=r"p must be a number in \[0, 1\], got"):
        Exponential(p)


@pytest.mark.parametrize("lengths", [Exponential, Uniform])
def test_min_k_must_be_a_size(lengths):
    with pytest.raises(ValueError, match="min_k must be at least 0, got -1"):
        lengths(min_k=-1)
    with pytest.raises(TypeError, match=r"min_k must be an integer, or a fraction .* got 1\.5"):
        lengths(min_k=1.5)


@pytest.mark.parametrize("lengths", [Exponential(0, min_k=5), Uniform(min_k=5)])
def test_min_k_above_the_number_of_features_is_refused(lengths):
    with pytest.raises(
        ValueError, match=r"min_k must be at most the number of features, got .*n=4"
    ):
        lengths.pmf(4)


# --- Uniform and Sizes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_k", "n", "expected"),
    [
        (0, 3, [0.25, 0.25, 0.25, 0.25]),
        (1, 4, [0, 0.25, 0.25, 0.25, 0.25]),
        (3, 4, [0, 0, 0, 0.5, 0.5]),
        (4, 4, [0, 0, 0, 0, 1]),
        (0, 0, [1]),
    ],
)
def test_uniform_is_equally_likely_from_min_k_to_n(min_k, n, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(Uniform(min_k).pmf(n), expected, rtol=0, atol=0)


def test_uniform_starts_at_one_by_default():
    assert Uniform() == Uniform(min_k=1)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([1, 3], None, [0, 1 / 2, 0, 1 / 2, 0]),
        ([1, 3], [1, 3], [0, 1 / 4, 0, 3 / 4, 0]),
        ([3, 1], [1, 3], [0, 3 / 4, 0, 1 / 4, 0]),
        ([0, 4], [0.5, 0.5], [1 / 2, 0, 0, 0, 1 / 2]),
        ([2], [7], [0, 0, 1, 0, 0]),
        ([2, 4, 2, 2], None, [0, 0, 3 / 4, 0, 1 / 4]),
        ([2, 4, 2], [1, 4, 3], [0, 0, 1 / 2, 0, 1 / 2]),
        ([1, 2], [0, 1], [0, 0, 1, 0, 0]),
        (torch.tensor([1, 3]), torch.tensor([1.0, 3.0]), [0, 1 / 4, 0, 3 / 4, 0]),
    ],
)
def test_sizes_have_their_weights_and_duplicates_add_up(sizes, weights, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(Sizes(sizes, weights).pmf(4), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("sizes", "n", "ks"),
    [
        ([0.5, 1.0], 8, [4, 8]),
        ([0.5, 1.0], 7, [4, 7]),  # rounded up
        ([0.3], 10, [3]),  # 0.3 * 10 is a little above 3 in no float that counts
        ([1, 1.0], 6, [1, 6]),  # one feature, all features
        ([1 / 3], 3, [1]),
    ],
)
def test_a_size_that_is_a_fraction_is_that_of_n(sizes, n, ks):
    assert Sizes(sizes).pmf(n).nonzero().flatten().tolist() == ks


@pytest.mark.parametrize("kind", [Exponential, Uniform, LogUniform])
def test_min_k_may_be_a_fraction_of_n(kind):
    for n, min_k in [(8, 2), (9, 3), (100, 25)]:
        assert_close(kind(min_k=0.25).pmf(n), kind(min_k=min_k).pmf(n), rtol=0, atol=0)


@pytest.mark.parametrize(("min_k", "n"), [(1, 1), (1, 5), (3, 5), (5, 5), (1, 64), (7, 1000)])
def test_log_uniform_is_proportional_to_one_over_k(min_k, n):
    weights = [0.0 if k < min_k else float(1 / mpmath.mpf(k)) for k in range(n + 1)]
    total = math.fsum(weights)
    expected = torch.tensor([w / total for w in weights], dtype=torch.float64)
    assert_close(LogUniform(min_k).pmf(n), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [1, 29, 30, 31, 1000, 10**6])
def test_log_uniform_has_the_harmonic_numbers_above(n):
    for k in {0, 1, n // 3, n - 1, n}:
        with mpmath.workdps(40):
            expected = 1 - mpmath.harmonic(k) / mpmath.harmonic(n)
        assert LogUniform().above(n, k) == pytest.approx(float(expected), abs=4e-16)


def test_log_uniform_has_no_k_of_zero():
    with pytest.raises(ValueError, match=r"min_k must be at least 1, since .* got 0"):
        LogUniform(0)


def test_full_is_always_all():
    assert Full().pmf(3).tolist() == [0, 0, 0, 1]
    assert Full().pmf(0).tolist() == [1]
    assert draw(Full(), 3, 4).tolist() == [3, 3, 3, 3]


def test_a_mixture_is_the_weighted_mean_of_its_parts():
    parts, shares = [Exponential(0.4), Sizes([2]), Full()], [0.5, 0.3, 0.2]
    expected = sum(s * part.pmf(6) for s, part in zip(shares, parts, strict=True))
    assert_close(Mixed(parts, [5, 3, 2]).pmf(6), expected, rtol=1e-14, atol=0)
    assert_close(
        Mixed(parts).pmf(6), sum(part.pmf(6) for part in parts) / 3, rtol=1e-14, atol=1e-300
    )


def test_a_mixture_takes_lengths_of_ones_own():
    own = OwnLengths(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    mixed = Mixed([own, Full()])
    assert mixed.pmf(2).tolist() == [0.25, 0.125, 0.625]
    assert mixed.above(2, 0) == 0.75


def test_mixtures_refuse_what_is_no_mixture():
    with pytest.raises(ValueError, match="parts must name at least one distribution"):
        Mixed([])
    with pytest.raises(ValueError, match="weights must be one finite number >= 0 for each part"):
        Mixed([Full()], [1, 2])
    with pytest.raises(TypeError, match=r"lengths must have a pmf\(n\)"):
        Mixed([Full(), 0.5])


@pytest.mark.parametrize(("min_k", "floor"), [(0, 0), (3, 3), (0.25, 3), (1.0, 9)])
def test_lengths_below_a_smallest_size_have_that_size(min_k, floor):
    of = Uniform(min_k=0)  # every k of 0, ..., 9 with probability 1/10
    expected = [0.0] * floor + [(floor + 1) / 10] + [0.1] * (9 - floor)
    lengths = AtLeast(of, min_k)
    assert_close(lengths.pmf(9), torch.tensor(expected, dtype=torch.float64))
    assert [lengths.above(9, k) for k in range(10)] == pytest.approx(
        [sum(expected[k + 1 :]) for k in range(10)]
    )


@pytest.mark.parametrize("group", [1, 2, 5])
def test_lengths_in_groups_are_those_of_the_groups(group):
    lengths, n = Exponential(0.3), 6 * group
    grouped = InGroups(lengths, group)
    assert_close(grouped.pmf(n)[::group], lengths.pmf(6), rtol=0, atol=0)
    assert dropped_fraction(grouped.pmf(n)) == pytest.approx(0.3, rel=1e-9)
    for k in range(n + 1):
        assert grouped.above(n, k) == pytest.approx(float(grouped.pmf(n)[k + 1 :].sum()), abs=1e-12)


def test_sizes_refuse_to_be_empty():
    with pytest.raises(ValueError, match="sizes must name at least one k, got none"):
        Sizes([])


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (-1, ValueError, "a size must be at least 0, got -1"),
        (1.5, TypeError, r"a size must be an integer, or a fraction .* in \(0, 1\], got 1\.5"),
        (0.0, TypeError, r"a size must be an integer, or a fraction .* in \(0, 1\], got 0\.0"),
        ("a", TypeError, "a size must be an integer, or a fraction .*, got 'a'"),
    ],
)
def test_sizes_refuse_what_is_no_size(size, error, message):
    with pytest.raises(error, match=message):
        Sizes([2, size])


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [], [1, -1], [0, 0], [1, math.nan], [math.inf, 1]]
)
def test_sizes_refuse_weights_that_are_no_distribution(weights):
    with pytest.raises(ValueError, match=r"weights must be one finite number >= 0 for each size"):
        Sizes([1, 2], weights)


def test_sizes_above_the_number_of_features_are_refused():
    with pytest.raises(
        ValueError, match=r"sizes must be at most the number of features, got .*n=4"
    ):
        Sizes([1, 5]).pmf(4)


# --- every distribution -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [13, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_pmf_is_n_plus_1_float64_probabilities_that_sum_to_1(lengths, n):
    pmf = lengths.pmf(n)
    assert pmf.shape == (n + 1,)
    assert pmf.dtype == torch.float64
    assert pmf.min() >= 0
    assert math.fsum(pmf.tolist()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_pmf_does_not_depend_on_the_default_dtype_and_device(lengths):
    expected = lengths.pmf(13)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            pmf = lengths.pmf(13)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(pmf, expected, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_are_values(lengths):
    copy = pickle.loads(pickle.dumps(lengths))
    assert copy == lengths
    assert hash(copy) == hash(lengths)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lengths.min_k = 2


# --- draw -------------------------------------------------------------------------------------


def assert_covers_evenly(k, pmf):
    """For every k, how many drawn are at most k is one of the two integers next to B P(K <= k)."""
    drawn = torch.bincount(k, minlength=len(pmf)).cumsum(0)
    expected = torch.tensor(list(itertools.accumulate(pmf.tolist())), dtype=torch.float64)
    assert (drawn - len(k) * expected).abs().max() < 1 + 1e-9


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("lengths", [x for x in LENGTHS if x != Full()], ids=str)
def test_draws_follow_the_pmf(lengths, stratified, assert_drawn_from):
    k = draw(lengths, 13, 50_000, stratified=stratified)
    assert_drawn_from(k, lengths.pmf(13))


@pytest.mark.parametrize("n", [1, 2, 17, 1000, 99_991])
@pytest.mark.parametrize("p", [1e-4, 0.137, 0.5, 0.99])
def test_draws_follow_the_pmf_at_any_width(p, n, assert_drawn_from):
    k = draw(Exponential(p), n, 200_000, stratified=False)
    assert_drawn_from(k, Exponential(p).pmf(n))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1001])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_stratified_draws_cover_the_pmf_evenly(lengths, count):
    for _ in range(20):
        assert_covers_evenly(draw(lengths, 13, count), lengths.pmf(13))


def test_stratified_uniform_draws_take_every_k_equally_often():
    k = draw(Uniform(), n=8, count=24)
    assert_close(torch.bincount(k), torch.tensor([0] + 8 * [3]), rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [Exponential(0.4), Sizes([0, 2, 5], [1, 2, 4])], ids=str)
def test_each_stratified_draw_by_itself_has_the_pmf(lengths, assert_drawn_from):
    k = torch.stack([draw(lengths, 5, count=3) for _ in range(10_000)])
    for position in range(3):
        assert_drawn_from(k[:, position], lengths.pmf(5))


def test_stratified_draws_come_in_every_order_equally_often():
    orders = Counter(tuple(draw(Uniform(), 3, count=3).tolist()) for _ in range(6000))
    assert set(orders) == set(itertools.permutations([1, 2, 3]))
    assert scipy.stats.chisquare(list(orders.values())).pvalue > 1e-4


def test_independent_draws_are_independent(assert_drawn_from):
    lengths = Exponential(0.4)
    pairs = torch.stack([draw(lengths, 3, count=2, stratified=False) for _ in range(10_000)])
    pmf = lengths.pmf(3)
    assert_drawn_from(pairs[:, 0] * 4 + pairs[:, 1], torch.outer(pmf, pmf).flatten())


@pytest.mark.parametrize("lengths", [Exponential(0.5), Uniform()], ids=str)
def test_stratified_draws_lower_the_variance_of_a_mean_over_the_batch(lengths):
    n, batch = 20, 32
    loss = torch.linspace(1, 0, n + 1, dtype=torch.float64)

    def variance(stratified):
        means = [loss[draw(lengths, n, batch, stratified=stratified)].mean() for _ in range(500)]
        return torch.stack(means).var()

    assert variance(stratified=True) < variance(stratified=False) / 10


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53], ids=["least", "largest"])
@pytest.mark.parametrize(
    "lengths",
    [
        Exponential(0),
        Exponential(1),
        Exponential(0.99),
        Exponential(1e-9),
        Exponential(0.3, min_k=3),
        Uniform(min_k=6),
        Sizes([3, 7], weights=[1, 1e-200]),
        Sizes([1, 2, 4, 5], weights=[0.1, 0.7, 0, 0.3]),
    ],
    ids=str,
)
def test_no_uniform_number_leads_to_a_k_of_probability_zero(
    lengths, uniform, count, stratified, monkeypatch
):
    monkeypatch.setattr(
        torch, "rand", lambda *size, **options: torch.full(size, uniform, dtype=options["dtype"])
    )
    k = draw(lengths, 9, count, stratified=stratified)
    assert (lengths.pmf(9)[k] > 0).all()


@pytest.mark.parametrize("p", [0, 1])
def test_draws_at_the_ends_of_p_are_all_or_nothing(p):
    k = draw(Exponential(p), 9, 10_000, stratified=False)
    assert_close(k, torch.full((10_000,), 9 * (1 - p)), rtol=0, atol=0)


@pytest.mark.parametrize("stratified", [True, False])
def test_a_generator_reproduces_draws_and_leaves_the_global_one_alone(stratified):
    state = torch.get_rng_state()
    first, second, other = (
        draw(
            Uniform(),
            1000,
            100,
            stratified=stratified,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.parametrize("stratified", [True, False])
def test_the_global_seed_reproduces_draws(stratified):
    first = draw(Uniform(), 1000, 100, stratified=stratified)
    second = draw(Uniform(), 1000, 100, stratified=stratified)
    torch.manual_seed(0)
    again = draw(Uniform(), 1000, 100, stratified=stratified)
    assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("n", "count"), [(0, 0), (0, 3), (5, 0), (5, 3)])
def test_draws_are_count_int64_numbers(n, count, stratified):
    k = draw(Exponential(), n, count, stratified=stratified)
    assert k.shape == (count,)
    assert k.dtype == torch.int64


def test_without_features_k_is_zero():
    assert_close(draw(Exponential(), 0, 3), torch.zeros(3, dtype=torch.int64), rtol=0, atol=0)


def test_draws_live_on_the_asked_device():
    assert draw(Exponential(), 5, 3, device="meta").device.type == "meta"


class OwnLengths:
    """Any object with a pmf will do."""

    def __init__(self, pmf):
        self.values = pmf

    def pmf(self, n):
        return torch.as_tensor(self.values)

    def __repr__(self):
        return "OwnLengths()"


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_follow_the_users_own_pmf(stratified, assert_drawn_from):
    pmf = torch.tensor([0, 0.1, 0.6, 0, 0.3, 0], dtype=torch.float64)
    assert_drawn_from(draw(OwnLengths(pmf), 5, 20_000, stratified=stratified), pmf)


def test_a_pmf_of_the_users_own_may_change_between_calls():
    lengths = OwnLengths(torch.tensor([1.0, 0.0], dtype=torch.float64))
    before = draw(lengths, 1, 3)
    lengths.values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    after = draw(lengths, 1, 3)
    assert (before.tolist(), after.tolist()) == ([0, 0, 0], [1, 1, 1])


ASKED: list[int] = []


@dataclass(frozen=True)
class Halves:
    """Lengths that hash by value."""

    first: float = 0.5

    def pmf(self, n):
        ASKED.append(n)
        return torch.tensor([self.first, 1 - self.first], dtype=torch.float64)


def test_the_table_of_lengths_that_hash_by_value_is_made_once():
    for first in (1.0, 1.0, 0.0, 1.0):
        assert draw(Halves(first), 1, 3).tolist() == [int(1 - first)] * 3
    assert ASKED == [1, 1]


@pytest.mark.parametrize(
    "pmf",
    [
        torch.full((5,), 0.2, dtype=torch.float64),
        torch.full((7,), 1 / 7, dtype=torch.float64),
        torch.full((1, 6), 1 / 6, dtype=torch.float64),
        torch.full((6,), 1 / 6, dtype=torch.float32),
    ],
    ids=["short", "long", "2d", "float32"],
)
def test_a_pmf_of_the_wrong_form_is_refused(pmf):
    message = rf"pmf\(n\) must return n \+ 1 = 6 float64 numbers, got .*{pmf.dtype} from OwnLengths"
    with pytest.raises(ValueError, match=message):
        draw(OwnLengths(pmf), 5, 3)


@pytest.mark.parametrize(
    "lengths",
    [
        Exponential(0.3),
        Exponential(0.0),
        Exponential(1.0),
        Exponential(0.4, min_k=5),
        Uniform(),
        Uniform(min_k=4),
        Sizes([2, 9, 2], weights=[1, 2, 3]),
        Sizes([0, 12]),
    ],
    ids=str,
)
def test_the_probability_above_k_is_the_sum_of_the_pmf(lengths):
    n = 12
    pmf = lengths.pmf(n)
    for k in range(n + 1):
        assert lengths.above(n, k) == pytest.approx(float(pmf[k + 1 :].sum()), abs=1e-12)


@given(p=st.floats(0, 1), n=st.integers(1, 300), count=st.integers(1, 200), seed=st.integers(0, 99))
def test_how_many_draws_exceed_k_is_bounded_before_drawing(p, n, count, seed):
    """In stratified draws at most ceil(count * P(K > k)) are above k, but for rounding."""
    torch.manual_seed(seed)
    lengths = Exponential(p)
    drawn = draw_uniforms(count)
    k = inverse_cdf(lengths, n, drawn)
    assert k.tolist() == sorted(k.tolist())
    assert drawn.rank.sort().values.tolist() == list(range(count))
    for bound in {0, n // 3, n - 1}:
        limit = most_above(lengths, n, bound, count)
        assert int((k > bound).sum()) <= limit
        assert limit <= math.ceil(count * float(lengths.pmf(n)[bound + 1 :].sum()) + 1e-6)


@pytest.mark.parametrize("n", [13, 1000, 10**5, 10**6])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_running_sum_is_off_by_less_than_the_slack(lengths, n):
    cdf = lengths.pmf(n).cumsum(0)
    for k in {0, 1, 3, 7, n // 4, n // 2, 3 * n // 4, n - 1}:
        assert abs(1 - float(cdf[k] / cdf[-1]) - lengths.above(n, k)) < 1e-15 * (n + 10)


def test_lengths_may_have_a_formula_for_the_probability_above():
    class WithFormula(OwnLengths):
        def above(self, n, k):
            return 0.3

    pmf = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert most_above(WithFormula(pmf), 2, 0, 100) == 31
    assert most_above(OwnLengths(pmf), 2, 0, 100) == 51
    assert most_above(OwnLengths(pmf), 2, 1, 7) == 2
