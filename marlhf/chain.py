"""A decision process small enough to know everything about: true values, advantages and policy
gradient, and what an estimate of them is worth (lesson 1; Sec. 3.2.2, 3.2.3, App. D.1).

T tokens are chosen one after the other, each from two. The policy has one logit a position,
pi(a_t = 1) = p_t = sigmoid(logit_t), whatever came before. What was chosen moves a hidden state,
and the last state's reward is all the reward there is (gamma = 1). The critic sees the state. So

    d log pi(a_t) / d logit_t = a_t - p_t            g_t = E[(a_t - p_t) A_t(s_t, a_t)]

and the policy gradient g [T] has one number a token. An estimator (token GAE, macro-GAE, Monte
Carlo) puts its own advantages in A's place. It is linear in the rewards and the critic's values,
so its expected gradient is exact at any T; its variance is exact where all 2^T responses can be
listed (`every_response`) and by sampling elsewhere (`sample`).

T tokens, S states (the first is 0), B responses; float64 throughout. In `moves`, `values` and
critics the first index is the position t; a critic is [T, S], one value for each state before a
token. Everything macro is `marlhf.macro`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from marlhf.macro import VALUE_WEIGHTS, macro_gae
from marlhf.segment import FixedNgram, Whole


@dataclass(frozen=True)
class Chain:
    """logits [T] of action 1; moves int64 [T, S, 2], the next state; reward [S] of the last state.
    Raises ValueError if these do not fit together."""

    logits: Tensor
    moves: Tensor
    reward: Tensor

    def __post_init__(self):
        tokens, states = len(self.logits), len(self.reward)
        if self.moves.shape != (tokens, states, 2):
            raise ValueError(
                f"moves must be [T, S, 2] = {[tokens, states, 2]}; got {list(self.moves.shape)}"
            )
        if self.moves.min() < 0 or self.moves.max() >= states:
            raise ValueError(f"moves must lead to states 0 to {states - 1}")

    @property
    def tokens(self) -> int:
        return len(self.logits)

    @property
    def p(self) -> Tensor:
        """[T]: probability of action 1."""
        return torch.sigmoid(self.logits)


@dataclass(frozen=True)
class Responses:
    """actions [B, T] of 0 and 1, states [B, T + 1], and what each response counts: share [B]."""

    actions: Tensor
    states: Tensor
    share: Tensor


@dataclass(frozen=True)
class Estimator:
    """Macro-GAE over n tokens a macro action (math.inf: the whole response), decay `lam` a macro
    step. n = 1 is token GAE. weights: a value weight of `marlhf.macro`, or

        "own"   advantage of a token = its macro action's return - V(s_t), the value of the state in
                which the token itself was chosen (not in the paper)

    Raises ValueError for other weights.
    """

    n: float = 1
    lam: float = 0.95
    weights: str = "equal"

    def __post_init__(self):
        if self.weights not in (*VALUE_WEIGHTS, "own"):
            raise ValueError(
                f"weights: there is no {self.weights!r}; "
                f"choose from {', '.join(VALUE_WEIGHTS)}, own"
            )

    def __call__(self, rewards: Tensor, values: Tensor) -> Tensor:
        """Token rewards and values [B, T] -> advantages [B, T]."""
        mask = torch.ones_like(values, dtype=torch.bool)
        segments = (Whole() if math.isinf(self.n) else FixedNgram(int(self.n)))(values, mask)
        weights = "equal" if self.weights == "own" else self.weights  # returns do not depend on it
        advantages, returns = macro_gae(rewards, values, segments, 1.0, self.lam, weights)
        return returns - values if self.weights == "own" else advantages


@dataclass(frozen=True)
class Quality:
    """What an estimator's gradient is worth. |g| is the length of the true gradient.

    cosine   between the expected and the true gradient: 1 points the right way
    bias     |E[estimate] - g| / |g|
    noise    sqrt(tr Cov[estimate of one response]) / |g|
    snr      |E[estimate]|^2 / tr Cov, of one response
    """

    cosine: float
    bias: float
    noise: float
    snr: float

    def aim(self, responses: int) -> float:
        """Cosine with the true gradient of the mean over a batch of responses:
        cosine / sqrt(1 + 1 / (responses snr)), which puts E|x|^2 for |x|^2 in the denominator.
        Bias bounds it, noise keeps small batches below that bound."""
        return self.cosine / math.sqrt(1 + 1 / (responses * self.snr))


def weighted_chain(weights: Sequence[int], p: float = 0.5) -> Chain:
    """A token chosen well (action 1, probability p) earns its weight, a whole number >= 0. The
    state is what has been earned so far; the reward at the end is that, scaled to mean 0, spread 1.
    A token's advantage is then weight x (a - p) over the spread, wherever the rest went.
    Raises ValueError without a positive weight."""
    weight = torch.tensor(list(weights))
    if weight.min() < 0 or weight.sum() == 0:
        raise ValueError("weights: give whole numbers of 0 or more, one of them positive")
    earned = torch.arange(int(weight.sum()) + 1)
    moves = earned[None, :, None] + weight[:, None, None] * torch.tensor([0, 1])
    mean, spread = p * weight.sum(), (p * (1 - p) * weight.double().square().sum()).sqrt()
    return Chain(
        torch.full((len(weight),), p, dtype=torch.float64).logit(),
        moves.clamp(max=len(earned) - 1),  # states out of reach stay inside the table
        (earned.double() - mean) / spread,
    )


def lesson_chain(tokens: int = 40) -> Chain:
    """Each seventh token decides (weight 4), the others matter a little (weight 1). Seven has no
    factor in common with n = 5: deciding tokens stand at every place of a macro action."""
    return weighted_chain([4 if t % 7 == 3 else 1 for t in range(tokens)])


# What is true, by dynamic programming


def values(chain: Chain) -> Tensor:
    """V [T + 1, S]: expected reward from each state before each token; the last row is `reward`."""
    table = [chain.reward.double()]
    for p, moves in zip(chain.p.flip(0), chain.moves.flip(0), strict=True):
        following = table[-1][moves]  # [S, 2]
        table.append((1 - p) * following[:, 0] + p * following[:, 1])
    return torch.stack(table[::-1])


def advantages(chain: Chain) -> Tensor:
    """A [T, S, 2] = Q_t(s, a) - V_t(s)."""
    table = values(chain)
    following = torch.stack([v[m] for v, m in zip(table[1:], chain.moves, strict=True)])
    return following - table[:-1, :, None]


def occupancy(chain: Chain) -> Tensor:
    """[T + 1, S]: the probability of each state before each token; the last row is the end."""
    now = torch.zeros(len(chain.reward), dtype=torch.float64)
    now[0] = 1.0
    rows = [now]
    for p, moves in zip(chain.p, chain.moves, strict=True):
        rows.append(torch.zeros_like(now))
        rows[-1].index_add_(0, moves[:, 0], (1 - p) * rows[-2])
        rows[-1].index_add_(0, moves[:, 1], p * rows[-2])
    return torch.stack(rows)


def policy_gradient(chain: Chain) -> Tensor:
    """The true gradient [T] of the expected reward: p_t (1 - p_t) E[A_t(s_t, 1) - A_t(s_t, 0)]."""
    gap = advantages(chain).diff(dim=2).squeeze(2)
    return chain.p * (1 - chain.p) * (occupancy(chain)[:-1] * gap).sum(1)


def true_advantages(chain: Chain, responses: Responses) -> Tensor:
    """[B, T]: the true advantage of each token of each response."""
    t = torch.arange(chain.tokens)
    return advantages(chain)[t, responses.states[:, :-1], responses.actions]


# Responses and critics


def every_response(chain: Chain) -> Responses:
    """All 2^T responses, each counted with its probability. For T up to about 16."""
    number = torch.arange(2**chain.tokens)
    actions = (number[:, None] >> torch.arange(chain.tokens)) & 1
    share = torch.where(actions == 1, chain.p, 1 - chain.p).prod(1)
    return Responses(actions, _states(chain, actions), share)


def sample(chain: Chain, count: int, seed: int = 0) -> Responses:
    """`count` responses of the policy, each counted 1 / count."""
    uniforms = torch.from_numpy(np.random.default_rng([0, seed]).random((count, chain.tokens)))
    actions = (uniforms < chain.p).long()
    share = torch.full((count,), 1 / count, dtype=torch.float64)
    return Responses(actions, _states(chain, actions), share)


def make_critic(
    chain: Chain, informed: float = 1.0, noise: float = 0.0, seed: int = 0, sure_every: int = 0
) -> Tensor:
    """Critic values [T, S]: mean reward + informed (V - mean reward) + noise.

    informed    1 is exact, 0 a constant
    noise       spread of an error drawn once for each state and position (a function of the state,
                as a network's error is), in units of the spread of the rewards
    sure_every  k > 0: no noise at positions 0, k, 2k, ...; a critic that knows where words begin
    """
    exact = values(chain)[:-1]
    mean = exact[0, 0]
    spread = (occupancy(chain)[-1] * (chain.reward - mean) ** 2).sum().sqrt()
    error = torch.from_numpy(np.random.default_rng([1, seed]).normal(size=tuple(exact.shape)))
    if sure_every:
        error[::sure_every] = 0.0
    return mean + informed * (exact - mean) + noise * spread * error


# What an estimate is worth


def estimated_advantages(
    chain: Chain, responses: Responses, critic: Tensor, estimator: Estimator
) -> Tensor:
    """[B, T]: the estimator's advantages; the reward stands at the last token."""
    t = torch.arange(chain.tokens)
    rewards = torch.zeros(responses.actions.shape, dtype=torch.float64)
    rewards[:, -1] = chain.reward[responses.states[:, -1]]
    return estimator(rewards, critic[t, responses.states[:, :-1]])


def gradients(chain: Chain, responses: Responses, critic: Tensor, estimator: Estimator) -> Tensor:
    """[B, T]: each response's estimate (a_t - p_t) A_t of the policy gradient."""
    score = responses.actions - chain.p
    return score * estimated_advantages(chain, responses, critic, estimator)


def expected_gradient(chain: Chain, critic: Tensor, estimator: Estimator) -> Tensor:
    """E[(a_t - p_t) A_t] [T] of an estimator, exactly.

    An estimated advantage is sum_j c_tj f_j(s_j) with f_j the critic at position j and f_T the
    reward; the c_tj are read off unit vectors, and E[(a_t - p_t) f_j(s_j)] comes from carrying all
    f_j back through the chain together (0 for j <= t: those states came before the token).
    """
    tokens, p = chain.tokens, chain.p
    unit = torch.eye(tokens, dtype=torch.float64)
    none = torch.zeros(1, tokens, dtype=torch.float64)
    weights = estimator(
        torch.cat([torch.zeros_like(unit), unit[-1:]]), torch.cat([unit, none])
    )  # [T + 1, T]: c_tj at [j, t]
    effect = torch.zeros(tokens + 1, tokens, dtype=torch.float64)
    ahead = torch.zeros(len(chain.reward), tokens + 1, dtype=torch.float64)  # E[f_j | s_t]
    ahead[:, tokens] = chain.reward
    occupied = occupancy(chain)
    for t in reversed(range(tokens)):
        bad, good = ahead[chain.moves[t, :, 0]], ahead[chain.moves[t, :, 1]]
        effect[:, t] = p[t] * (1 - p[t]) * (occupied[t] @ (good - bad))
        ahead = (1 - p[t]) * bad + p[t] * good
        ahead[:, t] = critic[t]
    return (weights * effect).sum(0)


def credit_shares(chain: Chain, critic: Tensor, estimator: Estimator) -> Tensor:
    """[T]: the share of its true gradient that each token gets on average; 1 is unbiased. A token
    without effect has none (NaN)."""
    return expected_gradient(chain, critic, estimator) / policy_gradient(chain)


def quality(
    chain: Chain, critics: Sequence[Tensor], estimator: Estimator, responses: Responses
) -> Quality:
    """`Quality` of an estimator, its four numbers averaged over critics (draws of their noise).
    Expectations are exact; the variance is over `responses`."""
    truth = policy_gradient(chain)
    rows = []
    for critic in critics:
        mean = expected_gradient(chain, critic, estimator)
        square = responses.share @ gradients(chain, responses, critic, estimator).square()
        variance = float((square - mean.square()).sum())
        rows.append(
            (
                float(torch.cosine_similarity(mean, truth, dim=0)),
                float((mean - truth).norm() / truth.norm()),
                math.sqrt(variance) / float(truth.norm()),
                float(mean.square().sum()) / variance,
            )
        )
    return Quality(*(float(x) for x in np.mean(rows, axis=0)))


def _states(chain, actions):
    """[B, T + 1]: the states that actions [B, T] lead through."""
    states = torch.zeros(len(actions), chain.tokens + 1, dtype=torch.int64)
    for t in range(chain.tokens):
        states[:, t + 1] = chain.moves[t, states[:, t], actions[:, t]]
    return states
