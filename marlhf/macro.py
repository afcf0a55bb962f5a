"""Macro actions: pool tokens into them, GAE over them, spread back (Sec. 3.2.2, App. D.1, E).

`segments` [B, T] int64 is as in `marlhf.segment`: ids 0, 1, ... along each row's valid tokens, -1
off the mask. B responses, T tokens, M macro actions; |omega| is the tokens of one macro action.

M. A pooled tensor has as many columns as the longest row has macro actions, on CPU. Elsewhere that
number would make the host wait for the device, so M is T there, the most there can be. Either way a
row's macro actions stand at the left, and the columns beyond them hold 0 and length 0: such a step
has delta = 0 and hands on the 0 behind it, so padding changes no number, whatever M is.

Precision. float32 and bfloat16 go in, float32 is computed and returned (float64 stays float64).
What stands off the mask, NaN included, is never read.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

WEIGHTS = ("equal", "unit", "decay", "first", "sum", "discounted")
VALUE_WEIGHTS = ("equal", "unit", "decay", "first")  # those that sum to one


def pool(x: Tensor, segments: Tensor, weights: str = "equal", gamma: float = 1.0) -> Tensor:
    """Token quantities x [B, T] -> macro quantities [B, M], sum_i sigma_i x_i over the tokens
    i = 0 .. |omega| - 1 of each macro action (App. D.1). Differentiable in x.

        "equal"       sigma_i = 1 / |omega|                       the paper's default for values
        "unit"        sigma_i = 1 at the last token, else 0
        "decay"       sigma_i proportional to 1 / (|omega| - i)   later tokens weigh more
        "first"       sigma_i = 1 at the first token, else 0      value of the state it begins in
        "sum"         sigma_i = 1                                 macro reward with rho = 1
        "discounted"  sigma_i = gamma^i                           semi-Markov macro reward

    gamma is read by "discounted" alone. Columns beyond a row's macro actions are 0.
    Raises ValueError for other weights.
    """
    return _pool(x, *_places(segments), weights, gamma)


def macro_lengths(segments: Tensor) -> Tensor:
    """[B, T] -> int64 [B, M]: the tokens of each macro action, 0 in the columns beyond."""
    return _lengths(*_places(segments))


def spread(y: Tensor, segments: Tensor) -> Tensor:
    """Macro quantities y [B, M] -> token quantities [B, T]: each token gets its macro action's
    entry, padding gets 0. M may exceed the number of macro actions; ValueError if it falls short
    (looked at on CPU alone, where nothing has to wait)."""
    if segments.device.type == "cpu" and y.shape[1] < _columns(segments):
        raise ValueError(
            f"spread: {y.shape[1]} columns for segments of {_columns(segments)} macro actions"
        )
    return _spread(y, torch.where(segments < 0, y.shape[1], segments))


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Advantages [B, M] of macro steps (Alg. 1; Sutton, Precup & Singh 1999 for the discount):

        delta_m = R_m + gamma^k_m V_{m+1} - V_m
        A_m     = delta_m + gamma^k_m lam A_{m+1}            V_{M+1} = A_{M+1} = 0

    rewards, values, lengths [B, M]; k_m = lengths[m], in tokens. No gradient flows through.
    A length of 0 is a step like any other with gamma^0 = 1: a column of padding (R = V = 0) leaves
    what comes before it as it is, and an empty step between two others costs one factor of lam, as
    the empty macro action of the official code does.
    """
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    discount = torch.pow(gamma, lengths.to(dtype))
    delta = rewards + discount * pad(values[:, 1:], (0, 1)) - values
    return _discounted_sums(delta, lam * discount)


