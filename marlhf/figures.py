"""Pictures from tables alone: every function takes DataFrames and returns a `Picture`, a matplotlib
figure with its alternative text. Nothing here runs, loads or knows a model.

Tables are those of an experiment (columns arm, label, chain, then the run's own) or of `report`.
Arms keep one colour, line style and marker in all pictures (most of Okabe and Ito's palette; line
styles differ too, for those who print in grey). Fonts are sized to be read at half a page's width.
Bands are 95% t intervals over chains, the replicates; a thin line is one chain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from marlhf import runs, stats

FONT = 13  # points
DASH, DOTS, MIXED = (0, (5, 2)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))
LONG, SHORT = (0, (8, 2)), (0, (3, 1, 1, 1))
STYLES = {  # arm: colour, line style, marker; told apart within every experiment
    # token PPO by λ, darkest at the paper's 0.95: greys below it, greens and blue above
    "token_80": ("#B8B8B8", DOTS, "v"),
    "token_90": ("#7D7D7D", SHORT, "<"),
    "token": ("#000000", "-", "o"),
    "token_99": ("#00664B", LONG, ">"),
    "token_matched": ("#009E73", DASH, "^"),
    "token_mc": ("#56B4E9", DOTS, "p"),
    # by n, the longer the darker
    "macro3": ("#EDB120", SHORT, "X"),
    "macro5": ("#D55E00", "-", "s"),
    "macro10": ("#A8226C", LONG, "P"),
    "whole": ("#3F2B96", MIXED, "D"),
    # n = 5 by λ, the larger the darker
    "macro5_80": ("#F7CDA6", DOTS, "X"),
    "macro5_90": ("#EC974F", SHORT, "P"),
    "macro5_99": ("#983F00", LONG, "D"),
    "macro5_mc": ("#5A2600", DASH, "h"),
    # by size
    "token_small": ("#B8B8B8", DOTS, "v"),
    "token_large": ("#5F6B7A", DASH, "^"),
    "macro5_small": ("#F2AE6E", SHORT, "X"),
    "macro5_large": ("#8A3900", LONG, "D"),
    # other ends of a macro action
    "random": ("#0072B2", DASH, "^"),
    "perplexity": ("#CC79A7", DOTS, "v"),
    "parsing": ("#009E73", MIXED, "D"),
    # other weights of its values
    "unit": ("#0072B2", DASH, "^"),
    "decay": ("#E8B000", DOTS, "v"),
    "first": ("#009E73", MIXED, "D"),
    # other estimators, and the official code's
    "mean_rewards": ("#0072B2", DASH, "^"),
    "whitened": ("#E8B000", DOTS, "v"),
    "critic_policy": ("#009E73", MIXED, "D"),
    "critic_zero": ("#8E2F73", LONG, "P"),
    "token_whitened": ("#A8A8A8", SHORT, "X"),
    "token_empty": ("#A8A8A8", SHORT, "X"),
    "last_alone": ("#E8B000", DOTS, "v"),
    "empty_step": ("#009E73", MIXED, "D"),
    "official": ("#8E2F73", LONG, "P"),
}
SPARE = [
    ("#56B4E9", SHORT, "X"),
    ("#7F7F7F", DOTS, "<"),
    ("#8C510A", "-", ">"),
    ("#35978F", LONG, "h"),
]
SFT = "#888888"
NAMES = {
    "rm_score": "RM score (SFT: 0 ± 1)",
    "true_score": "true score",
    "kl": "KL to SFT (nats a response)",
    "update": "PPO updates",
    "seconds": "training time (s)",
    "length": "response length (tokens)",
    "finished": "share finished",
    "distinct2": "distinct bigrams (share)",
    "explained_variance": "explained variance\nof the critic",
    "adv_l2_macro": "advantages:\nL2 over macro steps",
    "q_l2_macro": "Q values:\nL2 over macro steps",
    "adv_rms_token": "advantages:\nRMS per token",
    "ret_rms_token": "Q values:\nRMS per token",
}


@dataclass
class Picture:
    """A figure and what to read out in its place."""

    figure: Figure
    alt: str

    def save(self, path: Path | str) -> Path:
        """Writes a PNG atomically: 150 dots an inch, the alternative text as its Description."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data, metadata = BytesIO(), {"Description": self.alt, "Software": None}
        self.figure.savefig(data, format="png", dpi=150, metadata=metadata)
        runs.atomic_write(path, data.getvalue())
        return path


def arms(frame: pd.DataFrame) -> dict[str, str]:
    """{arm: label} in the order of the frame, which is the experiment's."""
    return dict(frame[["arm", "label"]].drop_duplicates("arm").itertuples(index=False))


