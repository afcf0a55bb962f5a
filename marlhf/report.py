"""What an experiment leaves under results/: results/<scale>/<name>/*.csv, *.png, and summary.json,
which is written last.

    python -m marlhf.report --scale tiny     # the report of all experiments: see marlhf.page
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from marlhf import claims, runs
from marlhf.claims import SCORES, number
from marlhf.config import CONFIGS, read_yaml

HOME = Path(__file__).resolve().parent.parent
KEPT = [  # of the metrics; the others stay in the runs
    "arm", "label", "chain", "update", "seconds", "rm_score", "true_score", "kl", "length",
    "finished", "entropy", "clip_fraction", "explained_variance", "macros", "adv_rms_token",
    "adv_rms_macro", "ret_rms_token", "ret_rms_macro", "adv_l2_macro", "q_l2_macro",
    "tokens_per_second",
]  # fmt: skip
NOT_KEPT = ["config", "versions", "peak_rss_mib"]  # of the manifests


def densities(samples: pd.DataFrame, steps: int = 5, points: int = 120) -> pd.DataFrame:
    """Densities of the scores of all held-out prompts, chains together, at `steps` evaluations from
    the first to the last: arm, label, update, measure, score, density, mean. A Gaussian kernel with
    Scott's bandwidth, on a grid that all arms and updates share."""
    updates = np.sort(samples["update"].unique())
    kept = updates[np.unique(np.linspace(0, len(updates) - 1, steps).round().astype(int))]
    samples = samples[samples["update"].isin(kept)]
    parts = []
    for measure in [m for m in SCORES if samples[m].notna().all()]:
        low, high = samples[measure].quantile([0.001, 0.999])
        room = 0.1 * (high - low) + 1e-6
        grid = np.linspace(low - room, high + room, points)
        for key, group in samples.groupby(["arm", "label", "update"], sort=False):
            x = group[measure].to_numpy(float)
            width = max(x.std() * len(x) ** -0.2, room / 10)
            density = norm.pdf((grid[:, None] - x) / width).mean(1) / width
            part = pd.DataFrame({"score": grid, "density": density})
            head = dict(zip(("arm", "label", "update"), key, strict=True))
            parts.append(part.assign(**head, measure=measure, mean=x.mean()))
    columns = ["arm", "label", "update", "measure", "score", "density", "mean"]
    return pd.concat(parts, ignore_index=True)[columns]


def side_by_side(samples: pd.DataFrame, prompts: int = 3) -> pd.DataFrame:
    """Responses of the first chain to the first prompts, not chosen: SFT's, then each arm's at the
    end; prompt_id, prompt, policy, response, rm_score, true_score, length."""
    samples = samples[samples["chain"] == samples["chain"].min()]
    ids = list(dict.fromkeys(samples["prompt_id"]))[:prompts]
    first = samples[(samples["update"] == 0) & (samples["arm"] == samples["arm"].iloc[0])]
    last = samples[samples["update"] == samples["update"].max()]
    both = pd.concat([first.assign(policy="SFT"), last.assign(policy=last["label"])])
    both = both[both["prompt_id"].isin(ids)]
    both = both.assign(order=both["prompt_id"].map(ids.index)).sort_values("order", kind="stable")
    columns = ["prompt_id", "prompt", "policy", "response", "rm_score", "true_score", "length"]
    return both[columns].reset_index(drop=True)


def wide(responses: pd.DataFrame) -> pd.DataFrame:
    """`side_by_side` for reading: a prompt a row, a policy a column, scores after each response."""
    rows: dict[str, dict[str, str]] = {}
    for _, row in responses.iterrows():
        names = {"RM": row["rm_score"], "true": row["true_score"]}
        scores = ", ".join(f"{n} {x:.2f}" for n, x in names.items() if not math.isnan(x))
        cells = rows.setdefault(row["prompt_id"], {"prompt": row["prompt"].strip()})
        cells[row["policy"]] = f"{row['response'].strip()} *({scores})*"
    return pd.DataFrame(rows.values())


