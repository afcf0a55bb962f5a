"""Intervals, paired differences, times to a threshold and power, over chains of runs.

A replicate is a chain: its own SFT, reward model and PPO seed. Arms are compared within a chain, so
arrays are 1-D, one number a chain, in the same order of chains in every arm. Intervals are
two-sided Student t intervals, 95% unless said otherwise. A number that is not finite raises
ValueError: a chain is never dropped in silence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval from n replicates. `f"{interval:.2f}"` formats its
    three numbers; `str` gives three significant digits: 0.412 [0.305, 0.519], n = 6."""

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(x, spec or ".3g") for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}], n = {self.n}"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Hit:
    """When a curve reached a threshold; `censored` if it had not by the horizon, and `time` is then
    the horizon itself."""

    time: float
    censored: bool


def mean_interval(x: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean +- t_{n-1} s / sqrt(n). A single replicate has no spread to go by: (-inf, inf)."""
    x = _finite("x", x)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(x))
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(
    treated: Sequence[float], control: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Mean of treated - control over chains, paired t. What a chain adds to both arms cancels."""
    treated, control = _paired(treated, control)
    return mean_interval(treated - control, confidence)


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Geometric mean of numerator / denominator over chains: a paired t interval on the log.

    For times to a threshold, ratio_interval(token, macro) is how many times sooner `macro` is. A
    censored time stands at its horizon, so a chain in which only the control missed understates
    the ratio and one in which both missed counts as 1: say how many there were.
    Raises ValueError for a time of 0 (a threshold already met before training) or less.
    """
    numerator, denominator = _paired(numerator, denominator)
    if min(numerator.min(), denominator.min()) <= 0:
        raise ValueError("ratio_interval: every time must be above 0; raise the threshold")
    log = mean_interval(np.log(numerator) - np.log(denominator), confidence)
    return Interval(math.exp(log.mean), math.exp(log.low), _exp(log.high), log.n)


def time_to_threshold(
    times: Sequence[float],
    scores: Sequence[float],
    threshold: float,
    horizon: float | None = None,
) -> Hit:
    """When an evaluation curve first reaches `threshold`.

    The first evaluation with score >= threshold is found and the crossing interpolated linearly
    between it and the one before; at the first evaluation of all, its own time. times [E] increase
    (updates, or seconds of training). A curve that has not reached the threshold at `horizon`
    (default: its last evaluation) is censored there, never dropped: the mean of the times over
    chains is the restricted mean time min(time, horizon), whose interval is `mean_interval`.
    Raises ValueError if the curve ends before the horizon.
    """
    times, scores, horizon = _curve(times, scores, horizon)
    reached = np.flatnonzero(scores >= threshold)
    if len(reached) == 0:
        return Hit(horizon, True)
    k = int(reached[0])
    if k == 0:
        time = float(times[0])
    else:
        share = (threshold - scores[k - 1]) / (scores[k] - scores[k - 1])
        time = float(times[k - 1] + share * (times[k] - times[k - 1]))
    return Hit(time, False) if time <= horizon else Hit(horizon, True)


def area_under_curve(
    times: Sequence[float], scores: Sequence[float], horizon: float | None = None
) -> float:
    """Time-averaged score from the first evaluation to `horizon` (default: the last): the area by
    the trapezoid rule, divided by the time, so that it has the unit of a score.
    Raises ValueError if the curve ends before the horizon."""
    times, scores, horizon = _curve(times, scores, horizon)
    if horizon <= times[0]:
        raise ValueError("area_under_curve: the horizon must lie after the first evaluation")
    inside = times < horizon
    at = np.append(times[inside], horizon)
    area = np.trapezoid(np.append(scores[inside], np.interp(horizon, times, scores)), at)
    return float(area / (horizon - times[0]))


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson interval of a share of n independent trials (pair accuracy, finished responses)."""
    if n < 1:
        raise ValueError("proportion_interval: there are no trials")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, `correct` of `samples` being
    so: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, Eq. 1). Raises ValueError unless
    0 <= correct <= samples and 1 <= k <= samples."""
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass_at_k: {correct} right of {samples} samples, k = {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def smallest_detectable(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean of n paired differences with spread `sd` that a two-sided t test at `alpha`
    finds with probability `power`: solves P(|T| > t_crit) = power for the noncentral t."""
    if n < 2:
        raise ValueError("smallest_detectable: a t test needs at least two chains")
    degrees = n - 1
    critical = stats.t.ppf(1 - alpha / 2, degrees)

    def excess(noncentrality):
        above = stats.nct.sf(critical, degrees, noncentrality)
        below = stats.nct.sf(critical, degrees, -noncentrality)  # nct.cdf(-critical) can be NaN
        return above + below - power

    upper = 1.0
    while excess(upper) < 0:
        upper *= 2
    return float(sd * optimize.brentq(excess, 0.0, upper) / math.sqrt(n))


def power_table(
    differences: Mapping[str, Sequence[float]], ns: Sequence[int] = (3, 6, 12)
) -> pd.DataFrame:
    """What n chains could show, a row a comparison, in the unit of its endpoint.

    differences: name -> paired differences over chains. Columns: chains, mean, sd (of the
    differences), sd_low and sd_high (its 95% chi-square interval: with six chains the spread itself
    is known to a factor of about two), and for each n in `ns` the `smallest_detectable` difference
    at power 0.8, alpha 0.05.
    """
    rows = {}
    for name, values in differences.items():
        values = _finite(name, values)
        n = len(values)
        if n < 2:
            raise ValueError(f"power_table: {name!r} has one chain; its spread needs two")
        sd = float(values.std(ddof=1))
        low, high = sd * np.sqrt((n - 1) / stats.chi2.ppf([0.975, 0.025], n - 1))
        rows[name] = {"chains": n, "mean": float(values.mean()), "sd": sd}
        rows[name] |= {"sd_low": float(low), "sd_high": float(high)}
        rows[name] |= {f"n={chains}": smallest_detectable(sd, chains) for chains in ns}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("comparison")


def _finite(name, x):
    x = np.asarray(x, dtype=float)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name}: expected one number a replicate, got shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{name}: number {bad[0]} is {x[bad[0]]}")
    return x


def _paired(a, b):
    a, b = _finite("first arm", a), _finite("second arm", b)
    if len(a) != len(b):
        raise ValueError(f"arms are paired within chains, but one has {len(a)} and one {len(b)}")
    return a, b


def _curve(times, scores, horizon):
    times, scores = _finite("times", times), _finite("scores", scores)
    if len(times) != len(scores):
        raise ValueError(f"a curve has {len(times)} times and {len(scores)} scores")
    if not (np.diff(times) > 0).all():
        raise ValueError("the times of a curve must increase")
    horizon = float(times[-1] if horizon is None else horizon)
    if horizon > times[-1]:
        raise ValueError(f"the curve ends at {times[-1]:g}, before the horizon {horizon:g}")
    return times, scores, horizon


def _exp(x):
    return math.exp(x) if x < 700 else math.inf
