"""Losses of PPO over tokens and macro actions, token rewards, KL estimators (Eq. 1, 4).

All tensors are [B, T] over response tokens with an explicit mask [B, T] unless a docstring says
otherwise. float32 and bfloat16 go in, float32 is computed and returned (float64 stays float64).
What stands off the mask, NaN included, reaches neither a result nor a gradient.

Denominators. A loss is a sum over valid tokens divided by their number. `denominator` replaces that
number: with the token count of the whole batch given to every micro-batch, the losses add up to the
loss of the batch, and so do their gradients. Over processes that average gradients (DDP), give the
global count divided by the number of processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from marlhf.macro import pool, spread


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    ratio: str = "token",
    segments: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Clipped surrogate loss, a scalar to minimise (Schulman et al. 2017; Eq. 1, 4).

        "token"   - sum_t min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t) / tokens
                  r_t = pi(a_t) / pi_old(a_t)
        "macro"   - sum_m min(r_m A_m, clip(r_m, 1 - clip, 1 + clip) A_m) / tokens
                  r_m = the product of r_t over the macro action (Eq. 4)

    "token" is what the official code does: every token clips its own ratio and shares its macro
    action's advantage. "macro" needs `segments` and takes for A_m the mean of the advantages in the
    macro action, which `macro_gae` made all equal. It too is divided by the tokens, not by the
    macro actions: at ratio 1 its gradient is then the token form's.

    logprobs carry the gradient; old_logprobs and advantages are constants.
    Raises ValueError for another ratio, or for "macro" without segments.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = _valid(advantages.detach(), mask)
    if _checked_ratio(ratio, segments) == "macro":
        log_ratio = pool(log_ratio, segments, "sum")
        advantages = pool(advantages, segments, "equal")
    # For A >= 0 clipping wins long before this; an overflow there would turn a gradient 0 into NaN.
    log_ratio = torch.where(advantages >= 0, log_ratio.clamp(max=20.0), log_ratio)
    r = log_ratio.exp()
    surrogate = torch.minimum(r * advantages, r.clamp(1 - clip, 1 + clip) * advantages)
    return -surrogate.sum() / _tokens(mask, denominator)  # off the mask A = 0


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Clipped squared error of the critic, a scalar to minimise (Sec. 3.2.2, App. E):

        1/2 sum_t max((V_t - G_t)^2, (V_clip_t - G_t)^2) / tokens
        V_clip = V_old + clamp(V - V_old, -clip, clip)

    Every token regresses on its macro action's return G. values carry the gradient; old_values and
    returns are constants. clip=math.inf is the plain squared error.
    """
    values, old = _valid(values, mask), _valid(old_values.detach(), mask)
    returns = _valid(returns.detach(), mask)
    near = old + (values - old).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * error.sum() / _tokens(mask, denominator)


