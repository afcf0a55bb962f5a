"""Pictures of arms along an axis, from tables alone (see `figures` and `sweeps`).

Axes are logarithmic; what is infinite stands at the right end, behind a dotted line. Bars are 95% t
intervals over chains; a thin line is one chain, so that one sees what chains have in common.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from marlhf import stats, sweeps
from marlhf.figures import (
    FONT,
    Picture,
    _ends,
    _has,
    _lines,
    _panels,
    _said,
    arms,
    style,
)

BEYOND = 2.5  # infinity stands this many times to the right of the largest finite x


def _interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean and the two arms of its 95% t interval; no arms for a single chain."""
    found = stats.mean_interval(values)
    bars = (found.mean - found.low, found.high - found.mean)
    return (found.mean, *(bar if math.isfinite(bar) else 0.0 for bar in bars))


def _drawn(x: pd.Series) -> tuple[pd.Series, float]:
    """x with a place on paper for infinity, and the place."""
    end = BEYOND * x[np.isfinite(x)].max()
    return x.where(np.isfinite(x), end), end


def _ticks(axis, x: pd.Series, ticks: Mapping[float, str] | None) -> None:
    """Logarithmic, with ticks at the given places or at powers of ten, and ∞ where it is drawn."""
    drawn, end = _drawn(x)
    if ticks is None:
        low, high = (math.log10(v) for v in (drawn.min(), x[np.isfinite(x)].max()))
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = {10.0**p: f"{10.0**p:g}" for p in powers if low - 0.1 <= p <= high + 0.1}
    ticks = dict(ticks)
    if np.isinf(x).any():
        ticks[end] = "∞"
        axis.axvline(end / math.sqrt(BEYOND), color="#999999", linewidth=1.0, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlim(drawn.min() / 1.35, drawn.max() * 1.35)
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.xaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axis.xaxis.set_minor_locator(NullLocator())


def _measured(title: str) -> str:
    """An endpoint's name on the axis, broken where it is long."""
    return title.replace(" over training", "\nover training")


def _endpoint(axis, rows: pd.DataFrame, known: Sequence[str], by_line: bool) -> list[str]:
    """One endpoint along x (`sweeps.along` of endpoint rows): a line and its chains, a mark with
    its interval an arm, in the style of the line or of the arm itself."""
    rows, words = rows.assign(at=_drawn(rows["x"])[0]), []
    for line_arm, line in rows.groupby("line_arm", sort=False) if by_line else [(None, rows)]:
        colour, dash, _ = style(line_arm, known) if by_line else ("#777777", "-", None)
        for _, chain in line.groupby("chain"):
            axis.plot(chain["at"], chain["value"], color=colour, linewidth=0.6, alpha=0.35)
        means = line.groupby("at")["value"].mean()
        axis.plot(means.index, means, color=colour, linestyle=dash, linewidth=1.8)
        for (arm, label), one in line.groupby(["arm", "label"], sort=False):
            mark = line_arm if by_line else arm
            mean, below, above = _interval(one["value"])
            colour, _, marker = style(mark, known)
            axis.errorbar(
                one["at"].iloc[0], mean, [[below], [above]], color=colour, marker=marker,
                markersize=8, linestyle="none", linewidth=2.0, capsize=3,
                label=one["line"].iloc[0] if by_line else label,
            )  # fmt: skip
            missed = int(one["censored"].sum())
            words.append(
                f"{label} {mean:.3g}"
                + (f" ± {(below + above) / 2:.2g}" if above else "")
                + (f" ({missed} missed)" if missed else "")
            )
    axis.grid(visible=False, axis="x")
    return words


def _gains(axis, rows: pd.DataFrame, known: Sequence[str]) -> list[str]:
    """Paired differences along x (`sweeps.along` of a comparison table), filled where the interval
    leaves out 0."""
    rows, words = rows.assign(at=_drawn(rows["x"])[0]), []
    axis.axhline(0, color="#555555", linewidth=1.2)
    for _, row in rows.iterrows():
        colour, _, marker = style(row["line_arm"], known)
        clear = row["low"] > 0 or row["high"] < 0
        bars = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        axis.errorbar(
            row["at"], row["difference"], bars if np.isfinite(bars).all() else None, color=colour,
            marker=marker, markersize=8, markerfacecolor=colour if clear else "white",
            linewidth=2.0, capsize=3,
        )  # fmt: skip
        words.append(
            f"{row['label']} against {row['reference_label']} {row['difference']:.2g} "
            f"({row['low']:.2g} to {row['high']:.2g})"
        )
    axis.grid(visible=False, axis="x")
    return words


def _one_legend(figure, axes) -> None:
    """One entry a name, over all panels, below."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=min(3, len(found)),
        fontsize=FONT - 1, frameon=False, handlelength=2.6, columnspacing=1.2,
    )  # fmt: skip


def along(
    values: pd.DataFrame,
    axis: pd.DataFrame,
    x: str,
    titles: Sequence[str],
    name: str,
    ticks: Mapping[float, str] | None = None,
    over: float = 1.0,
    by_line: bool = False,
) -> Picture:
    """Endpoints along an axis, a panel an endpoint.

    values, axis: `claims.endpoints` and `sweeps.axis`; x: a column of the axis, divided by `over`;
    name: what x is; ticks: {place: text}, else powers of ten. `by_line`: a line for each n, in its
    style, else one grey line with every arm's own mark.
    """
    placed = sweeps.along(values, axis.assign(**{x: axis[x] / over}), x)
    columns = 2 if len(titles) > 1 else 1
    figure, axes = _panels(-(-len(titles) // columns), columns, height=3.3)
    known, said = list(axis["line_arm" if by_line else "arm"]), []
    for panel in axes.flat[len(titles) :]:
        panel.remove()
    for panel, title in zip(axes.flat, titles, strict=False):
        rows = placed[placed["endpoint"] == title]
        words = _endpoint(panel, rows, known, by_line)
        _ticks(panel, placed["x"], ticks)
        panel.set_xlabel(name, fontsize=FONT)
        panel.set_ylabel(_measured(title), fontsize=FONT)
        said.append(f"{title}: {', '.join(words)}")
    _one_legend(figure, axes.flat[: len(titles)])
    chains = values["chain"].nunique()
    return Picture(
        figure,
        f"Endpoints against {name}, mean and 95% interval over {chains} chains. {'; '.join(said)}.",
    )


def by_size(
    values: pd.DataFrame, comparisons: pd.DataFrame, axis: pd.DataFrame, titles: Sequence[str]
) -> Picture:
    """Fig. 9: endpoints of both arms against the parameters of the model, and to the right of each
    what macro actions gain within chains."""
    placed = sweeps.along(values, axis, "parameters")
    compared = sweeps.along(comparisons, axis, "parameters")
    ticks = {p: sweeps.size_name(p).split()[0] for p in axis["parameters"].unique()}
    figure, axes = _panels(len(titles), 2, height=3.3)
    known, said = list(axis["line_arm"]), []
    for (left, right), title in zip(axes, titles, strict=True):
        rows = placed[placed["endpoint"] == title]
        words = _endpoint(left, rows, known, by_line=True)
        gains = _gains(right, compared[compared["endpoint"] == title], known)
        for panel in (left, right):
            _ticks(panel, placed["x"], ticks)
            panel.set_xlabel("parameters", fontsize=FONT)
        left.set_ylabel(_measured(title), fontsize=FONT)
        right.set_ylabel("paired gain\nof macro actions", fontsize=FONT)
        said.append(f"{title}: {', '.join(words)}; gains: {', '.join(gains)}")
    _one_legend(figure, axes[:, 0])
    chains = values["chain"].nunique()
    return Picture(
        figure,
        f"Endpoints and paired gains against parameters, mean and 95% interval over {chains} "
        f"chains. {'. '.join(said)}.",
    )


def curves_by_group(evals: pd.DataFrame, group: str) -> Picture:
    """Held-out RM score and true score against updates, a column for each value of the column
    `group`, a row a score; all columns have the row's scale."""
    measures, groups = _has(evals, ("rm_score", "true_score")), list(evals[group].unique())
    figure, axes = _panels(len(measures), len(groups), height=2.9)
    said = []
    for row, measure in zip(axes, measures, strict=True):
        for panel, name in zip(row, groups, strict=True):
            own = evals[evals[group] == name]
            _lines(panel, own, "update", measure)
            panel.sharey(row[0])
            panel.set_title(name if measure == measures[0] else "", fontsize=FONT, loc="left")
            if panel is not row[0]:
                panel.set_ylabel("")
                panel.tick_params(labelleft=False)
            said.append(f"{name}, {_said(measure)}: {_ends(own, measure)}")
    _one_legend(figure, axes.flat)
    return Picture(
        figure,
        "Held-out scores against PPO updates, mean and 95% interval over "
        f"{evals['chain'].nunique()} chains. At the end, {'; '.join(said)}.",
    )


def training(metrics: pd.DataFrame, measures: Sequence[str]) -> Picture:
    """What training logs at every update, a panel a measure, mean and 95% interval over chains."""
    columns = 2 if len(measures) > 1 else 1
    figure, axes = _panels(-(-len(measures) // columns), columns)
    for panel, measure in zip(axes.flat, measures, strict=False):
        _lines(panel, metrics, "update", measure, chains=False)
    for panel in axes.flat[len(measures) :]:
        panel.remove()
    _one_legend(figure, axes.flat[: len(measures)])
    means = metrics.groupby("arm", sort=False)[list(measures)].mean()
    said = "; ".join(
        f"{_said(m)}: "
        + ", ".join(f"{label} {means.loc[arm, m]:.2f}" for arm, label in arms(metrics).items())
        for m in measures
    )
    return Picture(figure, f"Over PPO updates. Means over training, {said}.")
