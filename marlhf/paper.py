"""The paper's settings and scores (configs/paper.yaml) beside ours: Table 5, and Table 2 with what
else a response is like."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from marlhf import figures, stats
from marlhf.config import CONFIGS, KEYS, Config, get, load_config, presets, read_yaml
from marlhf.report import mean_and_half

TEXT_TASKS, CODE_TASKS = ("tldr", "hh", "webgpt"), ("apps",)
LENGTHS = ("sft.steps", "rm.steps", "ppo.updates")  # of ours; the paper counts epochs
QUALITY = {  # of the responses at the end of training
    "rm_score": "RM score", "true_score": "true score", "kl": "KL (nats)",
    "length": "tokens", "finished": "finished", "distinct2": "distinct-2",
    "ref_perplexity": "perplexity",
}  # fmt: skip


# Table 5


def table5_models() -> list[tuple[str, str]]:
    """(task, model) of every column of Table 5, a text model once a task; the preset is called
    task-model."""
    models = read_yaml(CONFIGS / "paper.yaml")["table5"]["models"]
    return [
        (task, model)
        for model, column in models.items()
        for task in (TEXT_TASKS if column["for"] == "text" else CODE_TASKS)
    ]


def table5_settings(task: str, model: str) -> dict[str, Any]:
    """{setting: the paper's number} for a task and a model of Table 5; ValueError if it has not
    both."""
    if (task, model) not in table5_models():
        raise ValueError(f"Table 5 has no {model} on {task}")
    table = read_yaml(CONFIGS / "paper.yaml")["table5"]
    column = dict(table["models"][model])
    own = column.pop("tasks", {}).get(task, {})
    return table["all"] | table[column.pop("for")] | column | own


def table5() -> pd.DataFrame:
    """Table 5: a row a setting, a column a model; where tasks differ, each number has its task."""
    models: dict[str, list[str]] = {}
    for task, model in table5_models():
        models.setdefault(model, []).append(task)
    found = {pair: table5_settings(*pair) for pair in table5_models()}
    names = [name for name in KEYS if any(name in settings for settings in found.values())]
    rows = []
    for name in names:
        row = {"setting": name}
        for model, tasks in models.items():
            values = {task: shown(found[task, model].get(name)) for task in tasks}
            alike = len(set(values.values())) == 1
            row[model] = values[tasks[0]] if alike else ", ".join(
                f"{task} {value}" for task, value in values.items()
            )  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def deviations() -> pd.DataFrame:
    """Where a preset of the paper's models says something else than Table 5: preset, setting,
    paper, ours. Empty if none does."""
    rows = []
    for task, model in table5_models():
        config = load_config(f"{task}-{model}")
        for name, value in table5_settings(task, model).items():
            if get(config, name) != value:
                ours = shown(get(config, name))
                rows.append((config.name, name, shown(value), ours))
    return pd.DataFrame(rows, columns=["preset", "setting", "paper", "ours"])


def beside(model: str, presets: Mapping[str, str]) -> pd.DataFrame:
    """Our presets ({task: preset}) beside a model of Table 5, a row a setting: setting, paper, a
    column a preset, and the deviation: ×f for numbers, "differs" for words, empty for none."""
    configs = {task: load_config(preset) for task, preset in presets.items()}
    theirs = {task: table5_settings(task, model) for task in presets}
    names = [n for n in KEYS if n in LENGTHS or any(n in each for each in theirs.values())]
    rows = []
    for name in names:
        paper = {task: settings.get(name) for task, settings in theirs.items()}
        ours = {task: get(config, name) for task, config in configs.items()}
        if not any(_applies(config, name) for config in configs.values()):
            continue
        gaps = {task: deviation(paper[task], ours[task]) for task in presets}
        row = {"setting": name, "paper": _by_task(paper, shown)}
        row |= {presets[task]: shown(value) for task, value in ours.items()}
        rows.append(row | {"deviation": _by_task(gaps, str)})
    return pd.DataFrame(rows)


def presets_at(scale: str, tasks: Sequence[str]) -> dict[str, str]:
    """{task: preset} at a scale, of the tasks that have one."""
    known = presets()
    return {task: f"{task}-{scale}" for task in tasks if f"{task}-{scale}" in known}


def _applies(config: Config, name: str) -> bool:
    """A task that scores itself has no reward model."""
    return not name.startswith("rm.") or config.ppo.reward == "rm"


def _by_task(values: Mapping[str, Any], text: Any) -> str:
    texts = {task: text(value) for task, value in values.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{task} {value or 'the same'}" for task, value in texts.items())


def deviation(paper: Any, ours: Any) -> str:
    """What ours is of the paper's: ×0.125, "differs", or nothing."""
    if paper is None:
        return "not in Table 5"
    if paper == ours:
        return ""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (paper, ours))
    if not (numbers and paper):
        return "differs"
    times = ours / paper
    return f"×{times:.0f}" if times >= 100 else f"×{times:.3g}"