@torch.no_grad()
def policy_stats(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    ratio: str = "token",
    segments: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """What to watch beside `policy_loss`, as scalars on the device:

    clip_fraction   share of tokens whose ratio (their macro action's, for "macro") left
                    [1 - clip, 1 + clip]
    approx_kl       KL(pi_old || pi) per token: mean of (r - 1) - log r over token ratios
    ratio_max       the largest ratio, of tokens or of macro actions

    With the batch's `denominator` the first two add up over micro-batches; ratio_max never does.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask, denominator)
    if _checked_ratio(ratio, segments) == "macro":
        log_ratio = spread(pool(log_ratio, segments, "sum"), segments)
    r = log_ratio.exp()
    outside = ((r < 1 - clip) | (r > 1 + clip)).to(r.dtype)
    return {
        "clip_fraction": masked_mean(outside, mask, denominator),
        "approx_kl": approx_kl,
        "ratio_max": r.masked_fill(~mask.bool(), 0.0).amax(),
    }


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards [B, T]: the KL penalty at every token, the score at the last one (Sec. 3.2.2).

        r_t = -kl_coef kl_t + (scores if t is the row's last valid token else 0),  0 off the mask

    Sign of the KL: `kl` [B, T] is log pi - log pi_ref (`kl_k1`), positive where the policy is more
    sure of its token than the reference, and it is subtracted: drifting away costs reward.
    Where the final reward is placed: `scores` [B] is added at the last valid token of each row, the
    end token if the response has one and its cut otherwise; later padding is skipped, and a row
    without valid tokens gets no score. Nothing is clipped here.
    """
    mask = mask.bool()
    place = mask.cumsum(1)
    last = mask & (place == place[:, -1:])
    dtype = torch.promote_types(torch.promote_types(scores.dtype, kl.dtype), torch.float32)
    rewards = torch.where(mask, -kl_coef * kl.to(dtype), 0)
    return rewards + torch.where(last, scores.to(dtype).unsqueeze(1), 0)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref of sampled tokens: an unbiased estimate of KL(pi || pi_ref) when they
    were sampled from pi; of either sign at one token (Schulman, Approximating KL divergence, 2020).
    As a reward (`token_rewards`) it is the right one; as a loss its expected gradient is 0."""
    return _wide(logprobs) - _wide(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2 of sampled tokens: never negative, biased in the third order of
    the difference. As a loss its expected gradient is that of KL(pi || pi_ref), exactly."""
    return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """u - 1 - log u of sampled tokens, u = pi_ref / pi: never negative, unbiased for
    KL(pi || pi_ref). As a loss its expected gradient is that of KL(pi_ref || pi)."""
    log_u = -kl_k1(logprobs, ref_logprobs)
    return torch.expm1(log_u) - log_u


def categorical_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) = sum_a pi(a) (log pi(a) - log pi_ref(a)), exactly: log-probabilities
    [..., vocabulary] of both -> [...]. An action with pi(a) = 0 adds nothing, whatever pi_ref."""
    logprobs, ref_logprobs = _wide(logprobs), _wide(ref_logprobs)
    impossible = logprobs == -torch.inf
    difference = (logprobs - ref_logprobs).masked_fill(impossible, 0.0)
    return (logprobs.exp() * difference).sum(-1)


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean of x [B, T] over the valid tokens of the whole batch, not row by row; 0 if none is."""
    return _valid(x, mask).sum() / _tokens(mask, denominator)


def masked_rms(x: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of x [B, T] over the valid tokens."""
    return masked_mean(_wide(x) ** 2, mask).sqrt()


def whiten(
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 1e-8,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """(A - mean) / sqrt(variance + epsilon) over the valid tokens of the batch, 0 off the mask.
    Give it the whole batch: whitening a micro-batch changes what is optimised. Where processes
    share the batch, `total` gives the sum over them of a tensor that each has."""
    tokens = total(mask.sum()).clamp(min=1)
    mean = total(_valid(advantages, mask).sum()) / tokens
    centred = _valid(_wide(advantages) - mean, mask)
    return centred * torch.rsqrt(total((centred**2).sum()) / tokens + epsilon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the valid tokens: 1 is a perfect critic up to a
    constant, 0 is no better than a constant, below 0 is worse. NaN where the returns do not vary.
    """
    returns = _wide(returns)
    variance = _variance(returns, mask)
    unexplained = _variance(returns - _wide(values), mask) / variance
    return torch.where(variance > 0, 1 - unexplained, torch.nan)


def _variance(x, mask):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _valid(x, mask):
    """x in float32, 0 off the mask, so that NaN there meets no arithmetic and no gradient."""
    return torch.where(mask.bool(), _wide(x), 0)


def _log_ratio(logprobs, old_logprobs, mask):
    return _valid(logprobs, mask) - _valid(old_logprobs.detach(), mask)


def _tokens(mask, denominator):
    return mask.sum().clamp(min=1) if denominator is None else denominator


def _checked_ratio(ratio, segments):
    if ratio not in ("token", "macro"):
        raise ValueError(f"ratio: there is no {ratio!r}; choose 'token' or 'macro'")
    if ratio == "macro" and segments is None:
        raise ValueError("ratio: 'macro' needs segments, the macro action of each token [B, T]")
    return ratio
