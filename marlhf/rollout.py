"""What flows through one update: a rollout, its advantages, and the numbers to watch.

Shapes: B responses, T tokens of the longest, S tokens of the longest prompt and response together.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from marlhf import processes
from marlhf.macro import pool
from marlhf.objectives import explained_variance, kl_k1, masked_rms
from marlhf.text import Example


@dataclass
class Rollout:
    """Responses of one update and what is known about them; `score` fills the second part.

    Rows stand by length, prompt included, so that rows next to each other need little padding.
    """

    update: int
    examples: list[Example]
    places: torch.Tensor  # int64 [B], of the prompts among those of the update, on the host
    texts: list[str]
    ids: torch.Tensor  # int64 [B, S], prompt and response packed, right padded
    starts: torch.Tensor  # int64 [B], where the response begins in ids
    tokens: torch.Tensor  # int64 [B, T]
    mask: torch.Tensor  # bool [B, T]
    finished: torch.Tensor  # bool [B], an end token was sampled
    logprobs: torch.Tensor  # [B, T], of the distribution sampled from
    full_logprobs: torch.Tensor  # [B, T], same temperature, whole vocabulary
    kept: torch.Tensor | None = None  # int64 [B, T, k], ids that top-k kept

    scores: torch.Tensor | None = None  # [B], clipped and penalised as the settings say
    rm_scores: np.ndarray | None = None  # [B], as the reward gave them
    true_scores: np.ndarray | None = None  # [B], where the task has a truth
    ref_logprobs: torch.Tensor | None = None  # [B, T], reference at the sampling temperature
    ref_logprobs_1: torch.Tensor | None = None  # [B, T], at temperature 1, where segments need it
    values: torch.Tensor | None = None  # [B, T], critic before the update
    forward: tuple | None = field(default=None, repr=False)  # the update's forward pass, if shared

    def __post_init__(self):
        lengths = self.mask.sum(1)  # [B]; on the host, so that cutting rows waits for no device
        self._sizes = torch.stack([self.starts + lengths, lengths], 1).cpu()

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """ids, starts, tokens, mask, kept of some rows, cut to the longest of them."""
        size, length = self._sizes[index].amax(0).tolist()
        ids, tokens = self.ids[index, :size], self.tokens[index, :length]
        kept = None if self.kept is None else self.kept[index, :length]
        return ids, self.starts[index], tokens, self.mask[index, :length], kept

    def widen(self, part: torch.Tensor) -> torch.Tensor:
        """``[n, t]`` of some rows to ``[n, T]``, zeros at the right."""
        return F.pad(part, (0, self.mask.shape[1] - part.shape[1]))

    @property
    def kl(self) -> torch.Tensor:
        """log pi - log pi_ref of each token ``[B, T]``, at the sampling temperature."""
        return kl_k1(self.full_logprobs, self.ref_logprobs)


@dataclass
class Advantages:
    """All ``[B, T]``; tokens of one macro action share an advantage and a return."""

    segments: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


# What `diagnostics` reads of a rollout and of its advantages.
_WATCHED = ("starts", "mask", "finished", "full_logprobs", "ref_logprobs", "values")


def whole(rollout: Rollout, advantages: Advantages) -> tuple[Rollout, Advantages]:
    """The rollout of all processes, rows in any order, as far as `diagnostics` reads it."""
    if processes.world() == 1:
        return rollout, advantages
    read = {name: getattr(rollout, name) for name in _WATCHED} | vars(advantages)
    shares = processes.gather({name: value.cpu() for name, value in read.items()})
    longest = max(share["mask"].shape[1] for share in shares)

    def joined(name):
        off = -1 if name == "segments" else 0
        parts = [share[name] for share in shares]
        if parts[0].ndim == 2:
            parts = [F.pad(part, (0, longest - part.shape[1]), value=off) for part in parts]
        return torch.cat(parts)

    found = {name: joined(name) for name in read}
    scores = processes.gather((rollout.rm_scores, rollout.true_scores))
    merged = replace(
        rollout,
        **{name: found[name] for name in _WATCHED},
        rm_scores=np.concatenate([rm for rm, _ in scores]),
        true_scores=None if scores[0][1] is None else np.concatenate([true for _, true in scores]),
    )
    return merged, Advantages(**{name: found[name] for name in vars(advantages)})


@torch.no_grad()
def diagnostics(rollout: Rollout, advantages: Advantages) -> dict:
    """Means over the responses of a scored rollout.

    kl is the sum over a response's tokens, in nats. An L2 norm (Fig. 11) is over the steps of a
    response, macro or token; over macro steps it shrinks by about sqrt(n) through counting alone,
    so root mean squares per step stand beside it.
    """
    mask, segments = rollout.mask, advantages.segments
    adv, ret = advantages.advantages, advantages.returns
    macro_adv, macro_ret = pool(adv, segments, "first"), pool(ret, segments, "first")
    steps = pool(mask, segments, "first") > 0  # [B, M], true at every macro action
    truth = rollout.true_scores

    def norm(x):
        return float(x.square().sum(1).sqrt().mean())

    return {
        "rm_score": float(rollout.rm_scores.mean()),
        "true_score": None if truth is None else float(truth.mean()),
        "kl": float((rollout.kl * mask).sum(1).mean()),
        "reward": float(advantages.rewards.sum(1).mean()),
        "length": float(mask.sum(1).float().mean()),
        "finished": float(rollout.finished.float().mean()),
        "macros": float(steps.sum(1).float().mean()),
        "explained_variance": float(explained_variance(rollout.values, ret, mask)),
        "adv_rms_token": float(masked_rms(adv, mask)),
        "adv_rms_macro": float(masked_rms(macro_adv, steps)),
        "ret_rms_token": float(masked_rms(ret, mask)),
        "ret_rms_macro": float(masked_rms(macro_ret, steps)),
        "adv_l2_macro": norm(macro_adv),
        "q_l2_macro": norm(macro_ret),
        "adv_l2_token": norm(adv * mask),
        "q_l2_token": norm(ret * mask),
    }
