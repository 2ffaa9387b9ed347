import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from kneed import KneeLocator

from taildropout import Scree


def scree_of(loss, cov=None, count=100, ks=None):
    loss = torch.tensor(loss, dtype=torch.float64)
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


def test_two_ks_are_compared_by_students_t():
    """One contrast, d - tolerance * L_n: its bound is the textbook one."""
    count, spread, confidence = 12, 0.3, 0.9
    margin = scipy.stats.t.ppf(confidence, count - 1) * spread / math.sqrt(count)
    cov = [[spread**2, 0], [0, 0]]

    def chosen(excess):
        return scree_of([1.1 + excess, 1], cov, count).choose(0.1, confidence)

    assert chosen(-1.05 * margin) == 0
    assert chosen(-0.95 * margin) == 1


def test_bounds_of_several_ks_hold_together():
    """Of m independent contrasts with known variance the largest has the quantile c^(1/m)."""
    m, count, confidence = 8, 100_000, 0.95
    cov = np.diag([1.0] * m + [0.0])
    margin = scipy.stats.norm.ppf(confidence ** (1 / m)) / math.sqrt(count)

    def chosen(excess):
        return scree_of([1.1 + excess] * m + [1], cov, count).choose(0.1, confidence)

    assert chosen(-1.05 * margin) == 0
    assert chosen(-0.95 * margin) == m


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


def test_the_same_question_has_the_same_answer_and_leaves_the_random_state():
    scree = random_scree(0)
    before = torch.get_rng_state()
    answers = set()
    for seed in range(5):
        torch.manual_seed(seed)
        answers.add(scree.choose(0.2))
    assert len(answers) == 1
    torch.manual_seed(0)
    scree.choose(0.2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state())
    assert before.shape == after.shape


REPEATS, SAMPLES, TOLERANCE, CONFIDENCE = 2000, 200, 0.1, 0.9
MEANS = np.array([2.0, 1.3, 1.12, 1.1001, 1.05, 1.0])


def independent(generator):
    return MEANS + generator.normal(scale=0.5, size=(SAMPLES, 6))


def correlated(generator):
    common = generator.normal(scale=2, size=(SAMPLES, 1))
    return MEANS + common + generator.normal(scale=0.2, size=(SAMPLES, 6))


def random_walk(generator):
    steps = generator.normal(scale=0.3, size=(SAMPLES, 6))
    return MEANS + steps[:, ::-1].cumsum(1)[:, ::-1]


def heavy_tailed(generator):
    return MEANS + 0.3 * generator.standard_t(df=5, size=(SAMPLES, 6))


def skewed(generator):
    common = generator.exponential(size=(SAMPLES, 1))
    return MEANS * common + 0.2 * (generator.exponential(size=(SAMPLES, 6)) - 1)


@pytest.mark.parametrize("losses", [independent, correlated, random_walk, heavy_tailed, skewed])
def test_the_chosen_k_keeps_the_tolerance_with_the_confidence_that_was_asked_for(losses):
    generator = np.random.default_rng(0)
    violations = 0
    for _ in range(REPEATS):
        k = scree_from(losses(generator)).choose(TOLERANCE, CONFIDENCE)
        violations += MEANS[k] > (1 + TOLERANCE) * MEANS[-1]
    limit = scipy.stats.binom.ppf(0.999, REPEATS, 1 - CONFIDENCE)
    assert violations <= limit


def test_more_samples_find_the_k_that_is_good_enough():
    """The bound is no excuse for always answering n: k = 4 is within the tolerance."""
    generator = np.random.default_rng(0)
    samples = np.concatenate([independent(generator) for _ in range(100)])
    assert scree_from(samples).choose(TOLERANCE) == 4


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


def test_a_k_of_unknown_spread_is_not_vouched_for():
    cov = torch.diag(torch.tensor([0.0, NAN, 0.0]))
    assert scree_of([1, 1, 1], cov).choose(0.5) == 2


# --- explain ----------------------------------------------------------------------------------


def test_explain_says_how_many_samples_would_do():
    """At that many, with the same losses and spread, the answer is the smaller k."""
    loss, cov = [1.3, 1.08, 1.0], 0.1 * np.eye(3)
    text = scree_of(loss, cov, 100).explain(0.1)
    assert text.startswith("k = 2 of 2: nothing smaller can be vouched for with 95% confidence")
    needed = int(text.partition("about ")[2].partition(" samples")[0].replace(",", ""))
    assert scree_of(loss, cov, needed).choose(0.1) == 1
    assert scree_of(loss, cov, int(0.8 * needed)).choose(0.1) == 2


def test_explain_says_which_tolerance_would_do():
    loss, cov = [1.3, 1.2, 1.0], 0.1 * np.eye(3)
    scree = scree_of(loss, cov, 100)
    text = scree.explain(0.1)
    assert "k = 1 measures +20.0%, more than the tolerance, or a tolerance of " in text
    enough = int(text.rpartition("tolerance of ")[2].removesuffix("%."))
    assert scree.choose((enough + 1) / 100) == 1
    assert scree.choose((enough - 3) / 100) == 2


def test_explain_of_a_smaller_k():
    text = scree_of([4, 1.05, 1]).explain(0.1)
    assert text.splitlines()[0] == (
        "k = 1 of 2: +5.0% against k = 2, and at most +10.0% with 95% confidence from 100 samples."
    )
    assert text.splitlines()[1].startswith("k = 0 measures +300.0%, more than the tolerance")


def test_explain_of_the_smallest_k_has_nothing_to_add():
    assert len(scree_of([1, 1]).explain().splitlines()) == 1


# --- rules of thumb ---------------------------------------------------------------------------

curves = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=2, max_size=20)


@given(loss=curves, spread=st.floats(0, 50), count=st.integers(2, 50))
def test_one_standard_error_is_the_first_within_it(loss, spread, count):
    scree = scree_of(loss, spread**2 * np.eye(len(loss)), count)
    limit = min(loss) + math.sqrt(spread**2 / count)
    assert scree.one_standard_error() == next(k for k, y in enumerate(loss) if y <= limit)


def test_one_standard_error_needs_two_samples():
    with pytest.raises(ValueError, match="at least two samples, got one"):
        scree_of([2, 1], count=1).one_standard_error()


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
