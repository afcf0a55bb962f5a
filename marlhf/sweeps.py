"""Arms along an axis: the length of a macro action, the credit horizon, the size of the model.

An axis has one row an arm, counted from the arm's settings. Endpoints along it are those of
`claims`, chain by chain; `share` says how much of one gain another one makes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as distributions

from marlhf import claims, report, stats
from marlhf.config import Config

PARENTS = {  # what a size brings along, from the manifests: (stage, its summary): name
    ("sft", "loss_after"): "SFT loss, held out",
    ("sft", "true_score"): "SFT true score",
    ("rm", "accuracy_after"): "RM pair accuracy, held out",
    ("rm", "truth_correlation"): "RM and true score, correlation on SFT samples",
}


def macro_length(config: Config) -> float:
    """n, the tokens of a macro action: 1 for token PPO, inf for the whole response. ValueError for
    a termination condition whose macro actions have no one length."""
    macro = config.ppo.macro
    lengths = {"token": 1.0, "fixed": float(macro.n), "whole": math.inf}
    if macro.termination not in lengths:
        raise ValueError(
            f"ppo.macro.termination={macro.termination} has macro actions of several lengths; an "
            f"axis takes {', '.join(lengths)}"
        )
    return lengths[macro.termination]


def horizon(n: float, lam: float) -> float:
    """-n / ln(lambda): the tokens over which credit fades to 1/e with gamma = 1; inf at lambda = 1
    and for the whole response as one macro action."""
    return math.inf if lam == 1 else -n / math.log(lam)


def matched_lambda(n: float, lam: float) -> float:
    """lambda^(1/n): with it token PPO has the horizon of macro actions of n tokens."""
    return lam ** (1 / n)


def series(n: float) -> tuple[str, str]:
    """The arm whose style a line of equal n takes, and the line's name."""
    if n == 1:
        return "token", "token PPO"
    return ("whole", "MA-PPO, n = ∞") if math.isinf(n) else (f"macro{n:g}", f"MA-PPO, n = {n:g}")


