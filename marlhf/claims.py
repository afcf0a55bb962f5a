"""Endpoints, paired comparisons, gates, power, and the sentences that say what they show.

Endpoints are read from the held-out evaluations of every chain: the area under the curve (as a mean
over training), updates and seconds to a threshold, the final score. Arms are compared within
chains; a threshold that was missed counts as reached at the end, and is said to be missed. In
`compare` a positive difference is always the better one for the arm: a higher score, a threshold
reached sooner. No verdict is written by hand: `verdict_sentence` words a row by its interval.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from marlhf import stats

SCORES = {"rm_score": "RM score", "true_score": "true score"}
NORMS = {  # title: column of the metrics (Fig. 11)
    "L2 norm of advantages over macro steps": "adv_l2_macro",
    "L2 norm of Q values over macro steps": "q_l2_macro",
    "root mean square of advantages per token": "adv_rms_token",
    "root mean square of Q values per token": "ret_rms_token",
}
COST = "seconds per update"


def endpoint_title(kind: str, score: str, threshold: float | None = None) -> str:
    """How tables call an endpoint of an experiment's settings; ValueError for an unknown kind."""
    titles = {
        "auc": f"mean {SCORES[score]} over training",
        "updates_to_threshold": f"updates to {SCORES[score]} {threshold}",
        "seconds_to_threshold": f"seconds to {SCORES[score]} {threshold}",
        "final": f"final {SCORES[score]}",
        "equal_kl": f"{SCORES[score]} at equal KL",
    }
    if kind not in titles:
        raise ValueError(f"unknown endpoint {kind!r}; there is {', '.join(titles)}")
    return titles[kind]


def primary(settings: Mapping) -> str:
    """The title of the primary endpoint, named in the experiment's file before the runs."""
    return endpoint_title(settings["primary"], settings["score"])


def endpoints(evals: pd.DataFrame, settings: Mapping) -> pd.DataFrame:
    """Every endpoint of every arm and chain: arm, label, chain, endpoint, unit, value, censored.

    evals: arm, label, chain, update, seconds, rm_score, true_score (null on real data); settings:
    the experiment's `endpoints` (score, primary, others, thresholds). The score at equal KL stands
    beside: it is read where the arm first comes to the KL that all arms of its chain have come to.
    So does the true score, where there is one. Seconds that were missed count as the shortest
    training time among the arms of the chain, so that a slow arm does not pay twice.
    """
    score, kinds = settings["score"], [settings["primary"], *settings.get("others", ())]
    wanted = [(kind, score) for kind in kinds] + [("equal_kl", score)]
    if evals["true_score"].notna().all() and score != "true_score":
        wanted += [(kind, "true_score") for kind in ("auc", "final", "equal_kl")]
    # what every arm of a chain has come to: training seconds, largest KL
    reach = evals.groupby(["chain", "arm"])[["seconds", "kl"]].max().groupby("chain").min()
    rows = []
    for (arm, label, chain), curve in evals.groupby(["arm", "label", "chain"], sort=False):
        curve = curve.sort_values("update")
        for kind, measure in wanted:
            timed = kind.endswith("to_threshold")
            for threshold in settings.get("thresholds", ()) if timed else (None,):
                value = _endpoint(curve, kind, measure, threshold, reach.loc[chain])
                title = endpoint_title(kind, measure, threshold)
                unit = kind.split("_")[0] if timed else "score"
                head = {"arm": arm, "label": label, "chain": chain, "endpoint": title}
                rows.append(head | {"unit": unit, "value": value.time, "censored": value.censored})
    return pd.DataFrame(rows)


def _endpoint(
    curve: pd.DataFrame, kind: str, measure: str, threshold: float | None, reach: pd.Series
) -> stats.Hit:
    """An endpoint of one run; only times can be censored."""
    updates, scores = curve["update"].to_numpy(), curve[measure].to_numpy()
    if kind == "updates_to_threshold":
        return stats.time_to_threshold(updates, scores, threshold)
    if kind == "seconds_to_threshold":
        return stats.time_to_threshold(curve["seconds"], scores, threshold, reach["seconds"])
    if kind == "auc":
        return stats.Hit(stats.area_under_curve(updates, scores), False)
    if kind == "equal_kl":
        at = stats.time_to_threshold(updates, curve["kl"], reach["kl"]).time
        return stats.Hit(float(np.interp(at, updates, scores)), False)
    return stats.Hit(float(scores[-1]), False)