def tables(
    frames: Mapping[str, pd.DataFrame], settings: Mapping, pairs: Sequence[Sequence[str]]
) -> dict[str, pd.DataFrame]:
    """All tables of an experiment from its frames (evals, metrics, samples, runs).

    settings, pairs: the experiment's endpoints and comparisons. `power` needs two chains, `gates`
    a true score; without them they are left out. "endpoints" also has `claims.over_training`, which
    verdicts read; it is not compared here.
    """
    evals, samples = frames["evals"], frames["samples"]
    judged = bool((frames["runs"]["stage"] == "rm").any())
    if not judged:  # the task scores itself: what trained the policy is the true score
        evals, samples = evals.assign(rm_score=math.nan), samples.assign(rm_score=math.nan)
    values = claims.endpoints(evals, settings)
    made = {
        "evals": evals.drop(columns="prompts"), "metrics": frames["metrics"][KEPT],
        "densities": densities(samples), "samples": side_by_side(samples),
        "endpoints": pd.concat(
            [values, claims.over_training(frames["metrics"])], ignore_index=True),
        "arms": claims.by_arm(values),
        "comparisons": claims.compare(values, pairs),
        "runs": frames["runs"].drop(columns=NOT_KEPT, errors="ignore"),
    }  # fmt: skip
    if evals["chain"].nunique() > 1:
        made["power"] = claims.power(values, pairs)
    if judged and evals["true_score"].notna().all():
        made["gates"] = claims.gates(evals, frames["runs"])
    return made


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; floats to three digits, missing ones empty."""

    def cell(x: Any) -> str:
        if isinstance(x, (float, np.floating)):
            return "" if math.isnan(x) else number(x)
        text = str(x).replace("|", "\\|").replace("\n", "<br>")
        return re.sub("(?<=<br>) +", lambda spaces: "&nbsp;" * len(spaces[0]), text)  # programs

    lines = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cell(x) for x in line) + " |" for line in lines)


def mean_and_half(mean: float, low: float, high: float) -> str:
    """1.96 ± 0.15: two digits of half the interval set those of the mean; the mean alone where
    there is no interval."""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def arm_table(arms: pd.DataFrame) -> pd.DataFrame:
    """`claims.by_arm` as people read it: an endpoint a row, an arm a column, mean ± half of the
    interval, and how many chains missed."""

    def cell(row: pd.Series) -> str:
        text = mean_and_half(row["mean"], row["low"], row["high"])
        return text + (f" ({row['missed']} missed)" if row["missed"] else "")

    rows: dict[str, dict[str, str]] = {}
    for _, row in arms.iterrows():
        line = rows.setdefault(row["endpoint"], {"endpoint": row["endpoint"]})
        line[row["label"]] = cell(row)
    return pd.DataFrame(rows.values())


# Files


def results_root(root: str | Path | None = None) -> Path:
    """$MARLHF_RESULTS, or results/ beside the package."""
    return Path(root or os.environ.get("MARLHF_RESULTS") or HOME / "results")


def results_folder(name: str, scale: str, root: str | Path | None = None) -> Path:
    """results/<scale>/<name>/, made, and without the summary of an earlier run, so that a folder
    with a summary.json is always whole."""
    folder = results_root(root) / scale / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    return folder


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """<name>.csv for each table, floats to five digits; nine for the endpoints, which verdicts are
    computed from."""
    for name, table in tables.items():
        digits = "%.9g" if name == "endpoints" else "%.5g"
        text = table.to_csv(index=False, float_format=digits, lineterminator="\n")
        runs.atomic_write(folder / f"{name}.csv", text)


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """{name: table} of the folder's CSV files; an empty response stays an empty text."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(Path(folder).glob("*.csv"))}
    if "samples" in tables:
        tables["samples"]["response"] = tables["samples"]["response"].fillna("")
    return tables


def finish(folder: Path, facts: Mapping[str, Any]) -> Path:
    """summary.json, last and atomically: the facts, every table, every picture with its
    alternative text (from the PNG itself)."""
    from PIL import Image

    pictures = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            pictures[path.name] = image.info.get("Description", "")
    listed = {"tables": sorted(p.name for p in folder.glob("*.csv")), "pictures": pictures}
    text = json.dumps({**facts, **listed}, indent=1, ensure_ascii=False) + "\n"
    runs.atomic_write(folder / "summary.json", text)
    return folder / "summary.json"


def run_facts(manifests: pd.DataFrame) -> dict[str, Any]:
    """How many runs, their minutes of one thread, revisions, devices, and versions of libraries."""
    return {
        "runs": len(manifests), "minutes": round(float(manifests["minutes"].sum()), 1),
        "revisions": sorted(set(manifests["revision"].dropna())),
        "devices": sorted(set(manifests["device"].dropna())),
        "versions": runs.versions(),
    }  # fmt: skip


def facts(experiment: Any, made: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What a summary says of an experiment: what was run, how long it took, what came out."""
    main = claims.primary(experiment.endpoints)
    compared = made["comparisons"]
    says = [claims.verdict_sentence(row) for _, row in compared.iterrows()]
    return {
        "experiment": experiment.name, "title": experiment.title, "scale": experiment.scale,
        "task": experiment.task,
        "arms": experiment.arms, "chains": len(experiment.seeds), "primary": main,
        **run_facts(made["runs"]),
        "gates_passed": bool(made["gates"]["passes"].all()) if "gates" in made else None,
        "verdicts": dict(zip(compared["endpoint"] + ": " + compared["arm"] + " against "
                             + compared["reference"], says, strict=True)),
    }  # fmt: skip


# Several experiments


def table2(experiments: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """Table 2, a row a task: the paper's scores of PPO and MA-PPO (configs/paper.yaml), ours at
    the end of training, and our difference with its interval. experiments: tables by task."""
    paper = read_yaml(CONFIGS / "paper.yaml")["table2"]
    rows = []
    for task, made in experiments.items():
        compared = made["comparisons"]
        found = compared[
            (compared["endpoint"] == f"final {SCORES['rm_score']}")
            & (compared["reference"] == "token") & compared["arm"].str.startswith("macro")
        ]  # fmt: skip
        cells = arm_table(made["arms"]).set_index("endpoint")
        for _, row in found.iterrows():
            theirs = [
                f"{model}: {number(x['ppo'])} → {number(x['ma_ppo'])}"
                for model, x in paper.get(task, {}).items()
            ]
            ours = cells.loc[row["endpoint"]]
            rows.append({
                "task": task, "paper, PPO → MA-PPO": ", ".join(theirs),
                "PPO": ours[row["reference_label"]],
                "MA-PPO": f"{ours[row['label']]} ({row['label'].removeprefix('MA-PPO, ')})",
                "difference": f"{number(row['difference'])} [{number(row['low'])}, "
                f"{number(row['high'])}]", "chains": row["chains"],
            })  # fmt: skip
    return pd.DataFrame(rows)


if __name__ == "__main__":
    from marlhf.page import main  # the report of a scale; it stands on this module

    main()
