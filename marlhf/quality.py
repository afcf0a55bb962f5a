"""What stands beside a score, and what a score becomes at another sampling temperature, from the
repeated samples of an experiment alone (Fig. 21): length, diversity, perplexity under the
reference.

Distinct-1 and distinct-2 (Li et al. 2016) are over one response to every held-out prompt together,
so they tell how much responses to different prompts differ. Perplexity is that of the chain's SFT
model at temperature 1, over all tokens of the responses.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from marlhf import claims, report

TITLES = {
    **claims.SCORES,
    "kl": "KL to SFT (nats a response)",
    "length": "response length (tokens)",
    "finished": "share finished",
    "distinct1": "distinct words (share)",
    "distinct2": "distinct bigrams (share)",
    "ref_perplexity": "perplexity under the reference",
}


def quality_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean and 95% t interval over chains of every measure, a row an arm and measure, SFT's first;
    columns as `claims.by_arm`, so that `report.arm_table` shows it. Of several temperatures, each
    has its rows. frames: those of an experiment with repeated samples ("quality" is read).
    """
    quality = frames["quality"]
    several = quality["temperature"].nunique() > 1
    parts = []
    for temperature, rows in quality.groupby("temperature", sort=False):
        for name in [n for n in TITLES if rows[n].notna().all()]:
            title = at_temperature(TITLES[name], temperature) if several else TITLES[name]
            # the SFT model's KL to itself is rounding, of either sign: 0
            parts.append(_values(rows, title, rows[name].round(5) + 0.0))
    return claims.by_arm(pd.concat(parts, ignore_index=True))


def _values(rows: pd.DataFrame, title: str, values: pd.Series) -> pd.DataFrame:
    """Endpoints as `claims.endpoints` has them; a score is never censored."""
    head = rows[["arm", "label", "chain"]].reset_index(drop=True)
    return head.assign(endpoint=title, unit="score", value=values.to_numpy(), censored=False)


def at_temperature(measure: str, temperature: float | None = None) -> str:
    """Title of a measure at a temperature; without one, of its mean over all temperatures."""
    if temperature is None:
        return f"{measure}, mean over temperatures"
    return f"{measure} at temperature {temperature:g}"


def temperature_endpoints(quality: pd.DataFrame) -> pd.DataFrame:
    """Fig. 21: RM score and true score at each temperature and their mean over temperatures, of
    every arm and chain; columns as `claims.endpoints`.

    quality: arm, label, chain, temperature, rm_score, true_score (null where there is none).
    """
    parts = []
    for score in [s for s in claims.SCORES if quality[s].notna().all()]:
        for temperature, rows in quality.groupby("temperature"):
            parts.append(_values(rows, at_temperature(TITLES[score], temperature), rows[score]))
        keys = ["arm", "label", "chain"]
        means = quality.groupby(keys, sort=False)[score].mean().reset_index()
        parts.append(_values(means, at_temperature(TITLES[score]), means[score]))
    return pd.concat(parts, ignore_index=True)


def sample_tables(
    values: pd.DataFrame,
    runs: pd.DataFrame,
    pairs: Sequence[Sequence[str]],
    compared: Sequence[str],
) -> dict[str, pd.DataFrame]:
    """Tables of an experiment that trains nothing: endpoints, arms, comparisons, power, runs.

    values: every endpoint; compared: the titles of those that `comparisons` and `power` hold, in
    this order; `power` needs two chains. runs: the experiment's frame of that name.
    """
    found = [values[values["endpoint"] == title] for title in compared]
    chosen = pd.concat(found, ignore_index=True)
    made = {
        "endpoints": values, "arms": claims.by_arm(values),
        "comparisons": claims.compare(chosen, pairs),
        "runs": runs.drop(columns=report.NOT_KEPT, errors="ignore"),
    }  # fmt: skip
    if values["chain"].nunique() > 1:
        made["power"] = claims.power(chosen, pairs)
    return made
