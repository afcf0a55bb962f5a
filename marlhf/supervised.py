"""Stages 1 and 2 on transformers.Trainer: supervised fine-tuning and the reward model (Sec. 4.1).

The loop is `marlhf.trainer`; here are the two objectives, the rows they learn from, and what is
measured before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from marlhf.config import Config
from marlhf.evaluate import Prompts, response_texts
from marlhf.models import (
    backbone_of,
    load_policy,
    load_scalar,
    response_hidden,
    save_model,
    sequence_scores,
    token_logprobs,
)
from marlhf.placement import place, running, sharding, whole_state
from marlhf.rewards import RewardModel, TrueScore
from marlhf.roles import save_adapter
from marlhf.runs import Run
from marlhf.sampling import Sampler, keyed_uniforms
from marlhf.stats import proportion_interval
from marlhf.tasks import get_task
from marlhf.tasks.base import TaskData
from marlhf.text import (
    Example,
    Pair,
    encode_prompt,
    encode_response,
    load_tokenizer,
    right_pad,
    train_tokenizer,
)
from marlhf.trainer import Objective, StageTrainer

IGNORED = -100  # a label that counts for nothing, as everywhere in transformers


# Rows and batches


@dataclass(frozen=True)
class Row:
    """What a step learns from, encoded: `first` and `second` are prompt and response of a
    demonstration, or the preferred and the other text of a comparison, prompts included."""

    id: str
    first: list[int]
    second: list[int]
    length: int  # of the longest sequence


def demonstration(example: Example, tokenizer, config: Config) -> Row:
    """Prompt, and response with its end token if it fits."""
    prompt = encode_prompt(example.prompt, tokenizer, config.data.prompt_tokens)
    response = encode_response(example.response, tokenizer, config.data.response_tokens)
    return Row(example.id, prompt, response, len(prompt) + len(response))


def comparison(pair: Pair, scorer: RewardModel) -> Row:
    """Both texts as the reward model reads them: an end token exactly where one was finished."""
    texts = (pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)
    chosen, rejected = scorer.encode(pair.prompt, *texts)
    return Row(pair.id, chosen, rejected, max(len(chosen), len(rejected)))


def collate_demonstrations(rows: Sequence[Row], pad: int) -> dict:
    """-> ids [B, S] right padded, starts [B], labels [B, T]: the response, then IGNORED."""
    ids, _ = right_pad([row.first + row.second for row in rows], pad)
    labels, _ = right_pad([row.second for row in rows], IGNORED)
    starts = torch.tensor([len(row.first) for row in rows])
    return {"ids": ids, "starts": starts, "labels": labels, "rows": [row.id for row in rows]}


def collate_comparisons(rows: Sequence[Row], pad: int) -> dict:
    """-> ids [2B, S] right padded, the preferred texts first, lengths [2B], labels [B]: all 0."""
    ids, mask = right_pad([row.first for row in rows] + [row.second for row in rows], pad)
    labels = torch.zeros(len(rows), dtype=torch.long)
    return {"ids": ids, "lengths": mask.sum(1), "labels": labels, "rows": [row.id for row in rows]}


# The two objectives


class Demonstrations(Objective):
    """-log pi(y_t | x, y_<t) of every response token [N], end token included; none of the prompt's.

    The mean is over the tokens of the batch: transformers' own causal loss with the prompt's
    labels ignored.
    """

    def losses(self, ids, starts, labels) -> torch.Tensor:
        mask = labels != IGNORED
        hidden = response_hidden(backbone_of(self.model), ids, starts, mask)
        return -token_logprobs(self.model, hidden, labels[mask])


class Comparisons(Objective):
    """Bradley-Terry: -log sigmoid(r(x, y_chosen) - r(x, y_rejected)) [B]; r at the last token."""

    def losses(self, ids, lengths, labels) -> torch.Tensor:
        chosen, rejected = sequence_scores(self.model, ids, lengths).chunk(2)
        return -F.logsigmoid(chosen - rejected)


# What comes out


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """All rows, those alike in length together."""
    rows = sorted(rows, key=lambda row: row.length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def mean_loss(objective: Objective, rows: Sequence[Row], collate, batch: int) -> float | None:
    """Mean of the objective's terms over all rows: per response token, or per comparison."""
    total, count = 0.0, 0
    training, device = objective.training, objective.model.device
    objective.eval()
    with running(objective.model):
        for part in batches(rows, batch):
            inputs = collate(part)
            del inputs["rows"]
            losses = objective.losses(**{key: value.to(device) for key, value in inputs.items()})
            total, count = total + float(losses.double().sum()), count + len(losses)
    objective.train(training)
    return total / count if count else None


