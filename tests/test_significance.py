"""Intervals, the permutation test and Holm's correction, against scipy, enumeration and textbook formulas."""

import doctest
import itertools

import numpy as np
import pytest
import scipy.stats

from plumbing import significance
from plumbing.significance import holm, interval, sign_flip


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(significance)
    assert results.attempted >= 1 and results.failed == 0


DIFFERENCE = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 0.1, 0.0, -0.6])


def test_sign_flip_is_the_share_of_all_sign_patterns_that_reach_the_observed_sum():
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(DIFFERENCE))))  # all 256
    exact = np.mean(np.abs(patterns @ DIFFERENCE) >= abs(DIFFERENCE.sum()) - 1e-9)
    assert sign_flip(DIFFERENCE, draws=40_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip(-DIFFERENCE) == sign_flip(DIFFERENCE)  # two-sided
    assert sign_flip(DIFFERENCE * 1e-6) == sign_flip(DIFFERENCE)  # no scale


@pytest.mark.parametrize("gain", [0.0, 0.2, 0.4, 0.8])
def test_sign_flip_is_scipys(gain):
    """scipy tries all 4,096 sign patterns of twelve differences, ours draws 40,000 of them."""
    difference = np.random.default_rng(5).normal(gain, 1, size=12)
    exact = scipy.stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(difference, draws=40_000) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 40_000))


def test_sign_flip_finds_what_is_there_and_nothing_where_there_is_nothing():
    assert sign_flip(np.full(40, 0.01)) == 1 / 10_000  # the smallest p that 9,999 drawn patterns can give
    assert sign_flip(np.zeros(40)) == 1.0
    assert sign_flip(np.tile([1.0, -1.0], 20)) == 1.0
    noise = [sign_flip(np.random.default_rng(seed).normal(size=50), draws=999) for seed in range(200)]
    assert np.mean(np.array(noise) < 0.05) == pytest.approx(0.05, abs=0.04)  # false alarms come at their rate


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never falling: the last becomes 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_is_bonferroni_on_every_subset():
    """Holm's correction is Bonferroni's, closed (Marcus, Peritz and Gabriel 1976): a hypothesis counts as shown when
    every subset that it is in is refuted, and a subset of n is refuted by n times its smallest p."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 8):
        for scale in (0.01, 0.2, 1.0):
            p = (rng.random(n) * scale).round(3)  # rounded: ties come too
            subsets = [list(s) for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
            closed = [min(1.0, max(len(s) * p[s].min() for s in subsets if i in s)) for i in range(n)]
            assert holm(p.tolist()) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
@pytest.mark.parametrize("shape", [(1, 40), (12, 1)], ids=["posts", "seeds"])
def test_the_interval_over_one_factor_is_scipys(shape, statistic):
    """From the same random numbers, so to the last digits."""
    values = np.random.default_rng(1).gamma(2.0, size=shape)
    theirs = scipy.stats.bootstrap((values.ravel(),), statistic, n_resamples=2000, batch=1, method="percentile",
                                   vectorized=False, rng=np.random.default_rng(0)).confidence_interval
    assert interval(values, statistic) == pytest.approx(tuple(theirs), rel=1e-12)


def test_the_interval_over_both_factors_has_the_variance_of_both():
    """Where a value is a seed's part plus a post's part, the two variances add up."""
    seeds, posts = np.random.default_rng(2).normal(size=(2, 60))
    width = {name: np.diff(interval(values, draws=8000))[0] for name, values in
             {"both": seeds[:, None] + posts, "seeds": seeds[:, None], "posts": posts[None]}.items()}
    assert width["both"] == pytest.approx(np.hypot(width["seeds"], width["posts"]), rel=0.04)


def test_the_interval_is_the_textbooks_where_the_textbook_has_one():
    """One seed and many posts: mean +- 1.96 standard errors."""
    values = np.random.default_rng(3).normal(5, 2, size=(1, 400))
    low, high = interval(values)
    error = values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_the_interval_knows_that_seeds_differ():
    """Equal posts within a seed: only the seeds vary, and 2,000 posts do not make that certain."""
    values = np.array([[0.2], [0.5], [0.8]]).repeat(2000, axis=1)
    assert interval(values) == (pytest.approx(0.2), pytest.approx(0.8))
    same_posts = np.random.default_rng(0).normal(size=(1, 100)).repeat(3, axis=0)  # three seeds that agree on each post
    assert interval(same_posts) == pytest.approx(interval(same_posts[:1]), abs=0.03)  # are no more posts than one
