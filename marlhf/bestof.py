"""Best of N by the reward model, from repeated samples alone (Fig. 8).

Of N responses to a prompt the one with the highest RM score is taken. With S >= N samples of a
prompt its expected score is the mean over all C(S, N) subsets, exactly and without drawing any: the
largest of a subset is among the k lowest with chance C(k, N) / C(S, N). What the chosen response's
true score, length and perplexity are follows with the same weights. Where the RM score rises with N
and the true score does not, the reward model is being gamed by selection alone.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from marlhf import claims, stats
from marlhf.quality import at_temperature

NS = (1, 2, 4, 8, 16, 32)
COMPARED = (1, 4, 16, 32)  # of the means over temperatures
COLUMNS = ["arm", "label", "chain", "endpoint", "unit", "value", "censored"]
MEASURES = ("rm_score", "true_score", "kl", "length", "ref_nll")


def selection_weights(scores: np.ndarray, n: int) -> np.ndarray:
    """Chance that each of S samples is the best of n drawn from them without replacement.

    scores ``[..., S]``: higher is better; equal ones share their chance evenly. Returns weights
    ``[..., S]`` that sum to 1. Raises ValueError unless 1 <= n <= S.
    """
    samples = scores.shape[-1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n}: there are {samples} samples of a prompt")
    below = np.array([math.comb(k, n) / math.comb(samples, n) for k in range(samples + 1)])
    low = rankdata(scores, "min", axis=-1).astype(int) - 1  # how many are worse
    high = rankdata(scores, "max", axis=-1).astype(int)  # how many are no better, itself included
    return (below[high] - below[low]) / (high - low)


def kl_of_selection(n: int) -> float:
    """log n - (n - 1) / n, in nats: how far choosing the best of n moves a policy from itself; an
    upper bound, exact where no two draws score the same (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def best_of_n(repeated: pd.DataFrame, ns: Sequence[int] = NS) -> pd.DataFrame:
    """The chosen response's scores by N, means over prompts: arm, label, chain, temperature, n,
    rm_score, true_score, kl, length, ref_perplexity, kl_of_selection. Of `ns` those that the number
    of samples allows.

    repeated: an experiment's repeated samples (arm, label, chain, temperature, prompt_id, sample,
    and the measures; true_score null where there is none). Raises ValueError where a sample has no
    RM score or prompts have different numbers of samples.
    """
    rows = []
    keys = ["arm", "label", "chain", "temperature"]
    for key, group in repeated.groupby(keys, sort=False):
        where = f"best of N, {key[0]}, chain {key[2]}, temperature {key[3]:g}"
        if group["rm_score"].isna().any():
            raise ValueError(f"{where}: a sample has no RM score; a reward model is needed")
        counts = group.groupby("prompt_id").size()
        if counts.nunique() != 1:
            least, most = counts.idxmin(), counts.idxmax()
            raise ValueError(
                f"{where}: {counts[least]} samples of prompt {least}, {counts[most]} of {most}"
            )
        ordered = group.sort_values(["prompt_id", "sample"])
        shape = len(counts), int(counts.iloc[0])
        table = {name: ordered[name].to_numpy(float).reshape(shape) for name in MEASURES}
        for n in [each for each in ns if each <= shape[1]]:
            weights = selection_weights(table["rm_score"], n)
            means = {m: float((weights * x).sum(-1).mean()) for m, x in table.items()}
            surprise = means.pop("ref_nll") / means["length"]
            rows.append({
                **dict(zip(keys, key, strict=True)), "n": n, **means,
                "ref_perplexity": math.exp(surprise), "kl_of_selection": kl_of_selection(n),
            })  # fmt: skip
    return pd.DataFrame(rows)


def title(score: str, n: int, temperature: float | None = None) -> str:
    """Title of an endpoint of Fig. 8; without a temperature, the mean over all of them."""
    return at_temperature(f"{claims.SCORES[score]} of the best of {n}", temperature)


def primary(samples: int) -> str:
    """Title of the primary endpoint: the RM score of the best of 16, or of the largest compared N
    that so many samples allow (smoke has few), mean over temperatures."""
    return title("rm_score", max(n for n in COMPARED if n <= min(16, samples)))


def compared_titles(curves: pd.DataFrame) -> list[str]:
    """The endpoints that arms are compared in: COMPARED, mean over temperatures, both scores."""
    ns = [n for n in COMPARED if (curves["n"] == n).any()]
    return [title(score, n) for score in _scores(curves) for n in ns]


def _scores(curves: pd.DataFrame) -> list[str]:
    return [score for score in claims.SCORES if curves[score].notna().all()]


def endpoints(curves: pd.DataFrame) -> pd.DataFrame:
    """Both scores of the best of every N, at each temperature and as the mean over temperatures;
    columns as `claims.endpoints`. curves: as `best_of_n` returns it."""
    parts = []
    for score in _scores(curves):
        for n, rows in curves.groupby("n"):
            each = rows.assign(endpoint=[title(score, n, t) for t in rows["temperature"]])
            mean = rows.groupby(["arm", "label", "chain"], sort=False)[score].mean().reset_index()
            for part in (each, mean.assign(endpoint=title(score, n))):
                part = part.assign(unit="score", value=part[score], censored=False)
                parts.append(part[COLUMNS])
    return pd.concat(parts, ignore_index=True)


def selection_sentences(curves: pd.DataFrame) -> list[str]:
    """What selection alone gains each policy, from N = 1 to the largest N, in every score: means
    over temperatures, paired within chains, with the chosen responses' length beside them."""
    ends = curves["n"].min(), curves["n"].max()
    means = curves.groupby(["arm", "n", "chain"]).mean(numeric_only=True)
    says = []
    for arm, label in curves[["arm", "label"]].drop_duplicates().itertuples(index=False):
        first, last = (means.loc[arm, n] for n in ends)
        parts = []
        for score in _scores(curves):
            gain = stats.paired_interval(last[score], first[score])
            text = f"{claims.SCORES[score]} {_signed(gain.mean)}"
            if math.isfinite(gain.low):
                text += f" ({_signed(gain.low)} to {_signed(gain.high)})"
            parts.append(text)
        tokens = _signed((last["length"] - first["length"]).mean())
        says.append(f"{label}, best of {ends[1]} instead of {ends[0]}: {', '.join(parts)}; "
                    f"{tokens} tokens.")  # fmt: skip
    return says


def _signed(x: float) -> str:
    return f"{x:+.2f}".replace("-", "−")
