import math
import re
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from kneed import KneeLocator

from taildropout import Choice, Scree


def scree_of(loss, cov=None, count=100, ks=None):
    loss = torch.as_tensor(loss, dtype=torch.float64)
    cov = torch.zeros(len(loss), len(loss)) if cov is None else torch.as_tensor(cov)
    return Scree("layer", list(range(len(loss))) if ks is None else ks, loss, count, cov.double())


def scree_from(samples):
    """Of per-sample losses, `(samples, ks)`."""
    return scree_of(samples.mean(0).tolist(), np.cov(samples.T), len(samples))


@pytest.mark.parametrize(
    ("loss", "tolerance", "k"),
    [
        ([4, 2, 1.1, 1], 0.1, 2),
        ([4, 2, 1.1, 1], 0.0999, 3),
        ([4, 2, 1.1, 1], 1, 1),
        ([4, 2, 1.1, 1], 3, 0),
        ([4, 2, 1.1, 1], 0, 3),
        ([4, 2, 1.25, 1], 0.25, 2),  # at most the tolerance, not below it
        ([2, 1, 1e-9, 0], 0.5, 3),  # a fraction of 0 is 0
        ([2, 1, 0, 0], 0.5, 2),
        ([1, 1, 1, 1], 0, 0),
        ([1, 1, 4, 1], 0.1, 3),  # every larger k must keep the tolerance too
        ([3, 1, 0.5, 1], 0.1, 1),  # a curve that gets worse at its end
        ([-1, -1.85, -1.95, -2], 0.1, 1),  # negative losses: a fraction of |L_n|
        ([5], 0.1, 0),
    ],
)
def test_without_uncertainty_the_tolerance_decides(loss, tolerance, k):
    assert scree_of(loss).choose(tolerance) == k


def test_the_answer_is_one_of_the_measured_ks():
    assert scree_of([4, 1.05, 1], ks=[0, 7, 64]).choose(0.1) == 7


def test_by_default_one_percent_with_95_percent_confidence():
    assert scree_of([4, 1.0099, 1]).choose() == 1
    assert scree_of([4, 1.0101, 1]).choose() == 2
    t = scipy.stats.t.ppf(0.95, 99)
    for inside, k in [(1.05, 0), (0.95, 1)]:
        assert scree_of([1.01 - inside * t * 0.001, 1], [[1e-4, 0], [0, 0]]).choose() == k


def factor_of(cov, count, confidence):
    """How many of their standard errors all ks must lie below n for the smallest to be chosen."""
    cov = np.asarray(cov, dtype=np.float64)
    contrasts = np.eye(len(cov))[:-1] - np.eye(len(cov))[-1]
    stderr = np.sqrt(np.diag(contrasts @ cov @ contrasts.T) / count)
    low, high = 0.0, 1000.0
    for _ in range(40):
        middle = (low + high) / 2
        if scree_of([*(-middle * stderr), 0], cov, count).choose(0, confidence) == 0:
            high = middle
        else:
            low = middle
    return high


def assert_is_quantile(cdf_of_factor, confidence):
    """Within four standard errors of a quantile that 20,000 simulations give."""
    assert abs(cdf_of_factor - confidence) < 4 * (confidence * (1 - confidence) / 20_000) ** 0.5


@pytest.mark.parametrize("contrasts", [1, 4])
@pytest.mark.parametrize(("count", "confidence"), [(2, 0.9), (5, 0.99), (40, 0.6), (10**6, 0.95)])
def test_one_difference_or_copies_of_it_have_the_factor_of_student(contrasts, count, confidence):
    cov = np.zeros((contrasts + 1, contrasts + 1))
    cov[-1, -1] = 9.0
    factor = factor_of(cov, count, confidence)
    assert_is_quantile(scipy.stats.t.cdf(factor, count - 1), confidence)


def separate(size):
    return np.diag([*np.arange(1.0, size), 0.0])


def same_reference(size):
    return np.diag([1.0] * size)


def walk(size):
    return np.minimum.outer(np.arange(size), np.arange(size))[::-1, ::-1].copy()


