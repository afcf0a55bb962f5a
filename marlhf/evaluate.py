"""Scores of a policy on fixed held-out prompts: what every curve and every table is read from.

The prompts, and the random numbers behind each response, are the same at every evaluation, in every
arm and in every chain (common random numbers), so that differences between arms are the policies'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from marlhf import processes
from marlhf.models import Reference, pack
from marlhf.placement import sharding
from marlhf.sampling import Sample, Sampler, keyed_uniforms
from marlhf.text import Example, decode, encode_prompt, left_pad


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of different word n-grams among all of the texts (Li et al. 2016); 0 if none."""
    words = [text.split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


class Prompts:
    """Examples with their prompts encoded once; a batch of them is left padded."""

    def __init__(self, examples: Sequence[Example], tokenizer, budget: int):
        self.examples = list(examples)
        self.pad = tokenizer.pad_token_id
        self.ids = [encode_prompt(e.prompt, tokenizer, budget) for e in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, index: Sequence[int]) -> tuple[list[Example], torch.Tensor, torch.Tensor]:
        """-> examples, ids ``[B, P]``, mask ``[B, P]``."""
        ids, mask = left_pad([self.ids[i] for i in index], self.pad)
        return [self.examples[i] for i in index], ids, mask


def response_texts(sample: Sample, tokenizer) -> list[str]:
    """The responses as text, without special tokens."""
    return [
        decode(row[keep].tolist(), tokenizer)
        for row, keep in zip(sample.tokens.cpu(), sample.mask.cpu(), strict=True)
    ]


@dataclass
class Evaluator:
    """Samples the held-out prompts and scores them.

    ``reward`` and ``truth`` are rewards (`marlhf.rewards`); without one its column is None.
    ``number`` tells apart several samples of a prompt; 0 is the one that training evaluates.
    """

    prompts: Prompts
    tokenizer: object
    reference: Reference
    reward: object | None
    truth: object | None
    length: int
    temperature: float
    top_k: int | None = None
    seed: int = 1234
    batch: int = 256
    compile: bool = False
    number: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, policy) -> list[dict]:
        """A row a prompt: its id and text, the response, its scores, KL, length, finished.

        Each process samples its share; all of them get all rows.
        """
        rows, share = [], processes.deal(range(len(self.prompts)))
        own = len(share)
        if sharding():  # all processes go through as many batches
            share = [*share, 0][: -(-len(self.prompts) // processes.world())]
        sampler = Sampler(
            policy, self.tokenizer, self.temperature, self.top_k,
            max(1, min(self.batch, len(share))), self.compile,
        )  # fmt: skip
        for start in range(0, len(share), self.batch):
            rows += self._rows(sampler, *self.prompts.batch(share[start : start + self.batch]))
        return processes.undeal(processes.gather(rows[:own]))

    def _rows(self, sampler, examples, ids, mask) -> list[dict]:
        names = [e.id for e in examples]
        uniforms = keyed_uniforms(self.seed, "evaluation", self.number, names, self.length)
        ids, mask = ids.to(self.device), mask.to(self.device)
        sample = sampler(ids, mask, uniforms)
        packed, starts = pack(ids, mask, sample.tokens, sample.mask, sampler.pad)
        # greedy decoding has no distribution of its own: its divergence is taken at temperature 1
        temperature = self.temperature or 1.0
        reference, *_ = self.reference.logprobs(
            packed, starts, sample.tokens, sample.mask, temperature
        )
        kl = ((sample.full_logprobs - reference) * sample.mask).sum(1)
        texts = response_texts(sample, self.tokenizer)
        columns = {
            "finished": sample.finished.tolist(),
            "length": sample.mask.sum(1).tolist(),
        }
        missing = [None] * len(texts)
        scores = self.reward(examples, texts, columns) if self.reward else missing
        truth = self.truth(examples, texts, columns) if self.truth else missing
        return [
            {
                "prompt_id": example.id,
                "prompt": example.prompt.text,
                "response": text,
                "rm_score": None if score is None else float(score),
                "true_score": None if true is None else float(true),
                "kl": float(k),
                "length": int(length),
                "finished": bool(finished),
            }
            for example, text, score, true, k, length, finished in zip(
                examples, texts, scores, truth, kl.tolist(), columns["length"],
                columns["finished"], strict=True,
            )
        ]  # fmt: skip


def summarise(rows: Sequence[dict]) -> dict:
    """Means over the prompts of an evaluation, and distinct-2 over all of its responses."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows]
        return None if None in values else float(np.mean(values))

    names = ("rm_score", "true_score", "kl", "length", "finished")
    return {name: mean(name) for name in names} | {
        "distinct2": distinct([row["response"] for row in rows]),
        "prompts": len(rows),
    }