def sample(policy, tokenizer, examples: Sequence[Example], config: Config, stream: str):
    """One response a prompt, as PPO samples them -> texts, columns ("finished", "length").

    The random numbers are keyed by data.seed, stream and prompt: the same in every chain.
    """
    data, sampling, device = config.data, config.ppo.sampling, policy.device
    prompts = Prompts(examples, tokenizer, data.prompt_tokens)
    sampler = Sampler(
        policy, tokenizer, sampling.temperature, sampling.top_k,
        max(1, min(config.eval.batch, len(prompts))), sampling.compile,
    )  # fmt: skip
    texts, columns = [], {"finished": [], "length": []}
    for start in range(0, len(prompts), config.eval.batch):
        index = range(start, min(start + config.eval.batch, len(prompts)))
        part, ids, mask = prompts.batch(index)
        names = [example.id for example in part]
        uniforms = keyed_uniforms(data.seed, stream, 0, names, data.response_tokens)
        found = sampler(ids.to(device), mask.to(device), uniforms)
        texts += response_texts(found, tokenizer)
        columns["finished"] += found.finished.tolist()
        columns["length"] += found.mask.sum(1).tolist()
    return texts, columns


def _log_samples(run: Run, examples, texts, columns, **scores) -> None:
    """A row a prompt; the columns are those of a PPO run's samples."""
    for i, example in enumerate(examples):
        row = {"prompt_id": example.id, "prompt": example.prompt.text, "response": texts[i]}
        row |= {name: None if s is None else float(s[i]) for name, s in scores.items()}
        row |= {"length": int(columns["length"][i]), "finished": bool(columns["finished"][i])}
        run.log("samples", row)


def _mean(values) -> float | None:
    return None if values is None else float(np.mean(np.asarray(values, float)))


def _truth(config: Config) -> TrueScore | None:
    task = get_task(config.data.task)
    return TrueScore(task) if task.has_truth(config.data) else None


def train_sft(config: Config, data: TaskData, run: Run) -> None:
    """Stage 1: the policy learns the demonstrations; the finished run holds it under model/.

    A tiny model gets a tokenizer trained on the demonstrations and their prompts; any other comes
    with its own. Summary: loss per held-out response token before and after, and for samples of
    the held-out prompts (table "samples") the true score beside the best possible, the share
    finished, and the length. Raises DataError without demonstrations, TrainingError at a loss or
    gradient that is not finite.
    """
    demonstrations, model = data.require("sft"), config.model
    if model.name == "tiny":
        texts = (text for e in demonstrations for text in (e.prompt.text, e.response))
        tokenizer = train_tokenizer(texts, model.tiny.vocab)
    else:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    held_out = data.valid[: config.eval.prompts]

    def encode(examples):
        return [demonstration(e, tokenizer, config) for e in examples if e.response]

    def collate(rows):
        return collate_demonstrations(rows, tokenizer.pad_token_id)

    objective = Demonstrations(load_policy(model, tokenizer, seed=config.seed))
    trainer = StageTrainer("sft", objective, encode(demonstrations), collate, config, run)
    micro, known = config.sft.micro_batch or config.sft.batch, encode(held_out)
    # weights to be shared out are on the host until training begins
    before = None if sharding() else mean_loss(objective, known, collate, micro)
    trainer.go()
    policy = objective.model
    after = mean_loss(objective, known, collate, micro)
    texts, columns = sample(policy, tokenizer, held_out, config, "evaluation")
    truth = _truth(config)
    true = truth(held_out, texts, columns) if truth else None
    best = [truth.task.best_score(e) for e in held_out] if truth else None
    _log_samples(run, held_out, texts, columns, true_score=true)
    state = whole_state(policy)
    run.save_model(lambda folder: save_model(policy, tokenizer, folder, state))
    run.finish(
        {
            "rows": len(demonstrations),
            "steps": trainer.total,
            "dropped": data.dropped,
            "loss_before": before,
            "loss_after": after,
            "true_score": _mean(true),
            "best_score": _mean(best),
            "share_finished": _mean(columns["finished"]),
            "response_tokens": _mean(columns["length"]),
        }
    )