def shown(value: Any) -> str:
    """A setting as tables show it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "/".join(f"{100 * x:g}" for x in value) + "%"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Table 2


def gains(experiments: Mapping[str, Mapping[str, pd.DataFrame]], primary: Mapping[str, str]):
    """What macro actions gain over token PPO and over its matched lambda: a DataFrame with a row a
    task, comparison and endpoint (the primary one; the final score of what PPO maximised): task,
    label, reference_label, reference, endpoint, difference, low, high, chains; `share`, the
    difference as a share of the reference's score (of |score|, as the paper counts), with
    share_low, share_high.

    experiments: tables by task; primary: endpoints' titles by task. Single chains have infinite
    intervals.
    """
    rows = []
    for task, made in experiments.items():
        compared, values = made["comparisons"], made["endpoints"]
        score = "true" if "true" in primary[task] else "RM"
        kept = compared["endpoint"].isin([primary[task], f"final {score} score"])
        kept &= compared["arm"].str.startswith("macro")
        for _, row in compared[kept].iterrows():
            one = values[values["endpoint"] == row["endpoint"]].set_index(["arm", "chain"])["value"]
            a, b = one[row["arm"]].sort_index(), one[row["reference"]].sort_index()
            share = stats.mean_interval((a - b) / b.abs())
            names = ("label", "reference_label", "reference", "endpoint", "difference", "low",
                     "high", "chains")  # fmt: skip
            rows.append({"task": task, **{name: row[name] for name in names}, "share": share.mean,
                         "share_low": share.low, "share_high": share.high})  # fmt: skip
    return pd.DataFrame(rows)


def gains_wide(table: pd.DataFrame) -> pd.DataFrame:
    """`gains` for reading, with the paper's relative gains (Table 2) beside the final score's."""
    paper = read_yaml(CONFIGS / "paper.yaml")["table2"]
    rows = []
    for _, row in table.iterrows():
        final = row["endpoint"].startswith("final") and row["reference"] == "token"
        theirs = paper.get(row["task"], {}).items() if final else ()
        percent = (100 * row[name] for name in ("share", "share_low", "share_high"))
        rows.append({
            "task": row["task"], "endpoint": row["endpoint"],
            "arms": f"{row['label']} − {row['reference_label']}",
            "difference": _interval(row["difference"], row["low"], row["high"]),
            "of the reference, %": _interval(*percent),
            "paper, %": ", ".join(
                f"{model} {100 * (x['ma_ppo'] - x['ppo']) / abs(x['ppo']):+.0f}"
                for model, x in theirs),
            "chains": row["chains"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def _interval(mean: float, low: float, high: float) -> str:
    text = f"{mean:+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if math.isfinite(low) else "")
    return text.replace("-", "−")


def quality(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What responses are like at the end of training, and the SFT model's: arm, label, chain and
    the measures of QUALITY that there are. frames: an experiment's. Repeated samples have the
    perplexity under the SFT model; an experiment without them has its last evaluations here."""
    if "quality" in frames:
        table = frames["quality"]
    else:
        evals = frames["evals"]
        first = evals[(evals["update"] == 0) & (evals["arm"] == evals["arm"].iloc[0])]
        last = evals[evals["update"] == evals["update"].max()]
        table = pd.concat([first.assign(arm="sft", label="SFT"), last])
    kept = [name for name in QUALITY if name in table and table[name].notna().any()]
    return table[["arm", "label", "chain", *kept]].reset_index(drop=True)


def quality_wide(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`quality` by task for reading: a row a task and arm, mean ± half of the 95% interval."""
    rows = []
    for task, table in tables.items():
        for (_, label), group in table.groupby(["arm", "label"], sort=False):
            row = {"task": task, "policy": label}
            for name in [name for name in QUALITY if name in table]:
                found = stats.mean_interval(group[name])
                row[QUALITY[name]] = mean_and_half(found.mean, found.low, found.high)
            rows.append(row)
    order = ["task", "policy", *QUALITY.values()]
    frame = pd.DataFrame(rows).fillna("")
    return frame[[name for name in order if name in frame]]


def gains_picture(table: pd.DataFrame) -> figures.Picture:
    """The primary gain of every task with its 95% interval: over token PPO, and over token PPO with
    the matched lambda. table: `gains`, the rows of the primary endpoints."""
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    scores = list(dict.fromkeys(table["endpoint"]))
    axes = figure.subplots(1, len(scores), squeeze=False)[0]
    names = {"token": "over token PPO, λ = 0.95", "token_matched": "over token PPO, λ^(1/n)"}
    words = []
    for axis, endpoint in zip(axes, scores, strict=True):
        rows = table[table["endpoint"] == endpoint]
        tasks = list(dict.fromkeys(rows["task"]))
        for number, (reference, label) in enumerate(names.items()):
            part = rows[rows["reference"] == reference].set_index("task").loc[tasks]
            colour, _, marker = figures.style(reference, list(names))
            at = [tasks.index(task) + 0.2 * (number - 0.5) for task in part.index]
            finite = part["low"].map(math.isfinite)
            half = ((part["high"] - part["low"]) / 2).where(finite, 0)
            axis.errorbar(at, part["difference"], half, color=colour, marker=marker, markersize=8,
                          linestyle="none", linewidth=2.2, label=label)  # fmt: skip
            words += [
                f"{task} {label}: {_interval(row['difference'], row['low'], row['high'])}"
                for task, row in part.iterrows()
            ]
        axis.axhline(0, color="#555555", linewidth=1.2)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=figures.FONT)
        axis.set_xlim(-0.6, len(tasks) - 0.4)
        axis.set_ylabel(f"gain in {endpoint}".replace(" over", "\nover"), fontsize=figures.FONT)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        axis.tick_params(labelsize=figures.FONT - 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=figures.FONT - 1, frameon=False)  # fmt: skip
    said = "What macro actions gain by task, mean and 95% interval over chains: "
    return figures.Picture(figure, said + "; ".join(words) + ".")
