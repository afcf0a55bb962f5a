"""How the termination conditions split the same responses (Fig. 5): the responses of a chain's SFT
model to the held-out prompts, which is what every arm begins with, and their macro actions under
every arm; then pictures of that, from the tables alone.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from marlhf import figures
from marlhf.drawings import TINTS
from marlhf.figures import FONT, Picture

if TYPE_CHECKING:
    from marlhf.experiment import Experiment

BAR = "│"  # where a macro action ends
COLUMNS = 78  # characters of a line of text in the picture
LONGEST = 15  # tokens; longer macro actions are counted together
END = "⟨end⟩"


def split_responses(experiment: Experiment) -> pd.DataFrame:
    """A row for each token of the SFT model's responses to the first chain's held-out prompts and
    each arm: prompt_id, arm, label, token (its number), piece (its text, `quoted`), segment (the
    macro action it belongs to). Perplexity is under that SFT model, which is the reference, as in
    training.

    The SFT and reward models of the chain must have been run.
    """
    from marlhf.ppo import PPOTrainer
    from marlhf.stages import load_data, stage_spec

    seed = experiment.seeds[0]
    config = copy.deepcopy(next(c for (_, s), c in experiment.configs.items() if s == seed))
    config.ppo.macro.termination = "perplexity"  # so that the reference is read at temperature 1
    prompts = config.eval.prompts
    config.ppo.batch, config.ppo.minibatches, config.ppo.micro_batch = prompts, 1, None
    parents = {k: p.run.path / "model" for k, p in stage_spec("ppo", config).parents.items()}
    data = load_data(config)
    trainer = PPOTrainer(config, data, parents["sft"], parents.get("rm"))
    trainer.prompts = trainer.evaluator.prompts
    rollout = trainer.score(trainer.rollout(0))
    tokenizer, rows = trainer.tokenizer, []
    ids = [example.id for example in rollout.examples]
    order = {example.id: number for number, example in enumerate(data.valid[:prompts])}
    for (arm, chain), settings in experiment.configs.items():
        if chain != seed:
            continue
        segments = _segments(settings, tokenizer, rollout).cpu()
        for row in sorted(range(len(ids)), key=lambda row: order[ids[row]]):
            keep = rollout.mask[row].cpu()
            tokens = rollout.tokens[row].cpu()[keep].tolist()
            pairs = zip(tokens, segments[row][keep].tolist(), strict=True)
            head = {"prompt_id": ids[row], "arm": arm, "label": experiment.arms[arm]}
            for number, (token, segment) in enumerate(pairs):
                ends = token == tokenizer.eos_token_id
                piece = quoted(END if ends else tokenizer.decode([token]))
                rows.append({**head, "token": number, "piece": piece, "segment": segment})
    return pd.DataFrame(rows)


def quoted(piece: str) -> str:
    """A token's text in quotation marks, as JSON: "nan" and spaces outlive a CSV file."""
    return json.dumps(piece, ensure_ascii=False)


def _segments(config, tokenizer, rollout) -> torch.Tensor:
    """The rollout's macro actions under a config's termination, as at update 0 of training."""
    from marlhf.ppo import segment_generators
    from marlhf.variants import segmenter_of

    segmenter, generators = (
        segmenter_of(config, tokenizer),
        segment_generators(config.seed, rollout),
    )
    return segmenter(
        rollout.tokens, rollout.mask, ref_logprobs=rollout.ref_logprobs_1, generator=generators
    )


def first(splits: pd.DataFrame, prompts: int = 2) -> pd.DataFrame:
    """The rows of the first prompts, not chosen."""
    return splits[splits["prompt_id"].isin(list(dict.fromkeys(splits["prompt_id"]))[:prompts])]


def lengths(splits: pd.DataFrame) -> pd.DataFrame:
    """How long macro actions are: arm, label, length in tokens (LONGEST stands for that and more),
    share of the macro actions, and mean, the tokens of the arm's average macro action."""
    keys = ["arm", "label", "prompt_id", "segment"]
    sizes = splits.groupby(keys, sort=False).size().rename("length").reset_index()
    rows = []
    for (arm, label), group in sizes.groupby(["arm", "label"], sort=False):
        shares = group["length"].clip(upper=LONGEST).value_counts(normalize=True)
        for length in range(1, LONGEST + 1):
            head = {"arm": arm, "label": label, "length": length}
            share, mean = float(shares.get(length, 0.0)), float(group["length"].mean())
            rows.append({**head, "share": share, "mean": mean})
    return pd.DataFrame(rows)


def parser_counts(experiment: Experiment, arm: str = "parsing") -> pd.DataFrame:
    """A row for each chain and update of the arm that parses: arm, label, chain, update, sentences,
    fallbacks, and fallback_share, the share of its sentences that have no parse."""
    parts = []
    for (name, seed), spec in experiment.arm_specs().items():
        if name == arm:
            table = spec.run.frame("parses").drop(columns="sec_advantages")
            head = {"arm": arm, "label": experiment.arms[arm], "chain": seed}
            parts.append(table.assign(**head))
    table = pd.concat(parts, ignore_index=True)
    table["fallback_share"] = table["fallbacks"] / table["sentences"].clip(lower=1)
    columns = ["arm", "label", "chain", "update", "sentences", "fallbacks", "fallback_share"]
    return table[columns]