def train_rm(config: Config, data: TaskData, run: Run, sft: Path) -> None:
    """Stage 2: the reward model learns the comparisons, from the finished SFT run `sft`.

    Its score is then set to mean 0 and spread 1 on SFT samples of the first rm.norm_samples
    prompts of the PPO part, the same in every chain; model/ holds it with that scale. Summary:
    pair accuracy on held-out prompts before and after with its 95% Wilson interval, the scale, and
    Pearson's correlation of score and truth on SFT samples of the held-out prompts (table
    "samples"; None where there is no truth). Raises as `train_sft`.
    """
    pairs, source = data.require("rm"), sft / "model"
    tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    objective = Comparisons(load_scalar(config.model, tokenizer, source, seed=config.seed))
    limits = config.data.prompt_tokens, config.data.response_tokens
    scorer = RewardModel(objective.model, tokenizer, *limits)

    def encode(pairs):
        return [comparison(pair, scorer) for pair in pairs]

    def collate(rows):
        return collate_comparisons(rows, tokenizer.pad_token_id)

    trainer = StageTrainer("rm", objective, encode(pairs), collate, config, run)
    held_out = encode(data.valid_pairs)
    before = None if sharding() else _accuracy(scorer, held_out)
    trainer.go()
    after = _accuracy(scorer, held_out)

    policy = place(load_policy(config.model, tokenizer, source), trainer.accelerator)
    fixed = (data.ppo or data.valid)[: config.rm.norm_samples]
    scorer.standardise(fixed, *sample(policy, tokenizer, fixed, config, "standardise"))
    prompts, truth = data.valid[: config.eval.prompts], _truth(config)
    texts, columns = sample(policy, tokenizer, prompts, config, "evaluation")
    scores = scorer(prompts, texts, columns)
    true = truth(prompts, texts, columns) if truth else None
    _log_samples(run, prompts, texts, columns, rm_score=scores, true_score=true)

    state = whole_state(scorer.model)

    def write(folder: Path) -> None:
        scorer.save(folder, state)
        save_adapter(objective.model, folder, source)

    run.save_model(write)
    run.finish(
        {
            "pairs": len(pairs),
            "steps": trainer.total,
            "dropped": data.dropped,
            "valid_pairs": len(held_out),
            "accuracy_before": before and before.mean,
            "accuracy_after": after and after.mean,
            "accuracy_low": after and after.low,
            "accuracy_high": after and after.high,
            "score_mean": scorer.mean,
            "score_std": scorer.std,
            "norm_samples": len(fixed),
            "truth_correlation": _correlation(scores, true),
        }
    )


def _accuracy(scorer: RewardModel, rows: Sequence[Row]):
    """Share of comparisons whose preferred text scores higher; None without any."""
    if not rows:
        return None
    scores = scorer.score_ids([row.first for row in rows] + [row.second for row in rows])
    return proportion_interval(int((scores[: len(rows)] > scores[len(rows) :]).sum()), len(rows))


def _correlation(scores: np.ndarray, true: np.ndarray | None) -> float | None:
    """Pearson's r; None without a truth, or where either does not vary."""
    if true is None or len(true) < 2 or np.std(true) == 0 or np.std(scores) == 0:
        return None
    return float(np.corrcoef(scores, true)[0, 1])