def style(arm: str, known: Sequence[str]) -> tuple:
    """Colour, line style and marker of an arm; unknown arms take spare ones in the order given."""
    if arm in STYLES:
        return STYLES[arm]
    return SPARE[[a for a in known if a not in STYLES].index(arm) % len(SPARE)]


def band(frame: pd.DataFrame, y: str, x: str = "update") -> pd.DataFrame:
    """Mean of y over chains at each update, with its 95% t interval (null for one chain)"""
    rows = []
    for _, group in frame.groupby("update", sort=True):
        interval = stats.mean_interval(group[y])
        low, high = (math.nan if math.isinf(v) else v for v in (interval.low, interval.high))
        rows.append({x: group[x].mean(), "mean": interval.mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def _panels(rows: int, columns: int, height: float = 3.7) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9.0, height * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=FONT - 1)
    return figure, axes


def _name(axis, x: str, y: str) -> None:
    axis.set_xlabel(NAMES.get(x, x), fontsize=FONT)
    axis.set_ylabel(NAMES.get(y, y), fontsize=FONT)


def _legend(figure: Figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(3, len(labels)),
        fontsize=FONT - 1,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def _lines(axis, frame: pd.DataFrame, x: str, y: str, chains: bool = True) -> None:
    """A line, a band and thin chains for every arm."""
    known = arms(frame)
    for arm, label in known.items():
        colour, dash, _ = style(arm, list(known))
        rows = frame[frame["arm"] == arm]
        if chains:
            for _, chain in rows.groupby("chain"):
                axis.plot(chain[x], chain[y], color=colour, linewidth=0.5, alpha=0.35)
        mean = band(rows, y, x)
        axis.plot(mean[x], mean["mean"], color=colour, linestyle=dash, linewidth=2.2, label=label)
        axis.fill_between(mean[x], mean["low"], mean["high"], color=colour, alpha=0.12, linewidth=0)
    _name(axis, x, y)


def _said(measure: str) -> str:
    return NAMES[measure].replace("\n", " ")


def _ends(frame: pd.DataFrame, y: str) -> str:
    """'label 3.01, label 2.97': means over chains at the last update."""
    last = frame[frame["update"] == frame["update"].max()]
    return ", ".join(
        f"{label} {last.loc[last['arm'] == arm, y].mean():.2f}"
        for arm, label in arms(frame).items()
    )


def _has(frame: pd.DataFrame, measures: Sequence[str]) -> list[str]:
    """The measures that the frame holds numbers of (real data has no true score)."""
    return [m for m in measures if m in frame and frame[m].notna().any()]


def curves(
    evals: pd.DataFrame, x: str = "update", thresholds: Mapping[str, Sequence[float]] | None = None
) -> Picture:
    """Fig. 2 (left): held-out RM score and true score against updates, or against seconds.

    `thresholds` ({measure: values}) are drawn as dotted lines. Against seconds, a mean over chains
    stands at the chains' mean time.
    """
    measures = _has(evals, ("rm_score", "true_score"))
    figure, axes = _panels(1, len(measures))
    for axis, measure in zip(axes[0], measures, strict=True):
        _lines(axis, evals, x, measure)
        for i, value in enumerate((thresholds or {}).get(measure, ())):
            name = None if i else "threshold"
            axis.axhline(value, color="#555555", linewidth=1.4, linestyle=":", label=name)
    _legend(figure, axes[0, 0])
    ends = "; ".join(f"{_said(m)}: {_ends(evals, m)}" for m in measures)
    return Picture(
        figure,
        f"Held-out scores against {_said(x)}, mean and 95% interval over "
        f"{evals['chain'].nunique()} chains. At the end, {ends}.",
    )


def frontier(evals: pd.DataFrame) -> Picture:
    """RM score and true score against KL: what a policy gains for how far it has moved."""
    measures = _has(evals, ("rm_score", "true_score"))
    figure, axes = _panels(1, len(measures))
    known = arms(evals)
    for axis, measure in zip(axes[0], measures, strict=True):
        for arm, label in known.items():
            colour, dash, marker = style(arm, list(known))
            rows = evals[evals["arm"] == arm]
            for _, chain in rows.groupby("chain"):
                axis.plot(chain["kl"], chain[measure], color=colour, linewidth=0.5, alpha=0.35)
            mean = rows.groupby("update")[["kl", measure]].mean()
            axis.plot(
                mean["kl"],
                mean[measure],
                color=colour,
                linestyle=dash,
                linewidth=1.8,
                marker=marker,
                markersize=5,
                label=label,
            )
        _name(axis, "kl", measure)
    _legend(figure, axes[0, 0])
    ends = "; ".join(f"{_said(m)}: {_ends(evals, m)}" for m in ("kl", *measures))
    return Picture(
        figure,
        "Held-out scores against KL, a marker an evaluation, means over "
        f"{evals['chain'].nunique()} chains. At the end, {ends}.",
    )


def _measures(densities: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(densities["measure"]))


def final_distributions(densities: pd.DataFrame) -> Picture:
    """Fig. 3: score distributions on held-out prompts after the last update, with SFT's.

    `densities` is `report.densities(samples)`: arm, label, update, measure, score, density, mean.
    """
    measures, last = _measures(densities), densities["update"].max()
    figure, axes = _panels(1, len(measures))
    known, words = arms(densities), []
    for axis, measure in zip(axes[0], measures, strict=True):
        rows = densities[densities["measure"] == measure]
        sft = rows[(rows["update"] == 0) & (rows["arm"] == next(iter(known)))]
        axis.fill_between(
            sft["score"], sft["density"], color=SFT, alpha=0.35, linewidth=0, label="SFT"
        )
        for arm, label in known.items():
            colour, dash, _ = style(arm, list(known))
            end = rows[(rows["update"] == last) & (rows["arm"] == arm)]
            axis.plot(
                end["score"],
                end["density"],
                color=colour,
                linestyle=dash,
                linewidth=2.0,
                label=label,
            )
            words.append(f"{label} {_said(measure)} {end['mean'].iloc[0]:.2f}")
        axis.set_ylim(bottom=0)
        _name(axis, measure, "density")
    _legend(figure, axes[0, 0])
    return Picture(
        figure,
        f"Densities of held-out scores after {last} updates, all chains "
        f"together, beside SFT. Means: {', '.join(words)}.",
    )


def distributions_by_step(densities: pd.DataFrame, pair: Sequence[str]) -> Picture:
    """Fig. 10: the distributions of two arms, one under the other as training goes on."""
    measures, updates = _measures(densities), sorted(densities["update"].unique())
    figure, axes = _panels(len(updates), len(measures), height=1.35)
    known, words = arms(densities), []
    for column, measure in enumerate(measures):
        rows = densities[densities["measure"] == measure]
        for axis, update in zip(axes[:, column], updates, strict=True):
            for arm in pair:
                colour, dash, _ = style(arm, list(known))
                one = rows[(rows["update"] == update) & (rows["arm"] == arm)]
                axis.plot(
                    one["score"],
                    one["density"],
                    color=colour,
                    linestyle=dash,
                    linewidth=2.0,
                    label=known[arm],
                )
                axis.fill_between(
                    one["score"], one["density"], color=colour, alpha=0.12, linewidth=0
                )
                axis.axvline(one["mean"].iloc[0], color=colour, linestyle=dash, linewidth=1.2)
                words.append(f"{known[arm]} {_said(measure)} {one['mean'].iloc[0]:.2f} at {update}")
            axis.set(yticks=[], ylim=(0, rows["density"].max() * 1.05))
            axis.set_xlim(rows["score"].min(), rows["score"].max())
            axis.tick_params(labelbottom=update == updates[-1])
        axes[-1, column].set_xlabel(NAMES[measure], fontsize=FONT)
    for axis, update in zip(axes[:, 0], updates, strict=True):
        axis.set_ylabel(f"{update}", fontsize=FONT, rotation=0, ha="right", va="center")
    figure.supylabel("PPO updates", fontsize=FONT)
    _legend(figure, axes[0, 0])
    return Picture(
        figure,
        "Densities of held-out scores as training goes on, all chains "
        f"together; upright lines are means: {', '.join(words)}.",
    )


def norms(metrics: pd.DataFrame) -> Picture:
    """Fig. 11: L2 norms of advantages and Q values over a response's macro steps; beside them the
    root mean squares per token, because a norm over fewer steps is smaller through counting alone
    (by about sqrt(n))."""
    grid = (("adv_l2_macro", "adv_rms_token"), ("q_l2_macro", "ret_rms_token"))
    figure, axes = _panels(2, 2)
    for row, pair in enumerate(grid):
        for axis, measure in zip(axes[row], pair, strict=True):
            _lines(axis, metrics, "update", measure, chains=False)
            axis.set_ylim(bottom=0)
    _legend(figure, axes[0, 0])
    ends = "; ".join(f"{_said(m)}: {_ends(metrics, m)}" for pair in grid for m in pair)
    return Picture(figure, f"Norms of advantages and Q values over PPO updates, {ends}.")


def signs_of_hacking(evals: pd.DataFrame) -> Picture:
    """What a policy that games its reward model would show: length, KL, repetition, no end."""
    measures = ("length", "kl", "distinct2", "finished")
    figure, axes = _panels(2, 2)
    for axis, measure in zip(axes.flat, measures, strict=True):
        _lines(axis, evals, "update", measure, chains=False)
    _legend(figure, axes[0, 0])
    ends = "; ".join(f"{_said(m)}: {_ends(evals, m)}" for m in measures)
    return Picture(figure, f"Signs of a gamed reward model over PPO updates. At the end, {ends}.")


def forest(comparisons: pd.DataFrame) -> Picture:
    """Paired differences with their 95% t intervals, a panel an endpoint; filled where the interval
    leaves out 0. `comparisons` is `report.comparisons`; to the right is better in every panel."""
    endpoints = list(dict.fromkeys(comparisons["endpoint"]))
    pairs = list(dict.fromkeys(zip(comparisons["arm"], comparisons["reference"], strict=True)))
    columns = 2
    rows = -(-len(endpoints) // columns)
    figure, axes = _panels(rows, columns, height=0.9 + 0.42 * len(pairs))
    known = list(dict.fromkeys([*comparisons["arm"], *comparisons["reference"]]))
    words = []
    for axis in axes.flat[len(endpoints) :]:
        axis.remove()
    for i, (axis, endpoint) in enumerate(zip(axes.flat, endpoints, strict=False)):
        table = comparisons[comparisons["endpoint"] == endpoint].set_index(["arm", "reference"])
        for y, pair in enumerate(pairs):
            if pair not in table.index:
                continue
            row = table.loc[pair]
            colour, _, marker = style(pair[0], known)
            clear = row["low"] > 0 or row["high"] < 0
            axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2.2)
            axis.plot(
                row["difference"],
                y,
                marker=marker,
                color=colour,
                markersize=8,
                markerfacecolor=colour if clear else "white",
            )
            words.append(
                f"{endpoint}, {row['label']} against {row['reference_label']}: "
                f"{row['difference']:.2g} ({row['low']:.2g} to {row['high']:.2g})"
            )
        axis.axvline(0, color="#555555", linewidth=1.2)
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        labels = [
            f"{a}\nvs {b}"
            for a, b in dict.fromkeys(
                zip(comparisons["label"], comparisons["reference_label"], strict=True)
            )
        ]
        axis.set_yticks(
            range(len(pairs)), labels if i % columns == 0 else [""] * len(pairs), fontsize=FONT - 2
        )
        axis.set_title(endpoint, fontsize=FONT, loc="left")
        unit = table["unit"].iloc[0]
        axis.locator_params(axis="x", nbins=5)  # more would run into one another
        axis.set_xlabel("higher →" if unit == "score" else f"{unit} sooner →", fontsize=FONT)
    said = ". ".join(words)
    return Picture(figure, f"Paired differences over chains with 95% intervals. {said}.")


def pass_rates(table: pd.DataFrame) -> Picture:
    """Table 3: pass@k of every arm by difficulty with its 95% t interval over chains, a panel a k.
    `table` is `programs.table3`."""
    ks, levels = sorted(table["k"].unique()), list(dict.fromkeys(table["difficulty"]))
    figure, axes = _panels(1, len(ks))
    known, words = arms(table), []
    for axis, k in zip(axes[0], ks, strict=True):
        for number, (arm, label) in enumerate(known.items()):
            rows = table[(table["k"] == k) & (table["arm"] == arm)].set_index("difficulty")
            rows = rows.loc[levels]
            shift = 0.16 * (number - (len(known) - 1) / 2)
            x, half = np.arange(len(levels)) + shift, (rows["high"] - rows["low"]) / 2
            colour, _, marker = (SFT, None, "o") if arm == "sft" else style(arm, list(known))
            axis.errorbar(
                x, 100 * rows["mean"], 100 * half.where(np.isfinite(half), 0), label=label,
                color=colour, marker=marker, markersize=8, linestyle="none", linewidth=2.2,
            )  # fmt: skip
            if "all" in levels:
                words.append(f"pass@{k} {label} {100 * rows.loc['all', 'mean']:.1f}%")
        axis.set_xticks(range(len(levels)), [level.replace("introductory", "intro.")
                                             for level in levels], fontsize=FONT - 1)  # fmt: skip
        axis.set_ylim(0, None)
        _name(axis, "difficulty", f"pass@{k} (%)")
    _legend(figure, axes[0, 0])
    chains = table["chains"].max()
    said = f"Share of problems solved by difficulty, mean and 95% interval over {chains} chains."
    return Picture(figure, f"{said} Over all problems: {', '.join(words)}.")