def over_training(metrics: pd.DataFrame) -> pd.DataFrame:
    """What claims read beside the endpoints, in the columns of `endpoints`: the means over training
    of the norms of advantages and Q values, and training seconds an update. metrics: arm, label,
    chain, update, seconds (of training so far), and the columns of NORMS."""
    rows = []
    for (arm, label, chain), table in metrics.groupby(["arm", "label", "chain"], sort=False):
        found = [(title, "norm", table[column].mean()) for title, column in NORMS.items()]
        found.append((COST, COST, table["seconds"].max() / table["update"].max()))
        for title, unit, value in found:
            head = {"arm": arm, "label": label, "chain": chain, "endpoint": title}
            rows.append(head | {"unit": unit, "value": float(value), "censored": False})
    return pd.DataFrame(rows)


def by_arm(values: pd.DataFrame) -> pd.DataFrame:
    """Mean, 95% t interval over chains and how many missed; a row an arm and endpoint.

    values: as `endpoints` returns it.
    """
    rows = []
    for key, group in values.groupby(["arm", "label", "endpoint"], sort=False):
        interval = stats.mean_interval(group["value"])
        row = dict(zip(("arm", "label", "endpoint"), key, strict=True))
        row |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
        rows.append(row | {"chains": interval.n, "missed": int(group["censored"].sum())})
    return pd.DataFrame(rows)


