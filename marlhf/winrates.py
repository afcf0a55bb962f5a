"""Win rates of one policy against another on the same prompts, and how far judges agree (Fig. 4,
Table 1). Arithmetic on tables alone: who judges is in `marlhf.judges`.

An outcome is 1 where the arm's response is preferred, -1 where the reference's is, 0 for a tie. A
win rate is the share of wins plus half of the ties. The replicate is a chain, as everywhere:
over chains stands the mean of the chains' rates with a t interval; within a chain, over its
prompts, a Wilson interval that counts a tie as half a win, which makes it wider than it need be.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, special
from scipy.stats import norm

from marlhf import stats
from marlhf.claims import SCORES

KEYS = ["arm", "label", "reference", "reference_label"]
SFT = "sft"
SPREAD = 5.0  # of the normal prior on the effect of length
PAIRED = ("response", "rm_score", "true_score", "length")


def pairs(samples: pd.DataFrame, arm: str, reference: str) -> pd.DataFrame:
    """The last responses of two arms to the same held-out prompts, a row a chain and prompt.

    samples: an experiment's table (arm, label, chain, update, prompt_id, prompt and the columns of
    `PAIRED`). Those columns are the arm's; with "reference_" in front, the reference's. Reference
    "sft" is the SFT model, which every arm of a chain starts from: the arm's responses at update 0.
    Raises ValueError where an arm is missing or the two did not answer the same prompts.
    """
    for name in {arm, reference} - {SFT}:
        if not (samples["arm"] == name).any():
            known = ", ".join(dict.fromkeys(samples["arm"]))
            raise ValueError(f"pairs: no arm {name!r} in the samples; there is {known}")
    last = samples[samples["update"] == samples["update"].max()]
    first = samples[(samples["update"] == 0) & (samples["arm"] == arm)]
    ours = last[last["arm"] == arm]
    theirs = (
        first.assign(label="SFT") if reference == SFT else last[last["arm"] == reference]
    ).assign(arm=reference)
    both = ours.merge(
        theirs[["chain", "prompt_id", "arm", "label", *PAIRED]].rename(
            columns={"arm": "reference", "label": "reference_label"}
            | {name: f"reference_{name}" for name in PAIRED}
        ),
        on=["chain", "prompt_id"],
        validate="one_to_one",
    )
    if not len(both) == len(ours) == len(theirs):
        raise ValueError(
            f"pairs: {arm} has {len(ours)} responses, {reference} {len(theirs)}, and {len(both)} "
            "are to the same prompts; compare runs of one experiment and scale"
        )
    others = [f"reference_{name}" for name in PAIRED]
    columns = [*KEYS, "chain", "prompt_id", "prompt", *PAIRED, *others]
    return both[columns].reset_index(drop=True)


# Win rates


def check(outcomes: Sequence[float]) -> np.ndarray:
    """Outcomes [N] as integers; raises ValueError for none, or one that is not 1, 0 or -1."""
    found = np.asarray(outcomes, dtype=float)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"outcomes: expected one a pair, got shape {found.shape}")
    bad = np.flatnonzero(~np.isin(found, (-1, 0, 1)))
    if len(bad):
        raise ValueError(
            f"outcomes: number {bad[0]} is {found[bad[0]]:g}, not 1, 0 or -1 ({len(bad)} such); "
            "leave out pairs without an answer, and say how many"
        )
    return found.astype(int)


def win_rate(outcomes: Sequence[float]) -> float:
    """(wins + ties / 2) / pairs."""
    return float((1 + check(outcomes).mean()) / 2)


def wilson(share: float, n: int, confidence: float = 0.95) -> stats.Interval:
    """Wilson interval of a share of n pairs, which need not be a whole number of them: with ties
    counted as half a win the spread is smaller than a coin's, and the interval too wide."""
    if n < 1:
        raise ValueError("wilson: there are no pairs")
    z = float(norm.ppf((1 + confidence) / 2))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return stats.Interval(share, max(0.0, middle - half), min(1.0, middle + half), n)


def length_controlled(outcomes: Sequence[float], difference: Sequence[float]) -> float:
    """The win rate at equal length, by a logistic regression, in the manner of AlpacaEval 2.0
    (Dubois et al. 2024, arXiv 2404.04475; without its terms for models and instructions):

        P(win) = sigmoid(theta + phi tanh(d / sd(d)))        read at d = 0: sigmoid(theta)

    d [N]: length of the arm's response minus the reference's; a tie counts as half a win. A normal
    prior (mean 0, spread 5) on phi keeps it finite where length alone decides. Outcomes that are
    all alike, or lengths that never differ, leave the win rate as it is.
    """
    outcomes, d = check(outcomes), np.asarray(difference, dtype=float)
    if d.shape != outcomes.shape or not np.isfinite(d).all():
        raise ValueError(f"length_controlled: {len(outcomes)} outcomes, {d.shape} finite lengths")
    won = (1 + outcomes) / 2
    if won.min() == won.max() or d.std() == 0:
        return float(won.mean())
    x = np.tanh(d / d.std())

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        logit = at[0] + at[1] * x
        value = (np.logaddexp(0, logit) - won * logit).sum() + at[1] ** 2 / (2 * SPREAD**2)
        wrong = special.expit(logit) - won
        return value, np.array([wrong.sum(), wrong @ x + at[1] / SPREAD**2])

    found = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(special.expit(found.x[0]))


