"""PPO trainers that depart from Alg. 1: a parser's macro actions, the official code's choices.

`VariantTrainer` is `PPOTrainer` but for what `config.ppo.macro` says of `termination: parsing`,
`last_alone` and `empty_step`. Switched off, each leaves every number as it is there.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from marlhf import processes
from marlhf.config import Config
from marlhf.macro import gae, macro_lengths, pool, spread
from marlhf.objectives import whiten
from marlhf.parsing import Constituency, make_parser
from marlhf.ppo import PPOTrainer, segmenter_by_name, train_ppo
from marlhf.rollout import Advantages, Rollout
from marlhf.runs import Run
from marlhf.segment import Segmenter, from_starts, valid_index
from marlhf.tasks.base import TaskData

logger = logging.getLogger(__name__)


class LastAlone:
    """Any termination condition, and the last valid token of each row a macro action of its own
    (official code: averaging over a macro action does not dilute the score there)."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def __call__(self, tokens, mask, *, ref_logprobs=None, generator=None) -> Tensor:
        segments = self.segmenter(tokens, mask, ref_logprobs=ref_logprobs, generator=generator)
        index = valid_index(mask)
        before = torch.nn.functional.pad(segments, (1, 0), value=-1)[:, :-1]
        starts = (segments > before.cummax(1).values) | (index == index[:, -1:])
        return from_starts(starts, mask)


def gae_with_empty_step(
    rewards: Tensor,
    values: Tensor,
    segments: Tensor,
    n: int,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_weights: str = "equal",
    reward_weights: str = "sum",
) -> tuple[Tensor, Tensor]:
    """`macro.macro_gae` as the official code runs it: in a row whose tokens before the last are a
    multiple of n (with n = 1 every row), a macro step of no tokens, reward 0 and value 0 stands
    before the last token's step. What comes before it bootstraps from its value, 0, and sees what
    comes after through one more factor of lam.

    All [B, T]; in `segments` the last token of a row is a macro action of its own.
    -> advantages and returns, both [B, T], 0 on padding.
    """
    macro_rewards = pool(rewards, segments, reward_weights, gamma)  # [B, M]
    macro_values = pool(values, segments, value_weights, gamma)
    tokens, steps = (segments >= 0).sum(1, keepdim=True), segments.amax(1, keepdim=True) + 1
    # the column of the empty step, beyond the last in a row without one
    place = torch.where((tokens - 1) % n == 0, steps - 1, macro_rewards.shape[1]).clamp(min=0)
    column = torch.arange(macro_rewards.shape[1] + 1, device=segments.device)
    source = (column - (column > place).long()).clamp(max=macro_rewards.shape[1] - 1)

    def widened(x: Tensor) -> Tensor:  # [B, M] -> [B, M + 1]
        return torch.where(column == place, 0, x.gather(1, source))

    lengths = macro_lengths(segments)
    wide = gae(*map(widened, (macro_rewards, macro_values, lengths)), gamma, lam)
    advantages = wide.gather(1, column[:-1] + (column[:-1] >= place).long())
    return spread(advantages, segments), spread(advantages + macro_values, segments)


def segmenter_of(config: Config, tokenizer) -> Segmenter:
    """The termination condition of a config, a parser's among them."""
    macro = config.ppo.macro
    if macro.termination != "parsing":
        return segmenter_by_name(macro)
    return Constituency(tokenizer, make_parser(macro.parser, config.data.task), macro.cutoff)


class VariantTrainer(PPOTrainer):
    """`PPOTrainer` with a parser's macro actions, the last token alone, or the empty macro step."""

    constituency: Constituency | None = None

    def make_segmenter(self) -> Segmenter:
        segmenter = segmenter_of(self.config, self.tokenizer)
        if isinstance(segmenter, Constituency):
            self.constituency = segmenter
        return LastAlone(segmenter) if self.ppo.macro.last_alone else segmenter

    def advantages(self, rollout: Rollout) -> Advantages:
        counted, start = self.constituency, time.perf_counter()
        if counted is not None:
            before = counted.sentences, counted.fallbacks
        found = super().advantages(rollout)
        if self.ppo.macro.empty_step:
            found.advantages, found.returns = self._with_empty_step(rollout, found)
        if counted is not None and self.run is not None:
            seen = counted.sentences - before[0], counted.fallbacks - before[1]
            sentences, fallbacks = map(sum, zip(*processes.gather(seen), strict=True))
            row = {"update": rollout.update + 1, "sentences": sentences, "fallbacks": fallbacks}
            self.run.log("parses", row | {"sec_advantages": time.perf_counter() - start})
        return found

    def summary(self) -> dict:
        found = super().summary()
        if processes.main() and self.constituency is not None:
            found["parses"] = _parses(self.run, self.config.ppo.macro.parser)
        return found

    def _with_empty_step(self, rollout: Rollout, found: Advantages) -> tuple[Tensor, Tensor]:
        ppo, macro = self.ppo, self.ppo.macro
        advantages, returns = gae_with_empty_step(
            found.rewards,
            rollout.values,
            found.segments,
            1 if macro.termination == "token" else macro.n,
            ppo.gamma,
            ppo.lam,
            macro.value_weights,
            macro.reward_weights,
        )
        if ppo.whiten:
            advantages = whiten(advantages, rollout.mask, total=self.accelerator.reduce)
        return advantages, returns


def train_variant(config: Config, data: TaskData, run: Run, sft: Path, rm: Path | None) -> None:
    """As `ppo.train_ppo`, with `VariantTrainer`; the summary counts sentences without a parse."""
    train_ppo(config, data, run, sft, rm, kind=VariantTrainer)


def _parses(run: Run, parser: str) -> dict:
    """Sentences seen in all of training, and how many of them fell back to tokens."""
    table = run.frame("parses")
    sentences, fallbacks = int(table["sentences"].sum()), int(table["fallbacks"].sum())
    share = fallbacks / max(sentences, 1)
    logger.info(
        "%s: %d of %d sentences (%.2g%%) have no parse by %s and fell back to tokens",
        run.path.name, fallbacks, sentences, 100 * share, parser,
    )  # fmt: skip
    return {"parser": parser, "sentences": sentences, "fallbacks": fallbacks, "share": share}