@pytest.mark.parametrize("cov", [separate(6), same_reference(6), walk(5)])
@pytest.mark.parametrize(("count", "confidence"), [(4, 0.9), (30, 0.95), (10**6, 0.99)])
def test_the_factor_is_the_quantile_of_the_largest_of_several_errors(cov, count, confidence):
    contrasts = np.eye(len(cov))[:-1] - np.eye(len(cov))[-1]
    differences = contrasts @ cov @ contrasts.T
    scale = np.sqrt(np.diag(differences))
    errors = scipy.stats.multivariate_t(shape=differences / np.outer(scale, scale), df=count - 1)
    factor = factor_of(cov, count, confidence)
    assert_is_quantile(
        errors.cdf([factor] * len(scale), random_state=0, maxpts=200_000), confidence
    )


def test_independent_errors_of_many_samples_have_a_closed_form():
    factor = factor_of(separate(11), 10**7, 0.95)
    assert_is_quantile(scipy.stats.norm.cdf(factor) ** 10, 0.95)


@pytest.mark.parametrize("full", [1.0, -1.0])
def test_the_error_of_the_tolerance_itself_counts(full):
    """The bound is on L_0 - L_1 - tolerance * |L_1|, here with a large tolerance."""
    count, tolerance = 50, 0.5
    stderr = np.hypot(1, 1 + tolerance * full) * 0.1 / count**0.5
    t = scipy.stats.t.ppf(0.95, count - 1)
    for inside, k in [(1.03, 0), (0.97, 1)]:
        loss = full + tolerance - inside * t * stderr
        assert scree_of([loss, full], 0.01 * np.eye(2), count).choose(tolerance) == k


def test_losses_that_move_together_are_compared_sample_by_sample():
    """Each loss is uncertain by 1, their difference by a thousandth of that."""
    common = 100 * np.ones((2, 2))
    assert scree_of([10.5, 10], common + 1e-4 * np.eye(2), 100).choose(0.1) == 0
    assert scree_of([10.5, 10], 100 * np.eye(2), 100).choose(0.1) == 1


def random_scree(seed, count=50, ks=6):
    generator = np.random.default_rng(seed)
    steps = generator.exponential(size=(count, ks)) * np.linspace(1, 0, ks) ** 2
    return scree_from(1 + steps + generator.normal(scale=0.3, size=(count, 1)))


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e9])
def test_the_unit_of_the_loss_does_not_matter(scale):
    for seed in range(10):
        one = random_scree(seed)
        other = scree_of((one.loss * scale).tolist(), one.cov * scale**2, one.count)
        assert one.choose(0.2) == other.choose(0.2)
        assert one.one_standard_error() == other.one_standard_error()
        assert one.knee() == other.knee()


def test_the_same_question_has_the_same_answer_and_draws_nothing():
    factors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        factors.append(factor_of(separate(4), 10, 0.95))
        assert torch.equal(torch.get_rng_state(), before)
    assert factors[0] == factors[1]


REPEATS, SAMPLES, TOLERANCE, CONFIDENCE = 2000, 200, 0.1, 0.9
MEANS = np.array([1.3, 1.1001, 1.05, 1.0])


def independent(generator):
    return MEANS + generator.normal(scale=0.5, size=(SAMPLES, 4))


def heavy_tailed(generator):
    """Lognormal, with a common factor of the sample."""
    common = generator.normal(scale=0.6, size=(SAMPLES, 1))
    own = generator.normal(scale=0.8, size=(SAMPLES, 4))
    return MEANS * np.exp(common + own - 0.5)


def violations(losses, means):
    generator = np.random.default_rng(0)
    ks = [scree_from(losses(generator)).choose(TOLERANCE, CONFIDENCE) for _ in range(REPEATS)]
    return sum(means[k] > (1 + TOLERANCE) * means[-1] for k in ks)


@pytest.mark.slow
@pytest.mark.parametrize("losses", [independent, heavy_tailed])
def test_the_chosen_k_keeps_the_tolerance_with_the_confidence_that_was_asked_for(losses):
    limit = scipy.stats.binom.ppf(0.999, REPEATS, 1 - CONFIDENCE)
    assert violations(losses, MEANS) <= limit


@pytest.mark.slow
def test_where_there_is_one_error_the_confidence_is_used_up():
    """Every smaller k computes the same, a hair too bad: the bound must not be wider than asked."""
    means = np.array([1.1 + 1e-9, 1.1 + 1e-9, 1.1 + 1e-9, 1])

    def losses(generator):
        full, rise = generator.standard_t(5, (SAMPLES, 1)), generator.normal(size=(SAMPLES, 1))
        return means + 0.1 * full + 0.1 * rise * [1, 1, 1, 0]

    lowest, highest = scipy.stats.binom.interval(0.998, REPEATS, 1 - CONFIDENCE)
    assert lowest <= violations(losses, means) <= highest


