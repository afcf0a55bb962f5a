"""What flows through one update: a rollout, its advantages, and the numbers to watch.

Shapes: B responses, T tokens of the longest, S tokens of the longest prompt and response together.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from marlhf import processes
from marlhf.macro import pool
from marlhf.objectives import explained_variance, kl_k1, masked_rms
from marlhf.text import Example


@dataclass
class Rollout:
    """Responses of one update and what is known about them; `score` fills the second part."""

    update: int
    examples: list[Example]
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
_WATCHED = ("mask", "finished", "full_logprobs", "ref_logprobs", "values")


def whole(rollout: Rollout, advantages: Advantages) -> tuple[Rollout, Advantages]:
    """The rollout of all processes in the order of its prompts: what `diagnostics` reads."""
    if processes.world() == 1:
        return rollout, advantages
    parts = {name: getattr(rollout, name).cpu() for name in _WATCHED}
    parts |= {name: value.cpu() for name, value in vars(advantages).items()}
    shares = processes.gather((parts, rollout.rm_scores, rollout.true_scores))
    longest = max(part["mask"].shape[1] for part, *_ in shares)

    def joined(name):
        off = -1 if name == "segments" else 0
        rows = []
        for part, *_ in shares:
            value = part[name]
            pad = (0, longest - value.shape[1]) if value.ndim == 2 else (0, 0)
            rows.append(list(F.pad(value, pad, value=off)))
        return torch.stack(processes.undeal(rows))

    scores, truths = ([share[i] for share in shares] for i in (1, 2))
    found = {name: joined(name) for name in parts}
    names = [part.name for part in fields(Advantages)]
    merged = replace(
        rollout,
        **{name: found[name] for name in _WATCHED},
        rm_scores=np.array(processes.undeal(scores)),
        true_scores=None if truths[0] is None else np.array(processes.undeal(truths)),
        forward=None,
    )
    return merged, Advantages(**{name: found[name] for name in names})


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