def by_chain(pairs: pd.DataFrame, outcomes: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Win rates of one arm against one reference, a row a judge and chain: wins, ties, losses,
    pairs, win_rate with its Wilson interval (low, high), length_controlled, and how much longer the
    arm's responses are. outcomes: {judge: [N], a number a row of `pairs`}."""
    rows = []
    for judge, found in outcomes.items():
        frame = pairs.assign(outcome=check(found))
        for key, group in frame.groupby([*KEYS, "chain"], sort=False):
            won, n = group["outcome"].to_numpy(), len(group)
            longer = group["length"] - group["reference_length"]
            interval = wilson(win_rate(won), n)
            rows.append({
                **dict(zip([*KEYS, "chain"], key, strict=True)), "judge": judge,
                "wins": int((won == 1).sum()), "ties": int((won == 0).sum()),
                "losses": int((won == -1).sum()), "pairs": n, "win_rate": interval.mean,
                "low": interval.low, "high": interval.high,
                "length_controlled": length_controlled(won, longer),
                "longer": float(longer.mean()),
            })  # fmt: skip
    return pd.DataFrame(rows)


def over_chains(table: pd.DataFrame, measures: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """Mean over chains of each measure, a share, with its 95% t interval, which ends at 0 and 1
    (infinite for a single chain): the columns `by`, measure, mean, low, high, chains. A measure
    that a chain has no number for has no mean either."""
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        for measure in measures:
            values = group[measure].to_numpy(float)
            known = np.isfinite(values).all()
            mean = stats.mean_interval(values) if known else stats.Interval(*[math.nan] * 3, 0)
            low, high = mean.low, mean.high
            if mean.n > 1:
                low, high = max(0.0, low), min(1.0, high)
            head = dict(zip(by, key, strict=True)) | {"measure": measure}
            rows.append(head | {"mean": mean.mean, "low": low, "high": high,
                                "chains": len(values)})  # fmt: skip
    return pd.DataFrame(rows)


# Agreement


def kappa(first: Sequence[float], second: Sequence[float]) -> float:
    """Cohen's kappa over win, tie and loss: (p_o - p_e) / (1 - p_e), p_o the share of pairs on
    which the judges agree, p_e what their own rates would give by chance. NaN where both always
    say the same one thing, so that chance explains all."""
    a, b = check(first), check(second)
    observed = (a == b).mean()
    chance = sum((a == k).mean() * (b == k).mean() for k in (-1, 0, 1))
    return float((observed - chance) / (1 - chance)) if chance < 1 else math.nan


def agreement(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Two judges of the same pairs [N]: `agreement` over the `decided` pairs that neither calls a
    tie (Table 1), with its Wilson interval (low, high); `same`, with a tie as a third answer, with
    its own (same_low, same_high), over all `pairs`; `kappa`. NaN where nothing was decided."""
    a, b = check(first), check(second)
    if len(a) != len(b):
        raise ValueError(f"agreement: one judge has {len(a)} pairs, the other {len(b)}")
    decided = (a != 0) & (b != 0)
    right, n = int((a == b)[decided].sum()), int(decided.sum())
    share = stats.proportion_interval(right, n) if n else stats.Interval(*[math.nan] * 3, 0)
    same = stats.proportion_interval(int((a == b).sum()), len(a))
    return {
        "agreement": share.mean, "low": share.low, "high": share.high, "decided": n,
        "same": same.mean, "same_low": same.low, "same_high": same.high, "pairs": len(a),
        "kappa": kappa(a, b),
    }  # fmt: skip


def agreements(votes: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """`agreement` of every two judges or annotators, a row each: first, second, ... votes: {name:
    [N] outcomes of the same pairs, NaN where there is no answer}; each two are compared on the
    pairs that both answered, and those that share none are left out."""
    rows, names = [], list(votes)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = (np.asarray(votes[name], dtype=float) for name in (first, second))
            both = ~np.isnan(a) & ~np.isnan(b)
            if both.any():
                rows.append({"first": first, "second": second, **agreement(a[both], b[both])})
    return pd.DataFrame(rows)


def agreement_by_chain(
    pairs: pd.DataFrame, first: Sequence[float], second: Sequence[float]
) -> pd.DataFrame:
    """`agreement` of two judges within each chain, a row a chain."""
    frame = pairs.assign(first=check(first), second=check(second))
    rows = [
        dict(zip([*KEYS, "chain"], key, strict=True))
        | agreement(group["first"].to_numpy(), group["second"].to_numpy())
        for key, group in frame.groupby([*KEYS, "chain"], sort=False)
    ]
    return pd.DataFrame(rows)


def endpoints(rates: pd.DataFrame, agreed: pd.DataFrame | None = None) -> pd.DataFrame:
    """What the claims read, columns as `claims.endpoints`: win rates, raw and length-controlled,
    and agreements, all shares, a row an arm, chain and endpoint.

    rates: `by_chain` with the column task; agreed: `agreement_by_chain` with task, if any. Titles
    name task and judge, and the reference where it is not the arm "token". Agreement is on the
    responses of MA-PPO and PPO; it is left out where a chain has none: no pair was decided.
    """
    rows = []
    titles = {"win_rate": "win rate", "length_controlled": "length-controlled win rate"}
    for _, row in rates.iterrows():
        against = "" if row["reference"] == "token" else f", against {row['reference_label']}"
        for name, title in titles.items():
            rows.append(row[["arm", "label", "chain"]].to_dict() | {
                "endpoint": f"{title} on {row['task']}, {row['judge']}{against}",
                "value": row[name],
            })  # fmt: skip
    agreed = pd.DataFrame(columns=["reference", "task"]) if agreed is None else agreed
    for task, group in agreed[agreed["reference"] == "token"].groupby("task", sort=False):
        if group["agreement"].notna().all():
            title = f"agreement on {task}, {SCORES['rm_score']} and {SCORES['true_score']}"
            part = group[["arm", "label", "chain"]].assign(endpoint=title, value=group["agreement"])
            rows += part.to_dict("records")
    table = pd.DataFrame(rows).assign(unit="share", censored=False)
    return table[["arm", "label", "chain", "endpoint", "unit", "value", "censored"]]


# Beside the scores, and words


def texts(samples: pd.DataFrame) -> pd.DataFrame:
    """What the same responses look like, a row a policy, mean over chains: tokens, distinct-1 and
    distinct-2 (over a chain's responses), share finished, scores. Last responses of every arm; of
    the SFT model, the first."""
    from marlhf.evaluate import distinct  # brings torch, which nothing else here needs

    start = samples[(samples["update"] == 0) & (samples["arm"] == samples["arm"].iloc[0])]
    last = samples[samples["update"] == samples["update"].max()]
    rows = []
    both = pd.concat([start.assign(arm=SFT, label="SFT"), last])
    for (arm, label, _), group in both.groupby(["arm", "label", "chain"], sort=False):
        responses = group["response"].tolist()
        rows.append({
            "arm": arm, "policy": label, "tokens": group["length"].mean(),
            "distinct-1": distinct(responses, 1), "distinct-2": distinct(responses, 2),
            "finished": group["finished"].mean(),
            **{title: group[name].astype(float).mean() for name, title in SCORES.items()},
        })  # fmt: skip
    return pd.DataFrame(rows).groupby(["arm", "policy"], sort=False).mean().reset_index()


def percent(x: float) -> str:
    return f"{100 * x:.1f}%"


def _interval(row: pd.Series) -> str:
    """57.6% (50.8 to 64.4); a bound that would read 50.0 has another digit."""
    bounds = [f"{100 * row[end]:.1f}" for end in ("low", "high")]
    if "50.0" in bounds:
        bounds = [f"{100 * row[end]:.2f}" for end in ("low", "high")]
    return f"{percent(row['mean'])} ({' to '.join(bounds)})"


def sentence(rows: pd.DataFrame) -> str:
    """One judge's win rate in words, from its two rows of `over_chains` (win_rate,
    length_controlled); the verdict is the interval's of the raw rate: above one half or below."""
    raw, controlled = (
        rows[rows["measure"] == name].iloc[0] for name in ("win_rate", "length_controlled")
    )
    who = f"{raw['task']}, by {raw['judge']}: {raw['label']} against {raw['reference_label']}"
    if raw["chains"] == 1:
        return f"{who}: {percent(raw['mean'])}; a single chain has no interval over chains."
    verdict = "preferred" if raw["low"] > 0.5 else "not told apart"
    verdict = "preferred less" if raw["high"] < 0.5 else verdict
    text = f"{verdict}, {_interval(raw)}, at equal length {_interval(controlled)}"
    return f"{who}: {text}, {raw['chains']} chains."


def agreement_sentence(row: pd.Series) -> str:
    """A row of `over_chains` of agreements (task, pairs) in words; the verdict is its interval's:
    above what chance gives, one half, or below."""
    who = f"{row['task']}, {row['pairs']}"
    if math.isnan(row["mean"]):
        return f"{who}: there is no pair that both judges decide, in one chain or more."
    if row["chains"] == 1:
        return f"{who}: {percent(row['mean'])}; a single chain has no interval over chains."
    verdict = "more than by chance" if row["low"] > 0.5 else "not told apart from chance"
    verdict = "less than by chance" if row["high"] < 0.5 else verdict
    return f"{who}: {verdict}, {_interval(row)}, {row['chains']} chains."
