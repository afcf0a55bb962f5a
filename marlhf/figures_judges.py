"""Pictures of win rates (Fig. 4) and of how far judges agree (Table 1), from tables alone; made as
those of `marlhf.figures`, with the paper's numbers (configs/paper.yaml) beside ours."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from marlhf.figures import FONT, Picture, _legend, _panels
from marlhf.winrates import percent

JUDGES = {"RM score": ("#0072B2", "s"), "true score": ("#D55E00", "o")}
PAPER = "#555555"
OUTCOMES = {"wins": "#009E73", "ties": "#CCCCCC", "losses": "#CC79A7"}


def _interval(axis, y: float, row: pd.Series, colour: str, marker: str, **look) -> str:
    """A share with its interval, in percent; returns it in words."""
    words = percent(row["mean"])
    if math.isfinite(row["low"]):
        axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=2.2)
        words += f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    axis.plot(
        100 * row["mean"], y, marker=marker, color=colour, markersize=9, linestyle="none", **look
    )
    return words


def _names(axis, places: Sequence[float], names: Sequence[str]) -> None:
    axis.set_yticks(places, names, fontsize=FONT - 2)
    axis.set_ylim(max(places) + 0.6, min(places) - 0.6)
    axis.tick_params(axis="y", length=0)


def win_rates(table: pd.DataFrame, paper: Mapping[str, Mapping[str, Sequence[float]]]) -> Picture:
    """Fig. 4: the win rate of each comparison by each judge with its 95% t interval over chains,
    raw (filled) and at equal length (open), a panel a task; the paper's as crosses.

    `table` is `winrates.over_chains` by task, judge and comparison; `paper` is figure4 of
    configs/paper.yaml. Right of one half the arm named first is preferred.
    """
    tasks = list(dict.fromkeys(table["task"]))
    compared = list(dict.fromkeys(zip(table["label"], table["reference_label"], strict=True)))
    theirs = list(dict.fromkeys(name for task in tasks for name in paper.get(task, {})))
    figure, axes = _panels(1, len(tasks), height=1.3 + 0.85 * len(compared) + 0.4 * len(theirs))
    steps = {("RM score", "win_rate"): -0.3, ("RM score", "length_controlled"): -0.1,
             ("true score", "win_rate"): 0.1, ("true score", "length_controlled"): 0.3}  # fmt: skip
    places = [*range(len(compared)), *(len(compared) + 0.5 * i for i in range(len(theirs)))]
    words = []
    for axis, task in zip(axes[0], tasks, strict=True):
        rows = table[table["task"] == task]
        for _, row in rows.iterrows():
            y = compared.index((row["label"], row["reference_label"]))
            colour, marker = JUDGES[row["judge"]]
            raw = row["measure"] == "win_rate"
            name = row["judge"] + ("" if raw else ", at equal length")
            said = _interval(
                axis, y + steps[row["judge"], row["measure"]], row, colour, marker,
                label=name if y == 0 else None, markerfacecolor=colour if raw else "white",
            )  # fmt: skip
            if raw:
                words.append(
                    f"{task}, {row['label']} against {row['reference_label']} by "
                    f"{row['judge']} {said}"
                )
        for i, name in enumerate(theirs):
            values = paper.get(task, {}).get(name, ())
            y = len(compared) + 0.5 * i
            axis.plot(
                [100 * v for v in values], [y] * len(values), marker="x", color=PAPER,
                markersize=9, markeredgewidth=2, linestyle="none",
                label=None if i else "the paper's",
            )  # fmt: skip
            if values:
                words.append(f"the paper's {task} by {name} "
                             + " to ".join(f"{100 * v:.0f}%" for v in values))  # fmt: skip
        axis.axvline(50, color=PAPER, linewidth=1.2)
        axis.set_xlim(15, 95)
        axis.set_title(task, fontsize=FONT, loc="left")
        axis.set_xlabel("win rate (%)", fontsize=FONT)
        names = [f"{a}\nvs {b}" for a, b in compared] + [f"paper: {name}" for name in theirs]
        _names(axis, places, names if axis is axes[0, 0] else [""] * len(names))
    _legend(figure, axes[0, 0])
    return Picture(
        figure,
        "Win rates, ties as half, with 95% intervals over chains; 50% is no preference: "
        f"{'; '.join(words)}.",
    )


def outcomes(table: pd.DataFrame) -> Picture:
    """Wins, ties and losses of every comparison, all chains together, a row a judge, a column a
    task. `table` is `winrates.by_chain` of each task, with the column task."""
    tasks, judges = (list(dict.fromkeys(table[name])) for name in ("task", "judge"))
    keys = ["label", "reference_label"]
    compared = list(dict.fromkeys(zip(*(table[k] for k in keys), strict=True)))
    figure, axes = _panels(len(judges), len(tasks), height=0.9 + 0.55 * len(compared))
    words = []
    for r, judge in enumerate(judges):
        for axis, task in zip(axes[r], tasks, strict=True):
            rows = table[(table["task"] == task) & (table["judge"] == judge)]
            if rows.empty:  # no truth to judge by
                axis.remove()
                continue
            sums = rows.groupby(keys, sort=False)[[*OUTCOMES, "pairs"]].sum().loc[compared]
            left = np.zeros(len(sums))
            for name, colour in OUTCOMES.items():
                width = 100 * (sums[name] / sums["pairs"]).to_numpy()
                axis.barh(range(len(sums)), width, left=left, color=colour, label=name, height=0.7)
                for y, (start, share) in enumerate(zip(left, width, strict=True)):
                    if share >= 10:
                        axis.text(start + share / 2, y, f"{share:.0f}", ha="center", va="center",
                                  fontsize=FONT - 1)  # fmt: skip
                left += width
            for (a, b), row in sums.iterrows():
                shares = ", ".join(f"{100 * row[n] / row['pairs']:.0f}% {n}" for n in OUTCOMES)
                words.append(f"{task} by {judge}, {a} against {b}: {shares}")
            axis.set_xlim(0, 100)
            axis.set_title(f"{task}, {judge}", fontsize=FONT, loc="left")
            axis.set_xlabel("pairs (%)", fontsize=FONT)
            names = [f"{a}\nvs {b}" for a, b in compared]
            _names(axis, range(len(names)), names if axis is axes[r, 0] else [""] * len(names))
    _legend(figure, axes[0, 0])
    return Picture(figure, f"Wins, ties and losses, all chains together. {'; '.join(words)}.")


def agreement(table: pd.DataFrame, paper: Mapping[str, Sequence[float]]) -> Picture:
    """Table 1: share of pairs on which RM score and true score agree, with its 95% t interval over
    chains, by task and by what the pairs are; the paper's ranges as bands.

    `table`: task, pairs (what they are), mean, low, high, chains; `paper`: table1 of
    configs/paper.yaml.
    """
    tasks, kinds = (list(dict.fromkeys(table[name])) for name in ("task", "pairs"))
    figure, axes = _panels(1, len(tasks), height=1.3 + 0.65 * len(kinds))
    words = [
        f"the paper's {name} {100 * a:.0f} to {100 * b:.0f}%" for name, (a, b) in paper.items()
    ]
    for axis, task in zip(axes[0], tasks, strict=True):
        for (name, (low, high)), hatch in zip(paper.items(), (None, "//"), strict=False):
            face = "none" if hatch else "#CCCCCC"
            axis.axvspan(100 * low, 100 * high, facecolor=face, edgecolor="#888888", hatch=hatch,
                         linewidth=0, label=f"paper: {name}")  # fmt: skip
        for y, kind in enumerate(kinds):
            for _, row in table[(table["task"] == task) & (table["pairs"] == kind)].iterrows():
                if math.isnan(row["mean"]):  # nothing was decided
                    continue
                name = None if y else "ours: RM and true score"
                said = _interval(axis, y, row, *JUDGES["RM score"], label=name)
                words.append(f"{task}, {kind} {said}")
        axis.axvline(50, color=PAPER, linewidth=1.2)
        axis.set_xlim(15, 103)
        axis.set_title(task, fontsize=FONT, loc="left")
        axis.set_xlabel("agreement (%)", fontsize=FONT)
        names = [kind.replace(" against ", "\nvs ") for kind in kinds]
        _names(axis, range(len(kinds)), names if axis is axes[0, 0] else [""] * len(names))
    _legend(figure, axes[0, 0])
    return Picture(
        figure,
        "Agreement of RM score and true score over pairs that neither calls a tie, with 95% "
        f"intervals over chains; 50% is chance: {'; '.join(words)}.",
    )