def axis(experiment: Any) -> pd.DataFrame:
    """A row an arm, in the experiment's order: arm, label, line_arm and line (see `series`), n,
    lam, matched_lam, horizon (tokens), parameters (of the policy; nothing is loaded), size."""
    from marlhf.memory import model_shape, parameters_of

    rows, counts = [], {}
    for arm, label in experiment.arms.items():
        config = experiment.configs[arm, experiment.seeds[0]]
        n, lam, key = macro_length(config), config.ppo.lam, repr(config.model)
        if key not in counts:
            counts[key] = parameters_of(model_shape(config))
        line_arm, line = series(n)
        rows.append({
            "arm": arm, "label": label, "line_arm": line_arm, "line": line, "n": n, "lam": lam,
            "matched_lam": matched_lambda(n, lam), "horizon": horizon(n, lam),
            "parameters": counts[key], "size": size_name(counts[key]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def size_name(parameters: int) -> str:
    """'121k parameters': three digits."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name} parameters"
    return f"{parameters} parameters"


def along(table: pd.DataFrame, axis: pd.DataFrame, x: str) -> pd.DataFrame:
    """`table` (a column arm) with columns x, line_arm and line of the axis, ordered by x.
    ValueError for an arm that is not on the axis."""
    missing = sorted(set(table["arm"]) - set(axis["arm"]))
    if missing:
        raise ValueError(f"not on the axis: {', '.join(missing)}")
    placed = table.merge(axis[["arm", "line_arm", "line", x]].rename(columns={x: "x"}), on="arm")
    return placed.sort_values("x", kind="stable", ignore_index=True)


def as_lines(table: pd.DataFrame, axis: pd.DataFrame) -> pd.DataFrame:
    """`table` with each arm's line in the place of arm and label, and its size beside: one name and
    one style for token PPO at every size."""
    lines = axis.set_index("arm")
    return table.assign(
        size=table["arm"].map(lines["size"]),
        label=table["arm"].map(lines["line"]),
        arm=table["arm"].map(lines["line_arm"]),
    )


def ends(evals: pd.DataFrame, measure: str, title: str, unit: str) -> pd.DataFrame:
    """A measure at the last evaluation of every arm and chain, in the columns of
    `claims.endpoints`."""
    last = evals[evals["update"] == evals["update"].max()]
    found = last[["arm", "label", "chain"]].assign(endpoint=title, unit=unit)
    return found.assign(value=last[measure], censored=False).reset_index(drop=True)


def response_tokens(evals: pd.DataFrame) -> float:
    """T: mean length of the responses over evaluations, chains and arms."""
    return float(evals["length"].mean())


def titles(settings: Mapping, values: pd.DataFrame) -> list[str]:
    """The endpoints that a picture along an axis shows: the primary one, updates to the middle
    threshold, the final score and, where there is one, the final true score."""
    thresholds = settings["thresholds"]
    wanted = [
        claims.primary(settings),
        claims.endpoint_title(
            "updates_to_threshold", settings["score"], thresholds[len(thresholds) // 2]
        ),
        claims.endpoint_title("final", settings["score"]),
        claims.endpoint_title("final", "true_score"),
    ]
    there = set(values["endpoint"])
    return [title for title in dict.fromkeys(wanted) if title in there]


# Shares of a gain


def gains(values: pd.DataFrame, endpoint: str, arm: str, reference: str) -> np.ndarray:
    """Paired differences over chains, positive where the arm is better (see `claims.compare`)."""
    a, b = claims.pair(values[values["endpoint"] == endpoint], arm, reference)
    difference = a["value"].to_numpy() - b["value"].to_numpy()
    return difference if (a["unit"] == "score").all() else -difference


def share(
    part: Sequence[float], whole: Sequence[float], confidence: float = 0.95
) -> stats.Interval:
    """mean(part) / mean(whole) of paired differences over chains, with Fieller's interval: the
    ratios R for which a t test does not tell part - R whole from 0. Unbounded, (-inf, inf), where
    `whole` itself cannot be told from 0, and for a single chain."""
    a, b = np.asarray(part, float), np.asarray(whole, float)
    if len(a) != len(b):
        raise ValueError(f"share: {len(a)} and {len(b)} chains, but they are paired")
    ratio, n = float(a.mean() / b.mean()) if b.mean() else math.nan, len(a)
    if n == 1:
        return stats.Interval(ratio, -math.inf, math.inf, 1)
    t2 = distributions.t.ppf((1 + confidence) / 2, n - 1) ** 2
    (aa, ab), (_, bb) = np.cov(a, b) / n
    # (mean a - R mean b)^2 <= t^2 var(mean a - R mean b), a quadratic in R
    square = b.mean() ** 2 - t2 * bb
    middle = a.mean() * b.mean() - t2 * ab
    if square <= 0:
        return stats.Interval(ratio, -math.inf, math.inf, n)
    root = math.sqrt(max(0.0, middle**2 - square * (a.mean() ** 2 - t2 * aa)))
    return stats.Interval(ratio, (middle - root) / square, (middle + root) / square, n)


def same_horizon(axis: pd.DataFrame, tolerance: float = 0.2) -> list[tuple[str, str, str]]:
    """(macro arm, token arm whose finite horizon is within `tolerance` of its own, token arm of the
    same lambda), each macro arm with its nearest."""
    tokens, found = axis[axis["n"] == 1], []
    for _, row in axis[(axis["n"] > 1) & np.isfinite(axis["horizon"])].iterrows():
        base = tokens[tokens["lam"] == row["lam"]]
        apart = (np.log(tokens["horizon"]) - math.log(row["horizon"])).abs()
        if len(base) and apart.min() <= math.log1p(tolerance):
            found.append((row["arm"], tokens.loc[apart.idxmin(), "arm"], base["arm"].iloc[0]))
    return found


def shares(values: pd.DataFrame, axis: pd.DataFrame, endpoints: Sequence[str]) -> pd.DataFrame:
    """How much of a macro arm's gain over token PPO of the same lambda is made by token PPO of the
    same horizon: a row a pair and endpoint, with labels, horizons, the two gains, share, low, high,
    chains."""
    names, rows = axis.set_index("arm"), []
    for arm, token, base in same_horizon(axis):
        for endpoint in endpoints:
            whole = gains(values, endpoint, arm, base)
            part = gains(values, endpoint, token, base)
            found = share(part, whole)
            rows.append({
                "arm": arm, "token": token, "base": base, "endpoint": endpoint,
                "label": names.loc[arm, "label"], "token_label": names.loc[token, "label"],
                "base_label": names.loc[base, "label"], "horizon": names.loc[arm, "horizon"],
                "token_horizon": names.loc[token, "horizon"], "gain": whole.mean(),
                "token_gain": part.mean(), "share": found.mean, "low": found.low,
                "high": found.high, "chains": found.n,
            })  # fmt: skip
    return pd.DataFrame(rows)


def share_sentence(row: Mapping) -> str:
    """A row of `shares` in words; what is said is what the interval leaves open."""
    number, what = claims.number, "gain" if row["gain"] >= 0 else "loss"
    first, second = (
        f"{'gains' if gain >= 0 else 'loses'} {number(abs(gain))}"
        for gain in (row["gain"], row["token_gain"])
    )
    head = (
        f"{row['endpoint'][0].upper()}{row['endpoint'][1:]}: over {row['base_label']}, "
        f"{row['label']} (horizon {number(row['horizon'])} tokens) {first} and "
        f"{row['token_label']} ({number(row['token_horizon'])} tokens) {second}"
    )
    if row["chains"] == 1:
        return f"{head}; a single chain has no interval."
    if not math.isfinite(row["low"]):
        return f"{head}; cannot tell what share that is: the first difference is not clear itself."
    interval = (
        f"{100 * row['share']:.0f}%, 95% interval {number(100 * row['low'])}% to "
        f"{number(100 * row['high'])}%, {row['chains']} chains"
    )
    none, all_ = row["low"] <= 0 <= row["high"], row["low"] <= 1 <= row["high"]
    if none and all_:
        says = f"cannot tell whether the horizon makes none of the {what} or all of it"
    elif none:
        says = f"cannot tell what the horizon makes of the {what} from none, and it is not all"
    elif all_:
        says = f"the horizon makes some of the {what}, and cannot be told from all of it"
    elif row["high"] < 0:
        says = "the horizon does the opposite of what macro actions do"
    else:
        says = f"the horizon makes {'part of' if row['high'] < 1 else 'more than'} the {what}"
    return f"{head}: {interval}; {says}."


# Sizes


def own_runs(runs: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Rows of an experiment's "runs" that belong to `arms`: their PPO runs, what those start from,
    and repeated samples of them and of their SFT models."""
    mine = runs["arm"].str.split().map(lambda names: not set(names).isdisjoint(arms))
    parents = runs.set_index("hash")["parents"].str.split()
    known, new = set(), set(runs.loc[mine & (runs["stage"] == "ppo"), "hash"])
    while new:
        known |= new
        new = {parent for run in new for parent in parents[run]} - known
    evals = (runs["stage"] == "eval") & runs["parents"].str.split().map(known.issuperset)
    return runs[runs["hash"].isin(known) | evals]


def tables_by_group(
    frames: Mapping[str, pd.DataFrame],
    settings: Mapping,
    pairs: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, pd.DataFrame]:
    """`report.tables` of each group of arms ({name: arms}) by itself, one under the other: gates
    are those of the group's own SFT and reward models, and what stands at equal KL or equal seconds
    is equal within the group. "gates", "samples" and "runs" have the group's name in front."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for name, arms in groups.items():
        # SFT models stand as `Experiment.eval_specs` calls them: "sft" is the first arm's
        first = ["sft"] if frames["evals"]["arm"].iloc[0] in arms else []
        names = [*arms, *(f"sft_{arm}" for arm in arms), *first]
        own = {
            key: own_runs(frame, arms)
            if key == "runs"
            else frame[frame["arm"].isin(names)].reset_index(drop=True)
            for key, frame in frames.items()
        }
        inside = [pair for pair in pairs if set(pair) <= set(arms)]
        for key, table in report.tables(own, settings, inside).items():
            if key in ("gates", "samples", "runs"):
                table.insert(0, "group", name)
            parts.setdefault(key, []).append(table)
    return {key: pd.concat(found, ignore_index=True) for key, found in parts.items()}


def parents_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What SFT and reward model of each group can do (`runs` as `tables_by_group` has it): rows as
    `claims.by_arm`, a group in the place of an arm, for `report.arm_table`."""
    rows = []
    for (stage, key), title in PARENTS.items():
        column = f"summary.{key}"
        for group, table in runs[runs["stage"] == stage].groupby("group", sort=False):
            if column not in table or table[column].isna().any():
                continue
            found = stats.mean_interval(table[column])
            rows.append({
                "arm": group, "label": group, "endpoint": title, "mean": found.mean,
                "low": found.low, "high": found.high, "chains": found.n, "missed": 0,
            })  # fmt: skip
    return pd.DataFrame(rows)
