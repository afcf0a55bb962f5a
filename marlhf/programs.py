"""Tables of programs, from results alone: pass@k by difficulty (Table 3), the twin's gates.

A response passes where its reward is 1: every test passed (App. B.5).
"""

import math
from collections.abc import Sequence

import pandas as pd

from marlhf import stats

LEVELS = ("introductory", "interview", "competition", "all")
LOW, HIGH = 0.10, 0.50  # of the SFT model's pass@1: something to learn from, something to gain


def pass_rates(repeated: pd.DataFrame, ks: Sequence[int] = (1, 5)) -> pd.DataFrame:
    """pass@k of every arm, chain and difficulty, mean over problems: arm, label, chain, difficulty
    ("all" among them), k, value.

    repeated: an experiment's table of repeated samples at one temperature (arm, label, chain,
    prompt_id, difficulty, true_score). Raises ValueError for fewer samples of a problem than k, or
    several temperatures.
    """
    if repeated["temperature"].nunique() != 1:
        raise ValueError("pass_rates: samples of one temperature are wanted")
    frame = repeated.assign(right=repeated["true_score"] >= 1 - 1e-6)
    keys = ["arm", "label", "chain", "difficulty", "prompt_id"]
    counts = frame.groupby(keys, sort=False)["right"].agg(["sum", "size"]).reset_index()
    parts = []
    for k in ks:
        rates = [
            stats.pass_at_k(int(c), int(n), k)
            for c, n in zip(counts["sum"], counts["size"], strict=True)
        ]
        part = counts.assign(k=k, value=rates)
        parts += [part, part.assign(difficulty="all")]
    groups = ["arm", "label", "chain", "difficulty", "k"]
    return pd.concat(parts).groupby(groups, sort=False)["value"].mean().reset_index()


def endpoints(rates: pd.DataFrame) -> pd.DataFrame:
    """pass@k over all problems in the columns of `claims.endpoints`, as claims read it; rates: as
    `pass_rates` returns it."""
    whole = rates[rates["difficulty"] == "all"]
    columns = ["arm", "label", "chain", "endpoint", "unit", "value", "censored"]
    named = "pass@" + whole["k"].astype(str)
    return whole.assign(endpoint=named, unit="share", censored=False)[columns]


def table3(rates: pd.DataFrame, reference: str) -> pd.DataFrame:
    """A row a difficulty, k and arm: mean pass@k with its 95% t interval over chains, and the
    paired difference to `reference` with its own. rates: as `pass_rates` returns it."""
    rows = []
    for level in [each for each in LEVELS if (rates["difficulty"] == each).any()]:
        for k in sorted(rates["k"].unique()):
            part = rates[(rates["difficulty"] == level) & (rates["k"] == k)]
            other = part[part["arm"] == reference].sort_values("chain")
            for (arm, label), group in part.groupby(["arm", "label"], sort=False):
                group = group.sort_values("chain")
                if list(group["chain"]) != list(other["chain"]):
                    raise ValueError(f"table3: {arm} and {reference} have different chains")
                mean = stats.mean_interval(group["value"])
                gain = stats.paired_interval(group["value"], other["value"])
                rows.append({
                    "difficulty": level, "k": k, "arm": arm, "label": label, "mean": mean.mean,
                    "low": mean.low, "high": mean.high, "difference": gain.mean,
                    "difference_low": gain.low, "difference_high": gain.high, "chains": mean.n,
                })  # fmt: skip
    return pd.DataFrame(rows)


def table3_wide(table: pd.DataFrame) -> pd.DataFrame:
    """`table3` for reading: a row a difficulty and k, an arm a column, percent ± half interval."""

    def cell(row: pd.Series) -> str:
        half = 50 * (row["high"] - row["low"])
        text = f"{100 * row['mean']:.1f}"
        return f"{text} ± {half:.1f}" if math.isfinite(half) else text

    rows: dict[tuple, dict[str, str]] = {}
    for _, row in table.iterrows():
        key = (row["difficulty"], row["k"])
        line = rows.setdefault(key, {"difficulty": key[0], "metric": f"pass@{key[1]}, %"})
        line[row["label"]] = cell(row)
    return pd.DataFrame(rows.values())


def sentences(table: pd.DataFrame, pairs: Sequence[Sequence[str]], reference: str) -> list[str]:
    """Each arm against `reference` in pass@k over all problems, worded by its interval."""
    says = []
    other = table.loc[table["arm"] == reference, "label"].iloc[0]
    for arm in [a for a, b in pairs if b == reference]:
        rows = table[(table["arm"] == arm) & (table["difficulty"] == "all")]
        for _, row in rows.iterrows():
            low, high = 100 * row["difference_low"], 100 * row["difference_high"]
            verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
            text = f"pass@{row['k']}, {row['label']} against {other}: {verdict}, difference "
            text += f"{100 * row['difference']:.1f} points"
            if math.isfinite(low):
                text += f" (95% interval {low:.1f} to {high:.1f}, {row['chains']} chains)"
            says.append(text + ".")
    return says


def gates(rates: pd.DataFrame) -> pd.DataFrame:
    """What the twin must show before arms are compared, columns as `claims.gates`: the SFT model's
    pass@1 within LOW and HIGH, and PPO raises it (mean over arms). rates: as `pass_rates` returns
    it, with the SFT models as the arm "sft"."""
    whole = rates[(rates["difficulty"] == "all") & (rates["k"] == 1)]
    sft = whole[whole["arm"] == "sft"].set_index("chain")["value"]
    gain = whole[whole["arm"] != "sft"].groupby("chain")["value"].mean() - sft
    rows = []
    for name, values, low, high in (
        ("SFT pass@1 on held-out problems", sft, LOW, HIGH),
        ("pass@1 gained over PPO", gain, 0.0, math.inf),
    ):
        inside, mean = values.between(low, high), float(values.mean())
        worst = pd.concat([low - values, values - high], axis=1).max(axis=1).idxmax()
        rows.append({
            "gate": name, "at_least": low, "at_most": high if math.isfinite(high) else math.nan,
            "mean": mean, "worst": float(values[worst]), "chains_passing": int(inside.sum()),
            "chains": len(values), "passes": bool(low <= mean <= high),
        })  # fmt: skip
    return pd.DataFrame(rows)