def parser_sentence(counts: pd.DataFrame, metrics: pd.DataFrame) -> str:
    """How many sentences fell back to tokens in all of training, over chains; and what advantages
    cost where they are parsed. `metrics` is the experiment's table, with its seconds."""
    chains = counts.groupby("chain")[["sentences", "fallbacks"]].sum()
    share = 100 * chains["fallbacks"] / chains["sentences"].clip(lower=1)
    parts = [name for name in metrics if name.startswith("sec_") and name != "sec_eval"]
    rows = metrics[metrics["arm"] == counts["arm"].iloc[0]]
    cost = 100 * rows["sec_advantages"].sum() / rows[parts].sum().sum()
    return (
        f"{chains['sentences'].sum():,} sentences in training, {chains['fallbacks'].sum():,} "
        f"without a parse: {share.mean():.2f}% (single chains {share.min():.2f} to "
        f"{share.max():.2f}%). "
        f"Macro actions and advantages, parsing included, are {cost:.1f}% of an update's time."
    )


# ---- pictures ----


def texts(splits: pd.DataFrame) -> Picture:
    """Each response under every condition: macro actions tinted in turn, a bar where one ends."""
    known, blocks = figures.arms(splits), []
    for _, response in splits.groupby("prompt_id", sort=False):
        for arm, label in known.items():
            blocks.append((label, _lines(response[response["arm"] == arm])))
    rows = sum(len(lines) + 1.6 for _, lines in blocks) + 0.8 * (len(blocks) // len(known))
    figure = Figure(figsize=(9.0, 0.23 * rows + 0.2))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    y = 0.0
    for number, (label, lines) in enumerate(blocks):
        y += 0.8 * (number > 0 and number % len(known) == 0)
        count = lines[-1][-1][2] + 1
        axis.text(0, y, f"{label}: {count} macro actions", fontsize=FONT - 1, weight="bold")
        for line in lines:
            y += 1
            for start, piece, segment, ends in line:
                box = (start, y - 0.78), len(piece), 1.0
                axis.add_patch(Rectangle(*box, facecolor=TINTS[segment % len(TINTS)], linewidth=0))
                for offset, character in enumerate(piece):
                    axis.text(start + offset + 0.5, y, character, ha="center", family="monospace")
                if ends:
                    x = start + len(piece)
                    axis.plot([x, x], [y - 0.78, y + 0.22], color="#333333", linewidth=1.2)
        y += 1.6
    axis.set(xlim=(-0.3, COLUMNS + 0.3), ylim=(y - 0.8, -1.1))
    axis.axis("off")
    for text in axis.texts:
        if len(text.get_text()) == 1:
            text.set_fontsize(FONT - 2)
    said = ". ".join(
        f"{label}: " + "".join(p + BAR * e for line in lines for _, p, _, e in line).strip()
        for label, lines in blocks
    )
    return Picture(figure, f"Macro actions of the same responses, a bar where one ends. {said}.")


def _lines(tokens: pd.DataFrame) -> list[list[tuple[int, str, int, bool]]]:
    """(column, text, macro action, whether it ends there) of each token, in lines of COLUMNS."""
    lines, column = [[]], 0
    segments = [*tokens["segment"], -1]
    for number, (piece, segment) in enumerate(zip(tokens["piece"], tokens["segment"], strict=True)):
        piece = json.loads(piece).replace("\n", "⏎")
        if column + len(piece) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((column, piece, segment, segments[number + 1] != segment))
        column += len(piece)
    return lines


def length_bars(lengths: pd.DataFrame) -> Picture:
    """Shares of macro actions by their length, a panel an arm (token PPO, all of length 1, left
    out)."""
    known = {arm: label for arm, label in figures.arms(lengths).items() if arm != "token"}
    figure, axes = figures._panels(-(-len(known) // 2), 2, 2.6)
    said = []
    for axis, (arm, label) in zip(axes.flat, known.items(), strict=False):
        rows = lengths[lengths["arm"] == arm]
        colour = figures.style(arm, list(known))[0]
        axis.bar(rows["length"], 100 * rows["share"], color=colour, width=0.8)
        mean = rows["mean"].iloc[0]
        axis.axvline(mean, color="#333333", linestyle=":", linewidth=1.5)
        axis.set_title(f"{label} (mean {mean:.1f})", fontsize=FONT, loc="left")
        axis.set_xticks([1, 5, 10, LONGEST], ["1", "5", "10", f"{LONGEST}+"])
        most = int(rows["length"].iloc[np.argmax(rows["share"])])
        said.append(f"{label}: mean {mean:.1f} tokens, most often {most}")
    for axis in axes.flat[len(known) :]:
        axis.remove()
    figure.supxlabel("tokens in a macro action", fontsize=FONT)
    figure.supylabel("share of macro actions (%)", fontsize=FONT)
    return Picture(figure, f"Lengths of macro actions. {'; '.join(said)}.")


def fallbacks(counts: pd.DataFrame) -> Picture:
    """Share of the sentences without a parse over updates, mean and interval over chains."""
    figure, axes = figures._panels(1, 1, 3.2)
    shares = counts.assign(percent=100 * counts["fallback_share"])
    figures._lines(axes[0, 0], shares, "update", "percent")
    axes[0, 0].set_ylabel("sentences\nwithout a parse (%)", fontsize=FONT)
    axes[0, 0].set_ylim(bottom=0)
    means = shares.groupby("update")["percent"].mean()
    return Picture(
        figure,
        f"Sentences that the parser has no tree for, over PPO updates: {means.iloc[0]:.2f}% at the "
        f"first, at most {means.max():.2f}% (update {means.idxmax()}), {means.iloc[-1]:.2f}% at "
        "the last.",
    )
