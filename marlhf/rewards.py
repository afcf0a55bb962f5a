"""Rewards: functions of text and of columns, whatever computes them.

    reward(examples, responses, columns) -> scores, float32 [B]

`examples` are the prompts with their rows, `responses` plain text, `columns` what else is known of
each response: "finished" (it ends by an end token) and "length" (in the policy's tokens). Anything
with that call can stand in for those here: a program that runs tests, a judge, a rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from marlhf.config import Config, LoraConfig
from marlhf.models import load_scalar, save_model, sequence_scores
from marlhf.placement import running
from marlhf.text import Example, Prompt, encode_prompt, encode_response, load_tokenizer, right_pad

if TYPE_CHECKING:
    from marlhf.tasks.base import Task

SCALE = "reward.json"  # beside the weights: mean and std that standardise the score


class RewardModel:
    """(score - mean) / std of a sequence classifier with its own tokenizer and token budgets.

    The score is read at the last token of prompt and response: the end token, which is appended
    exactly to finished responses. A prompt that is too long is cut as the task says.
    """

    def __init__(
        self,
        model,
        tokenizer,
        prompt_tokens: int,
        response_tokens: int,
        mean: float = 0.0,
        std: float = 1.0,
        batch: int = 64,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.prompt_tokens, self.response_tokens = prompt_tokens, response_tokens
        self.mean, self.std, self.batch = mean, std, batch

    @classmethod
    def load(cls, source: str | Path, config: Config, device=None) -> RewardModel:
        """From a folder that `save` wrote, any other folder, or a hub name.

        Without the file that `save` adds, mean is 0 and std 1. Raises ValueError for a folder
        without a model, or a tokenizer whose ids exceed the embedding.
        """
        source, model = str(source), config.model
        revision = model.revision if source == model.name else None
        tokenizer = load_tokenizer(source, revision, model.trust_remote_code)
        # it is only read: no adapters, nothing recomputed
        model = replace(model, lora=LoraConfig(), gradient_checkpointing=False)
        scorer = load_scalar(model, tokenizer, source).to(device).requires_grad_(False)
        data = config.data
        limits = data.prompt_tokens, data.response_tokens
        return cls(scorer, tokenizer, *limits, **cls.scale(source))

    @classmethod
    def around(cls, scorer, source: str | Path, config: Config) -> RewardModel:
        """A scorer that is there already, with the tokenizer and the scale of `source`."""
        tokenizer = load_tokenizer(str(source), trust_remote_code=config.model.trust_remote_code)
        limits = config.data.prompt_tokens, config.data.response_tokens
        return cls(scorer, tokenizer, *limits, **cls.scale(source))

    @staticmethod
    def scale(source: str | Path) -> dict[str, float]:
        """mean and std that `save` wrote; empty in any other folder."""
        path = Path(source) / SCALE
        return json.loads(path.read_text()) if path.is_file() else {}

    def save(self, folder: str | Path, state: dict | None = None) -> None:
        """A folder that transformers loads alone, with the scale in a file of its own; `state` as
        in `save_model`."""
        save_model(self.model, self.tokenizer, folder, state)
        scale = {"mean": self.mean, "std": self.std}
        (Path(folder) / SCALE).write_text(json.dumps(scale) + "\n")

    def encode(self, prompt: Prompt, *responses: tuple[str, bool]) -> list[list[int]]:
        """Token ids of the prompt with each response (text, finished), encoded apart and joined."""
        start = encode_prompt(prompt, self.tokenizer, self.prompt_tokens)
        budget = self.response_tokens
        return [
            start + encode_response(text, self.tokenizer, budget, end=bool(finished))
            for text, finished in responses
        ]

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores ``[B]`` of encoded rows, not standardised; rows alike in length go together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = np.empty(len(rows), np.float32)
        training = self.model.training
        self.model.eval()
        with running(self.model):
            for start in range(0, len(order), self.batch):
                index = order[start : start + self.batch]
                ids, mask = right_pad([rows[i] for i in index], self.tokenizer.pad_token_id)
                ids, lengths = ids.to(self.model.device), mask.sum(1).to(self.model.device)
                scores[index] = sequence_scores(self.model, ids, lengths).cpu().numpy()
        self.model.train(training)
        return scores

    def __call__(
        self, examples: Sequence[Example], responses: Sequence[str], columns: Mapping
    ) -> np.ndarray:
        rows = [
            self.encode(example.prompt, response)[0]
            for example, *response in zip(examples, responses, columns["finished"], strict=True)
        ]
        return (self.score_ids(rows) - np.float32(self.mean)) / np.float32(self.std)

    def standardise(
        self, examples: Sequence[Example], responses: Sequence[str], columns: Mapping
    ) -> None:
        """Sets mean and std so that these responses score 0 on average, with spread 1.

        Raises ValueError where their scores are not finite, or all the same.
        """
        self.mean, self.std = 0.0, 1.0
        scores = self(examples, responses, columns).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise ValueError(
                f"the reward model scores prompt {examples[bad[0]].id!r} {scores[bad[0]]}; its "
                f"response: {responses[bad[0]]!r}"
            )
        if len(scores) < 2 or scores.std(ddof=1) == 0:
            raise ValueError(
                f"the reward model's scores of {len(scores)} responses have no spread to "
                "standardise by: give more samples (rm.norm_samples) or train it longer"
            )
        self.mean, self.std = float(scores.mean()), float(scores.std(ddof=1))


class TrueScore:
    """The score of the task itself: the hidden truth of an embedded twin, or tests passed."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(
        self, examples: Sequence[Example], responses: Sequence[str], columns: Mapping
    ) -> np.ndarray:
        scores = self.task.true_scores(examples, responses, columns["finished"])
        if None in scores:
            name = examples[scores.index(None)].id
            raise ValueError(
                f"the task {self.task.name!r} has no score of its own for prompt {name!r}: take "
                "a reward model (ppo.reward=rm)"
            )
        return np.array(scores, np.float32)
