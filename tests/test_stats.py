"""Intervals and power against textbook numbers, scipy's own tests and simulation; times and areas
on curves worked out by hand. Every simulation is seeded; its tolerance is stated in standard
errors."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from marlhf.stats import (
    Hit,
    Interval,
    area_under_curve,
    mean_interval,
    paired_interval,
    pass_at_k,
    power_table,
    proportion_interval,
    ratio_interval,
    smallest_detectable,
    time_to_threshold,
)


def covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def chains(rng, n, arms=2, between=1.0, within=0.2):
    """Scores [arms, n]: what a chain adds to all its arms, and what each run adds."""
    return between * rng.normal(size=n) + within * rng.normal(size=(arms, n))


# Intervals


def test_mean_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, t_2(.975) = 4.303: 2 -+ 4.303 / sqrt(3)."""
    interval = mean_interval([1, 2, 3])
    assert interval.mean == 2
    assert interval.n == 3
    assert interval.high - 2 == pytest.approx(2.4841, abs=1e-4)
    assert 2 - interval.low == pytest.approx(2.4841, abs=1e-4)
    assert mean_interval([1, 2, 3], 0.5).high - 2 == pytest.approx(0.8165 / 3**0.5, abs=1e-4)


def test_one_chain_shows_no_spread_and_equal_chains_none():
    assert mean_interval([3.0]) == Interval(3.0, -math.inf, math.inf, 1)
    assert mean_interval([3.0, 3.0]) == Interval(3.0, 3.0, 3.0, 2)


def test_paired_interval_is_scipys_paired_t():
    a, b = chains(np.random.default_rng(0), 6)
    expected = stats.ttest_rel(a, b).confidence_interval()
    interval = paired_interval(a, b)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx((a - b).mean())


def test_pairing_takes_the_chain_out():
    a, b = chains(np.random.default_rng(1), 6)
    shifts = np.array([10, -20, 30, -40, 50, -60])
    assert paired_interval(a + shifts, b + shifts).high == pytest.approx(paired_interval(a, b).high)


@pytest.mark.parametrize("n, confidence", [(3, 0.95), (6, 0.95), (6, 0.8)])
def test_intervals_cover(n, confidence):
    """1,000 experiments of n chains: coverage within 4 standard errors of the promise, while the
    chain's own spread is five times the runs'."""
    rng = np.random.default_rng(n)
    mean, paired, ratio = [], [], []
    for _ in range(1000):
        a, b = chains(rng, n)
        mean.append(mean_interval(a + 3, confidence))
        paired.append(paired_interval(a + 0.5, b, confidence))
        ratio.append(ratio_interval(np.exp(a + 0.5), np.exp(b), confidence))
    slack = 4 * math.sqrt(confidence * (1 - confidence) / 1000)
    assert covered(mean, 3) == pytest.approx(confidence, abs=slack)
    assert covered(paired, 0.5) == pytest.approx(confidence, abs=slack)
    assert covered(ratio, math.exp(0.5)) == pytest.approx(confidence, abs=slack)


def test_ratio_interval_is_a_geometric_mean():
    """Ratios 2 and 8: geometric mean 4; twice as slow and twice as fast: 1."""
    assert ratio_interval([2, 8], [1, 1]).mean == pytest.approx(4)
    assert ratio_interval([2, 1], [1, 2]).mean == pytest.approx(1)
    times = np.array([60.0, 70.0, 55.0]), np.array([42.0, 60.0, 40.0])
    there, back = ratio_interval(*times), ratio_interval(*times[::-1])
    assert (1 / back.high, 1 / back.low) == pytest.approx((there.low, there.high))
    assert ratio_interval([2.0], [1.0]) == Interval(2.0, 0.0, math.inf, 1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.78])
def test_wilson_covers(p):
    """Exact coverage at n = 50, by enumeration: near 95% though counts are few."""
    k = np.arange(51)
    intervals = [proportion_interval(int(successes), 50) for successes in k]
    inside = [interval.low <= p <= interval.high for interval in intervals]
    assert stats.binom.pmf(k, 50, p) @ inside == pytest.approx(0.95, abs=0.025)


def test_wilson_by_hand():
    """25 of 50: centre 1/2, half width z sqrt(1/200 + z^2/10000) / (1 + z^2/50): 13 points."""
    z = 1.959964
    half = z * math.sqrt(1 / 200 + z**2 / 10000) / (1 + z**2 / 50)
    interval = proportion_interval(25, 50)
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert proportion_interval(50, 50).high == 1.0
    assert 0.9 < proportion_interval(50, 50).low < 1.0


def test_interval_text():
    interval = Interval(0.41234, -0.30567, 12.5, 6)
    assert str(interval) == f"{interval}" == "0.412 [-0.306, 12.5], n = 6"
    assert f"{interval:.1f}" == "0.4 [-0.3, 12.5], n = 6"


# Curves


def test_time_to_threshold_interpolates():
    times, scores = [0, 10, 20, 30], [0.0, 1.0, 3.0, 2.0]
    assert time_to_threshold(times, scores, 2.0) == Hit(15.0, False)
    assert time_to_threshold(times, scores, 1.0) == Hit(10.0, False)
    assert time_to_threshold(times, scores, 3.0) == Hit(20.0, False)
    assert time_to_threshold(times, scores, 0.0) == Hit(0.0, False)
    assert time_to_threshold(times, scores, -1.0) == Hit(0.0, False)


