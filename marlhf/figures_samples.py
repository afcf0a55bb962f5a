"""Pictures of repeated samples, from tables alone (see `figures`): scores by N (Fig. 8) and by the
sampling temperature (Fig. 21). Bands are 95% t intervals over chains."""

import math
from collections.abc import Sequence

import pandas as pd

from marlhf import stats
from marlhf.claims import number
from marlhf.figures import FONT, NAMES, SFT, Picture, _has, _legend, _panels, arms, style

SCORES = ("rm_score", "true_score")
WORDS = {**NAMES, "ref_perplexity": "perplexity (reference)", "distinct1": "distinct words (share)"}


def _look(arm: str, known: Sequence[str]) -> tuple:
    """As `figures.style`; SFT models are grey."""
    if arm.startswith("sft"):
        return SFT, (0, (1.5, 1.2)), "d"
    return style(arm, [each for each in known if not each.startswith("sft")])


def _draw(axis, frame: pd.DataFrame, x: str, y: str) -> None:
    """A line with a mark at each x and a band over chains, for every arm."""
    known = arms(frame)
    for arm, label in known.items():
        colour, dash, marker = _look(arm, list(known))
        groups = frame[frame["arm"] == arm].groupby(x)[y]
        found = [stats.mean_interval(values) for _, values in groups]
        at = list(groups.groups)
        axis.plot(
            at, [i.mean for i in found], color=colour, linestyle=dash, linewidth=2.0,
            marker=marker, markersize=5.5, label=label,
        )  # fmt: skip
        if all(math.isfinite(i.low) for i in found):
            low, high = [i.low for i in found], [i.high for i in found]
            axis.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)


def _read(frame: pd.DataFrame, x: str, measure: str, at: Sequence[float]) -> str:
    """'label 1.20, 1.95': an arm's means over chains at the given x."""
    means = frame.groupby(["arm", x])[measure].mean()
    return ", ".join(
        f"{label} " + " and ".join(number(means[arm, value]) for value in at)
        for arm, label in arms(frame).items()
    )


def best_of_n(curves: pd.DataFrame, measures: Sequence[str] = SCORES) -> Picture:
    """Fig. 8: the best of N by the RM score against N, a row a measure, a column a temperature.
    `curves` is `bestof.best_of_n`."""
    measures, temperatures = _has(curves, measures), sorted(curves["temperature"].unique())
    ns = sorted(curves["n"].unique())
    figure, axes = _panels(len(measures), len(temperatures), height=3.2)
    words = []
    for row, measure in zip(axes, measures, strict=True):
        for axis, temperature in zip(row, temperatures, strict=True):
            part = curves[curves["temperature"] == temperature]
            if axis is not row[0]:
                axis.sharey(row[0])  # before anything is drawn, so that all of it counts
            _draw(axis, part, "n", measure)
            axis.set_xscale("log", base=2)
            axis.set_xticks(ns, [f"{n}" for n in ns])
            if measure == measures[0]:
                axis.set_title(f"temperature {temperature:g}", fontsize=FONT, loc="left")
            words.append(f"{WORDS[measure]} at temperature {temperature:g}: "
                         + _read(part, "n", measure, (ns[0], ns[-1])))  # fmt: skip
        row[0].set_ylabel(WORDS[measure], fontsize=FONT)
        for axis in row[1:]:
            axis.tick_params(labelleft=False)
    for axis in axes[-1]:
        axis.set_xlabel("N", fontsize=FONT)
    _legend(figure, axes[0, 0])
    chains = curves["chain"].nunique()
    return Picture(
        figure,
        f"The best of N responses by RM score, mean and 95% interval over {chains} chains. "
        f"At N = {ns[0]} and {ns[-1]}: {'; '.join(words)}.",
    )


def by_temperature(quality: pd.DataFrame, measures: Sequence[str] = SCORES) -> Picture:
    """Fig. 21: measures against the sampling temperature, two panels a row. `quality`: an
    experiment's frame of that name (arm, label, chain, temperature, measures)."""
    measures = _has(quality, measures)
    temperatures = sorted(quality["temperature"].unique())
    ends = temperatures[0], temperatures[-1]
    figure, axes = _panels(-(-len(measures) // 2), min(2, len(measures)))
    for axis in axes.flat[len(measures) :]:
        axis.remove()
    words = []
    for axis, measure in zip(axes.flat, measures, strict=False):
        _draw(axis, quality, "temperature", measure)
        axis.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
        axis.set_xlabel("sampling temperature", fontsize=FONT)
        axis.set_ylabel(WORDS[measure], fontsize=FONT)
        words.append(f"{WORDS[measure]}: {_read(quality, 'temperature', measure, ends)}")
    _legend(figure, axes[0, 0])
    chains = quality["chain"].nunique()
    return Picture(
        figure,
        f"Held-out responses by sampling temperature, mean and 95% interval over {chains} chains. "
        f"At {ends[0]:g} and {ends[1]:g}: {'; '.join(words)}.",
    )