@torch.no_grad()
def macro_gae(
    rewards: Tensor,
    values: Tensor,
    segments: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_weights: str = "equal",
    reward_weights: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of MA-PPO, both [B, T], 0 on padding (Sec. 3.2.2, Alg. 1, App. E).

    Token rewards and values [B, T] are pooled into macro rewards R and values V (the weights are
    those of `pool`), GAE runs over the macro steps, and every token of a macro action gets its
    advantage A and its return A + V. No gradient flows through.

    With one token a macro action this is token GAE at any gamma; with one macro action a response
    it is the return minus the value, whatever lam. Where macro actions are longer and gamma < 1,
    value_weights="first" with reward_weights="discounted" is the semi-Markov form, the only one
    for which gamma^k is exact. All value weights but "first" average values of states that come
    after the macro action's first token: a baseline that sees part of the action.

    Raises ValueError for value weights that do not sum to one.
    """
    if value_weights not in VALUE_WEIGHTS:
        raise ValueError(
            f"value_weights: {value_weights!r} is no average of values; "
            f"choose from {', '.join(VALUE_WEIGHTS)}"
        )
    places, columns = _places(segments)
    macro_rewards = _pool(rewards, places, columns, reward_weights, gamma)
    macro_values = _pool(values, places, columns, value_weights, gamma)
    advantages = gae(macro_rewards, macro_values, _lengths(places, columns), gamma, lam)
    return _spread(advantages, places), _spread(advantages + macro_values, places)


# Tokens go to their macro action's column of [B, M + 1] and padding to the spare last one, which is
# cut off on the way in and 0 on the way out: NaN there meets nothing, and nothing is masked.


def _columns(segments):
    """M, without waiting for a device."""
    if segments.device.type == "cpu" and segments.numel():
        return int(segments.max()) + 1  # the one read on the host
    return segments.shape[1]


def _places(segments):
    """The column of each token, int64 [B, T], and M."""
    columns = _columns(segments)
    return torch.where(segments < 0, columns, segments), columns


def _sum(x, places, columns):
    pooled = x.new_zeros(x.shape[0], columns + 1)
    return pooled.scatter_add_(1, places, x)[:, :columns]


def _lengths(places, columns):
    return _sum(places.new_ones(()).expand_as(places), places, columns)


def _spread(y, places):
    return pad(y, (0, 1)).gather(1, places)


def _pool(x, places, columns, weights, gamma):
    if weights not in WEIGHTS:
        raise ValueError(f"weights: there is no {weights!r}; choose from {', '.join(WEIGHTS)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if weights == "sum":
        return _sum(x, places, columns)
    lengths = _lengths(places, columns)  # [B, M]
    if weights == "equal":
        return _sum(x, places, columns) / lengths.clamp(min=1)
    # i and |omega| - i of each token, both [B, T]; off the mask anything that keeps sigma finite.
    begins = lengths.cumsum(1) - lengths
    index = ((places < columns).cumsum(1) - 1 - _spread(begins, places)).clamp(min=0)
    left = (_spread(lengths, places) - index).clamp(min=1)
    if weights == "first":
        sigma = (index == 0).to(x.dtype)
    elif weights == "unit":
        sigma = (left == 1).to(x.dtype)
    elif weights == "discounted":
        sigma = torch.pow(gamma, index.to(x.dtype))
    else:  # decay
        sigma = 1.0 / left.to(x.dtype)
        return _sum(sigma * x, places, columns) / _sum(sigma, places, columns).clamp(min=1.0)
    return _sum(sigma * x, places, columns)


def _discounted_sums(x, decay):
    """y_m = x_m + decay_m y_{m+1} along dim 1, y_{M+1} = 0.

    Blocks of about sqrt(M) steps run side by side as if nothing followed them, then what follows
    is handed down from block to block: 3 sqrt(M) vectorised steps in place of M, and no division
    by powers of decay, which would underflow.
    """
    rows, steps = x.shape
    width = max(math.isqrt(steps), 1)
    blocks = -(-steps // width)

    def in_blocks(each):  # [B, M] -> [blocks, width, B], 0 in the steps that fill the last block
        filled = each.new_zeros(blocks * width, rows)
        filled[:steps] = each.t()
        return filled.view(blocks, width, rows)

    x, decay = in_blocks(x), in_blocks(decay)
    for m in range(width - 2, -1, -1):
        x[:, m].addcmul_(decay[:, m], x[:, m + 1])
        decay[:, m].mul_(decay[:, m + 1])  # now the product of the decays up to the block's end
    heads = x[:, 0]  # [blocks, B]: the first step of each block
    for block in range(blocks - 2, -1, -1):
        heads[block].addcmul_(decay[block, 0], heads[block + 1])
    x[:-1, 1:].addcmul_(decay[:-1, 1:], heads[1:].unsqueeze(1))
    return x.view(blocks * width, rows)[:steps].t().contiguous()