def test_time_to_threshold_is_the_first_crossing():
    assert time_to_threshold([0, 1, 2, 3, 4], [0, 2, 0, 2, 4], 1.0) == Hit(0.5, False)


def test_misses_are_censored_at_the_horizon():
    times, scores = [0, 10, 20, 30], [0.0, 1.0, 3.0, 2.0]
    assert time_to_threshold(times, scores, 3.5) == Hit(30.0, True)
    assert time_to_threshold(times, scores, 2.0, horizon=15) == Hit(15.0, False)
    assert time_to_threshold(times, scores, 2.0, horizon=14) == Hit(14.0, True)
    with pytest.raises(ValueError, match="ends at 30, before the horizon 40"):
        time_to_threshold(times, scores, 2.0, horizon=40)


def test_area_under_curve_by_hand():
    """0 to 1 in 10, 1 to 3 in 10, 3 to 2 in 10: areas 5, 20, 25; up to 15 also 5 + 5 (1 + 2)/2."""
    times, scores = [0, 10, 20, 30], [0.0, 1.0, 3.0, 2.0]
    assert area_under_curve(times, scores) == pytest.approx(50 / 30)
    assert area_under_curve(times, scores, horizon=20) == pytest.approx(25 / 20)
    assert area_under_curve(times, scores, horizon=15) == pytest.approx(12.5 / 15)
    assert area_under_curve([5, 10], [7.0, 7.0]) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="must lie after the first"):
        area_under_curve(times, scores, horizon=0)


# Power


@pytest.mark.parametrize("n, power", [(2, 0.8), (3, 0.8), (6, 0.8), (12, 0.8), (6, 0.9)])
def test_smallest_detectable_by_simulation(n, power):
    """20,000 experiments at the difference it names: significant in `power` of them (4 standard
    errors)."""
    effect = smallest_detectable(2.0, n, power)
    draws = np.random.default_rng(n).normal(effect, 2.0, size=(20_000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / 20_000))


def test_smallest_detectable_scales_and_approaches_the_normal():
    assert smallest_detectable(3.0, 6) == pytest.approx(3 * smallest_detectable(1.0, 6))
    assert smallest_detectable(0.0, 6) == 0
    normal = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / math.sqrt(400)
    assert smallest_detectable(1.0, 400) == pytest.approx(normal, rel=0.01)
    assert smallest_detectable(1.0, 6, alpha=0.01) > smallest_detectable(1.0, 6)


def test_power_table():
    a, b = chains(np.random.default_rng(2), 6)
    table = power_table({"auc": a - b, "time": [1.0, 2.0, 4.0]}, ns=(3, 6))
    assert list(table.index) == ["auc", "time"]
    assert list(table.columns) == ["chains", "mean", "sd", "sd_low", "sd_high", "n=3", "n=6"]
    row = table.loc["time"]
    assert row["chains"] == 3
    assert row["mean"] == pytest.approx(7 / 3)
    assert row["sd"] == pytest.approx(math.sqrt(7 / 3))
    assert row["n=6"] == pytest.approx(smallest_detectable(math.sqrt(7 / 3), 6))
    assert row["n=3"] > row["n=6"] > 0


def test_power_tables_spread_covers():
    """sd_low and sd_high hold the true spread in 95% of 1,500 experiments (4 standard errors)."""
    draws = np.random.default_rng(3).normal(0, 2.0, size=(1500, 6))
    table = power_table({str(i): row for i, row in enumerate(draws)}, ns=())
    inside = (table["sd_low"] <= 2) & (table["sd_high"] >= 2)
    assert inside.mean() == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1500))


# Errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_interval([1.0, math.nan]), "x: number 1 is nan"),
        (lambda: mean_interval([]), "expected one number a replicate"),
        (lambda: mean_interval([[1.0, 2.0]]), r"got shape \(1, 2\)"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "one has 2 and one 1"),
        (lambda: ratio_interval([1.0, 0.0], [1.0, 1.0]), "above 0; raise the threshold"),
        (lambda: proportion_interval(0, 0), "there are no trials"),
        (lambda: smallest_detectable(1.0, 1), "at least two chains"),
        (lambda: power_table({"auc": [1.0]}), "'auc' has one chain"),
        (lambda: time_to_threshold([0, 1], [0.0], 1.0), "2 times and 1 scores"),
        (lambda: time_to_threshold([0, 0], [0.0, 1.0], 1.0), "must increase"),
        (lambda: time_to_threshold([0, 1], [0.0, math.nan], 1.0), "scores: number 1 is nan"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    """Against enumeration: all ways to take k of the samples without putting any back."""
    for correct in range(samples + 1):
        right = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(right, k))
            share = sum(map(any, draws)) / len(draws)
            assert pass_at_k(correct, samples, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("numbers", [(-1, 3, 1), (4, 3, 1), (1, 3, 0), (1, 3, 4)])
def test_pass_at_k_refuses_what_was_not_sampled(numbers):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(*numbers)