def pair(values: pd.DataFrame, arm: str, reference: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of one endpoint for two arms, chain by chain; ValueError if their chains differ."""
    a, b = (values[values["arm"] == key].sort_values("chain") for key in (arm, reference))
    if a.empty or list(a["chain"]) != list(b["chain"]):
        raise ValueError(
            f"{arm} has chains {list(a['chain'])} and {reference} {list(b['chain'])}: arms are "
            "compared within the same chains"
        )
    return a, b


def compare(values: pd.DataFrame, pairs: Iterable[Sequence[str]]) -> pd.DataFrame:
    """Paired differences of each [arm, reference] in every endpoint, positive where the arm is
    better, with 95% t intervals; for times, `times` is how many times sooner (geometric mean)."""
    rows = []
    for arm, reference in pairs:
        for endpoint, group in values.groupby("endpoint", sort=False):
            a, b = pair(group, arm, reference)
            x, y, unit = a["value"].to_numpy(), b["value"].to_numpy(), a["unit"].iloc[0]
            gain = stats.paired_interval(x, y) if unit == "score" else stats.paired_interval(y, x)
            sooner = stats.Interval(math.nan, math.nan, math.nan, gain.n)
            if unit != "score" and min(x.min(), y.min()) > 0:
                sooner = stats.ratio_interval(y, x)
            rows.append({
                "arm": arm, "reference": reference, "label": a["label"].iloc[0],
                "reference_label": b["label"].iloc[0], "endpoint": endpoint, "unit": unit,
                "difference": gain.mean, "low": gain.low, "high": gain.high, "chains": gain.n,
                "times": sooner.mean, "times_low": sooner.low, "times_high": sooner.high,
                "missed": int(a["censored"].sum()), "reference_missed": int(b["censored"].sum()),
            })  # fmt: skip
    return pd.DataFrame(rows)


def power(
    values: pd.DataFrame, pairs: Iterable[Sequence[str]], ns: Sequence[int] = (3, 6, 12)
) -> pd.DataFrame:
    """Spread over chains of the paired differences, and the smallest that n chains can detect
    (see `stats.power_table`); a row an endpoint and comparison."""
    parts = []
    for endpoint, group in values.groupby("endpoint", sort=False):
        differences = {}
        for arm, reference in pairs:
            a, b = pair(group, arm, reference)
            name = f"{a['label'].iloc[0]} − {b['label'].iloc[0]}"
            differences[name] = a["value"].to_numpy() - b["value"].to_numpy()
        table = stats.power_table(differences, ns).reset_index()
        table.insert(0, "endpoint", endpoint)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


# The twin's gates


def _bound(x: float) -> float:
    return x if math.isfinite(x) else math.nan


def gates(evals: pd.DataFrame, manifests: pd.DataFrame) -> pd.DataFrame:
    """What the task must show before a comparison on it means anything; a row a gate: target,
    mean over chains, worst chain, chains that pass, chains, passes (the mean within the target).

    manifests: the experiment's "runs" (stage, seed, summary.*). Only for tasks with a true score.
    """
    sft, rm = (manifests[manifests["stage"] == stage].set_index("seed") for stage in ("sft", "rm"))
    ends = evals["update"].isin([0, evals["update"].max()])
    # means over arms: a row a chain and update
    path = evals.groupby(["chain", "update"])[["rm_score", "true_score", "length"]].mean()
    edge = evals[ends].groupby(["chain", "update"])["true_score"].mean().unstack("update")
    length = path["length"].unstack("update")
    measured = {
        "SFT true score, share of the best": (
            sft["summary.true_score"] / sft["summary.best_score"], -math.inf, 0.70),
        "RM pair accuracy, held out": (rm["summary.accuracy_after"], 0.78, math.inf),
        "RM and true score, correlation on SFT samples": (
            rm["summary.truth_correlation"], 0.70, math.inf),
        "true score gained over PPO": (edge.iloc[:, -1] - edge.iloc[:, 0], 0.0, math.inf),
        "RM and true score, correlation over PPO": (
            path.groupby("chain").apply(lambda t: t["rm_score"].corr(t["true_score"])),
            0.0, math.inf),
        "response tokens over PPO": (length.mean(axis=1), 45.0, 60.0),
    }  # fmt: skip
    rows = []
    for name, (values, low, high) in measured.items():
        values = values.astype(float)
        inside, mean = values.between(low, high), values.mean(skipna=False)
        # a score that does not vary has no correlation: such a chain does not pass
        worst = np.maximum(low - values, values - high).fillna(math.inf).idxmax()
        rows.append({
            "gate": name, "at_least": _bound(low), "at_most": _bound(high), "mean": mean,
            "worst": values[worst], "chains_passing": int(inside.sum()), "chains": len(values),
            "passes": bool(low <= mean <= high),
        })  # fmt: skip
    return pd.DataFrame(rows)


# Words


def number(x: float) -> str:
    """Three significant digits."""
    return f"{x:.3g}".replace("-", "−")


def verdict_sentence(row: Mapping) -> str:
    """A row of `compare` in words; the verdict is its interval's: above 0, below 0, or neither."""
    arm, other, unit = row["label"], row["reference_label"], row["unit"]
    words = ("higher", "lower") if unit == "score" else (f"{unit} sooner", f"{unit} later")
    gap = f"{number(abs(row['difference']))} {words[int(row['difference'] < 0)]}"
    if row["low"] > 0 or row["high"] < 0:
        text = f"{arm} is {gap} than {other}"
    else:
        text = f"cannot tell {arm} from {other} ({gap})"
    interval = f"95% interval {number(row['low'])} to {number(row['high'])}"
    if row["chains"] == 1:
        return f"{row['endpoint']}: {text}; a single chain has no interval."
    if unit != "score" and not math.isnan(row["times"]):
        text += f", {row['times']:.2f} times as soon"
        interval += f", ratio {row['times_low']:.2f} to {row['times_high']:.2f}"
    text = f"{row['endpoint']}: {text}; {interval}, {row['chains']} chains."
    missed = [
        f"{row[key + 'missed']} of {row['chains']} with {row[key + 'label']}"
        for key in ("", "reference_")
        if row[key + "missed"]
    ]
    if missed:
        text += f" Missed by {' and '.join(missed)}: a miss counts as the end of training."
    return text[0].upper() + text[1:]


def norm_sentences(metrics: pd.DataFrame, pairs: Iterable[Sequence[str]]) -> list[str]:
    """Fig. 11 in words: each arm's norms as a multiple of its reference's, over a response's macro
    steps and per token (means over training, paired over chains)."""
    names = {NORMS[title]: title for title in NORMS if "advantages" in title}
    means = metrics.groupby(["arm", "chain"])[list(names)].mean()
    labels = metrics.drop_duplicates("arm").set_index("arm")["label"]
    return [
        f"{labels[arm]} against {labels[reference]}: "
        + "; ".join(
            f"{name} {ratio.mean:.2f} times as large ({ratio.low:.2f} to {ratio.high:.2f})"
            for measure, name in names.items()
            for ratio in [
                stats.ratio_interval(means.loc[arm, measure], means.loc[reference, measure])
            ]
        )
        + "."
        for arm, reference in pairs
    ]


def gate_sentence(table: pd.DataFrame) -> str:
    """Whether the twin passes its gates, naming those it fails."""
    failed = table.loc[~table["passes"], "gate"].tolist()
    if not failed:
        return f"The twin passes all {len(table)} gates."
    return f"The twin fails {len(failed)} of {len(table)} gates: {'; '.join(failed)}."


def power_sentences(table: pd.DataFrame, endpoint: str) -> list[str]:
    """What the chains of this run could, and could not, have seen in one endpoint."""
    columns = [c for c in table if c.startswith("n=")]
    return [
        f"{row['comparison']}, {endpoint}: spread {number(row['sd'])} over {row['chains']} chains "
        f"({number(row['sd_low'])} to {number(row['sd_high'])}); detectable with 80% power "
        + ", ".join(f"{number(row[c])} at {c.replace('=', ' = ')}" for c in columns)
        + "."
        for _, row in table[table["endpoint"] == endpoint].iterrows()
    ]