def test_more_samples_find_the_k_that_is_good_enough():
    """The bound is no excuse for always answering n: k = 2 is within the tolerance."""
    generator = np.random.default_rng(0)
    samples = np.concatenate([independent(generator) for _ in range(100)])
    assert scree_from(samples).choose(TOLERANCE) == 2


def test_pure_noise_has_nothing_to_choose_from():
    """With equal losses everywhere, enough samples vouch for k = 0."""
    generator = np.random.default_rng(0)
    assert scree_from(1 + generator.normal(scale=0.1, size=(5000, 6))).choose(0.05) == 0


NAN = float("nan")


@pytest.mark.parametrize(
    ("loss", "count", "options", "words"),
    [
        ([2, 1], 100, {"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ([2, 1], 100, {"tolerance": NAN}, "tolerance must be at least 0, got nan"),
        ([2, 1], 100, {"confidence": 0}, "confidence must be between 0 and 1, got 0"),
        ([2, 1], 100, {"confidence": 1}, "confidence must be between 0 and 1, got 1"),
        ([2, 1], 1, {}, "at least two samples"),
        ([2, NAN, 1], 100, {}, r"finite, got NaN or infinity at k = \[1\]"),
        ([math.inf, 1], 100, {}, r"finite, got NaN or infinity at k = \[0\]"),
    ],
)
def test_what_cannot_be_answered_is_refused(loss, count, options, words):
    scree = scree_of(loss, count=count)
    for ask in (scree.choose, scree.explain):
        with pytest.raises(ValueError, match=words):
            ask(**options)


@pytest.mark.parametrize(("unknown", "k"), [(0, 1), (1, 2), (2, 2)])
def test_a_k_of_unknown_spread_is_not_vouched_for(unknown, k):
    cov = torch.eye(3) * 1e-3
    cov[unknown, unknown] = NAN
    assert scree_of([1, 1, 1], cov).choose(0.5) == k


# --- the answer -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Scree.choose, Scree.one_standard_error, Scree.knee])
def test_the_answer_names_the_layer_that_was_measured(rule):
    answer = rule(scree_of([8, 2, 1.5, 1.2, 1.0]))
    assert isinstance(answer, Choice)
    assert answer.layer == "layer"


# --- explain ----------------------------------------------------------------------------------


def test_explain_says_how_many_samples_would_do():
    """At that many, with the same losses and spread, the answer is the smaller k."""
    loss, cov = [1.3, 1.08, 1.0], 0.1 * np.eye(3)
    text = scree_of(loss, cov, 100).explain(0.1)
    assert text.startswith("k = 2 of 2: nothing smaller can be vouched for with 95% confidence")
    needed = int(text.partition("about ")[2].partition(" samples")[0].replace(",", ""))
    assert scree_of(loss, cov, needed).choose(0.1) == 1
    assert scree_of(loss, cov, int(0.8 * needed)).choose(0.1) == 2


ADVICE = [
    (r"about ([\d,]+) samples", lambda scree, n: scree_of(scree.loss, scree.cov, n).choose(0.1)),
    (r"tolerance of (\d+)%", lambda scree, percent: scree.choose(percent / 100)),
]


@pytest.mark.parametrize(("pattern", "follow"), ADVICE, ids=["samples", "tolerance"])
def test_the_advice_of_explain_leads_one_k_further_down(pattern, follow):
    generator = np.random.default_rng(0)
    for _ in range(30):
        noise = generator.normal(scale=0.4, size=(60, 5))
        scree = scree_from(noise - noise.mean(0) + [1.5, 1.3, 1.08, 1.05, 1])
        assert scree.choose(0.1) == 4
        (number,) = re.findall(pattern, scree.explain(0.1))
        assert follow(scree, int(number.replace(",", ""))) < 4


def test_the_tolerance_of_explain_is_the_smallest_whole_percent_that_will_do():
    """Against asking for each of them."""
    generator = np.random.default_rng(0)
    for level in [1, 1, 1, 0.4, -1]:
        noise = generator.normal(scale=0.3, size=(60, 5))
        scree = scree_from(noise - noise.mean(0) + [0.5, 0.3, 0.08, 0.05, 0] + level)
        chosen = scree.choose(0.1)
        (percent,) = re.findall(r"tolerance of (\d+)%", scree.explain(0.1))
        asked = (p for p in range(11, 301) if scree.choose(p / 100) < chosen)
        assert int(percent) == next(asked)


def test_explain_says_how_far_the_bound_reaches():
    """One difference of +8 % with a standard error of 1 %."""
    text = scree_of([1.08, 1], [[1e-4 * 400, 0], [0, 0]], 400).explain(0.09, confidence=0.9)
    bound = 8 + scipy.stats.t.ppf(0.9, 399)
    assert f"may be up to +{bound:.1f}% where +9.0% is allowed" in text
    assert "about 660 samples" in text  # 400 * 1.284 ** 2 = 659.2
    assert "or a tolerance of 10%" in text


@pytest.mark.parametrize(
    ("loss", "tolerance", "rise"), [([4, 1.25, 1.125, 1], 0.2, 25), ([4, 2, -6, -8], 0.25, 125)]
)
def test_explain_asks_for_the_measured_rise_where_that_is_certain(loss, tolerance, rise):
    below = scree_of(loss).explain(tolerance).splitlines()[1]
    assert below.startswith(f"k = 1 measures +{rise}.0%, where +{100 * tolerance}")
    assert re.findall(r"tolerance of (\d+)%", below) == [str(rise)]


def test_explain_has_no_percentages_of_a_loss_of_zero():
    assert scree_of([2, 0.5, 0]).explain().splitlines()[1] == (
        "k = 1 measures +0.5, where +0 is allowed."
    )


@pytest.mark.parametrize(("confidence", "words"), [(0.5, "50%"), (0.999, "99.9%")])
def test_explain_names_the_confidence(confidence, words):
    assert f"with {words} confidence" in scree_of([2, 1]).explain(0.1, confidence)


def test_explain_of_a_smaller_k():
    text = scree_of([4, 1.05, 1]).explain(0.1)
    assert text.splitlines()[0] == (
        "k = 1 of 2: +5.0% against k = 2, and at most +10.0% with 95% confidence from 100 samples."
    )
    assert text.splitlines()[1].startswith("k = 0 measures +300.0%, where +10.0% is allowed")


def test_explain_of_the_smallest_k_has_nothing_to_add():
    assert len(scree_of([1, 1]).explain().splitlines()) == 1


# --- rules of thumb ---------------------------------------------------------------------------


@given(
    losses=st.lists(st.floats(-100, 100), min_size=2, max_size=9, unique=True),
    spreads=st.lists(st.floats(0, 50), min_size=9, max_size=9),
    count=st.integers(2, 50),
)
def test_one_standard_error_is_the_first_within_that_of_the_smallest(losses, spreads, count):
    spreads = np.array(spreads[: len(losses)])
    best = np.argmin(losses)
    limit = losses[best] + np.sqrt(spreads[best] ** 2 / count)
    scree = scree_of(losses, np.diag(spreads**2), count)
    assert scree.one_standard_error() == next(k for k, y in enumerate(losses) if y <= limit)


def test_one_standard_error_needs_two_samples():
    with pytest.raises(ValueError, match="at least two samples, got one"):
        scree_of([2, 1], count=1).one_standard_error()


@pytest.mark.parametrize("rule", [Scree.one_standard_error, Scree.knee])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_rules_of_thumb_need_finite_losses(rule, bad):
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity at k = \[4, 9\]"):
        rule(scree_of([2, bad, 1, bad], ks=[0, 4, 5, 9]))


def kneed(ks, loss):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kneed's, where there is no knee
        return KneeLocator(ks, loss, S=1, curve="convex", direction="decreasing").knee


@given(loss=st.lists(st.integers(0, 30), min_size=3, max_size=20).filter(lambda x: len(set(x)) > 1))
def test_the_knee_is_that_of_the_package_kneed(loss):
    assert scree_of(loss).knee() == kneed(list(range(len(loss))), loss)


@given(
    drops=st.lists(st.floats(0.01, 10), min_size=3, max_size=15),
    gaps=st.lists(st.integers(1, 9), min_size=16, max_size=16),
)
def test_the_knee_of_falling_curves_at_any_ks(drops, gaps):
    loss = list(np.cumsum(sorted(drops))[::-1])
    ks = list(np.cumsum(gaps)[: len(loss)])
    assert scree_of(loss, ks=ks).knee() == kneed(ks, loss)


def test_a_flat_curve_has_no_knee():
    assert scree_of([1, 1, 1]).knee() is None
