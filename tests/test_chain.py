"""The exact chain against brute force: every action sequence of short chains, spelled out in plain
Python, with finite differences for the gradient; long chains against sampling, with tolerances in
standard errors."""

import itertools
import math

import pytest
import torch
from reference import macro_gae, segments_from_lengths
from torch.testing import assert_close

from marlhf import chain as ch
from marlhf.chain import Chain, Estimator
from marlhf.macro import VALUE_WEIGHTS

TOKENS = 7
ESTIMATORS = [
    Estimator(),
    Estimator(1, 0.5),
    Estimator(3, 0.9, "equal"),
    Estimator(3, 0.9, "unit"),
    Estimator(2, 0.0, "decay"),
    Estimator(5, 0.95, "first"),
    Estimator(3, 0.9, "own"),
    Estimator(math.inf, 0.95, "equal"),
    Estimator(math.inf, 0.95, "first"),
]


def random_chain(seed=0, tokens=TOKENS, states=4):
    """States, moves and rewards without rhyme or reason: values depend on the state."""
    generator = torch.Generator().manual_seed(seed)
    return Chain(
        torch.randn(tokens, generator=generator, dtype=torch.float64),
        torch.randint(states, (tokens, states, 2), generator=generator),
        torch.randn(states, generator=generator, dtype=torch.float64),
    )


def walk(chain, actions, state=0, start=0):
    """Plain Python: the states that actions lead through from position `start`."""
    states = [state]
    for t, action in enumerate(actions, start):
        states.append(int(chain.moves[t, states[-1], action]))
    return states


def likelihood(chain, actions, start=0):
    p = chain.p.tolist()
    return math.prod(p[t] if action else 1 - p[t] for t, action in enumerate(actions, start))


def sequences(length):
    return itertools.product((0, 1), repeat=length)


def expected_reward(chain, state=0, start=0):
    return math.fsum(
        likelihood(chain, actions, start)
        * float(chain.reward[walk(chain, actions, state, start)[-1]])
        for actions in sequences(chain.tokens - start)
    )


def brute_gradients(chain, critic, estimator):
    """[(probability, gradient estimate)] of every response, by the plain-Python macro-GAE."""
    n = chain.tokens if math.isinf(estimator.n) else estimator.n
    mask = [True] * chain.tokens
    segments = segments_from_lengths([n] * chain.tokens, mask)
    weights = "equal" if estimator.weights == "own" else estimator.weights
    p, rows = chain.p.tolist(), []
    for actions in sequences(chain.tokens):
        states = walk(chain, actions)
        rewards = [0.0] * (chain.tokens - 1) + [float(chain.reward[states[-1]])]
        values = [float(critic[t, s]) for t, s in enumerate(states[:-1])]
        advantages, returns = macro_gae(
            rewards, values, segments, 1.0, estimator.lam, weights, "sum"
        )
        if estimator.weights == "own":
            advantages = [g - v for g, v in zip(returns, values, strict=True)]
        each = [(a - q) * x for a, q, x in zip(actions, p, advantages, strict=True)]
        rows.append((likelihood(chain, actions), each))
    return rows


def moments(rows):
    mean = [math.fsum(p * g[t] for p, g in rows) for t in range(len(rows[0][1]))]
    square = [math.fsum(p * g[t] ** 2 for p, g in rows) for t in range(len(rows[0][1]))]
    return torch.tensor(mean).double(), torch.tensor(square).double()


# What is true


@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_advantages_match_every_continuation(seed):
    chain = random_chain(seed)
    values, advantages = ch.values(chain), ch.advantages(chain)
    for t, s in itertools.product(range(chain.tokens), range(len(chain.reward))):
        assert float(values[t, s]) == pytest.approx(expected_reward(chain, s, t))
        for a in (0, 1):
            after = expected_reward(chain, int(chain.moves[t, s, a]), t + 1)
            assert float(advantages[t, s, a]) == pytest.approx(after - float(values[t, s]))
    assert_close(values[-1], chain.reward)


def test_occupancy_matches_every_response():
    chain = random_chain()
    expected = torch.zeros(chain.tokens + 1, len(chain.reward), dtype=torch.float64)
    for actions in sequences(chain.tokens):
        for t, s in enumerate(walk(chain, actions)):
            expected[t, s] += likelihood(chain, actions)
    assert_close(ch.occupancy(chain), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_policy_gradient_matches_finite_differences(seed):
    chain, step = random_chain(seed), 1e-5

    def shifted(t, by):
        logits = chain.logits.clone()
        logits[t] += by
        return expected_reward(Chain(logits, chain.moves, chain.reward))

    expected = [(shifted(t, step) - shifted(t, -step)) / (2 * step) for t in range(chain.tokens)]
    assert ch.policy_gradient(chain).tolist() == pytest.approx(expected, abs=1e-9)


def test_weighted_chain_by_hand():
    """Weights 3 and 4, p = 1/2: totals 0, 3, 4, 7, mean 3.5, spread 2.5; a token's advantage is
    -+ half its weight over 2.5 from any state."""
    chain = ch.weighted_chain([3, 4])
    responses = ch.every_response(chain)
    assert responses.actions.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert chain.reward[responses.states[:, -1]].tolist() == pytest.approx([-1.4, -0.2, 0.2, 1.4])
    expected = torch.tensor([[-0.6, -0.8], [0.6, -0.8], [-0.6, 0.8], [0.6, 0.8]]).double()
    assert_close(ch.true_advantages(chain, responses), expected)
    assert ch.policy_gradient(chain).tolist() == pytest.approx([0.3, 0.4])


def test_lesson_chain_has_mean_0_and_spread_1():
    chain = ch.lesson_chain(40)
    end, reward = ch.occupancy(chain)[-1], chain.reward
    assert float(end @ reward) == pytest.approx(0.0, abs=1e-12)
    assert float(end @ reward**2) == pytest.approx(1.0)


# Estimators


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_expectation_and_variance_match_brute_force(estimator):
    """On a chain without structure, with a critic that is wrong at random."""
    chain = random_chain(2)
    critic = ch.make_critic(chain, informed=0.7, noise=0.5, seed=3)
    mean, square = moments(brute_gradients(chain, critic, estimator))
    assert_close(ch.expected_gradient(chain, critic, estimator), mean)
    everything = ch.every_response(chain)
    each = ch.gradients(chain, everything, critic, estimator)
    assert_close(everything.share @ each, mean)
    assert_close(everything.share @ each**2, square)


def test_quality_by_its_definitions():
    chain, estimator = random_chain(2), Estimator(3, 0.9, "equal")
    critics = [ch.make_critic(chain, 0.7, 0.5, seed) for seed in (0, 1)]
    rows, truth = [], ch.policy_gradient(chain)
    for critic in critics:
        mean, square = moments(brute_gradients(chain, critic, estimator))
        variance = float(square.sum() - mean @ mean)
        cosine = float(mean @ truth / (mean.norm() * truth.norm()))
        bias = float((mean - truth).norm() / truth.norm())
        noise = math.sqrt(variance) / float(truth.norm())
        rows.append((cosine, bias, noise, float(mean @ mean) / variance))
    found = ch.quality(chain, critics, estimator, ch.every_response(chain))
    expected = [sum(column) / 2 for column in zip(*rows, strict=True)]
    assert [found.cosine, found.bias, found.noise, found.snr] == pytest.approx(expected)


def test_aim_is_the_cosine_of_a_batch():
    """2,000 batches of 32 on the long chain; the closed form is a first-order one: within 0.02."""
    chain, estimator = ch.lesson_chain(40), Estimator(5, 0.95, "equal")
    critic = ch.make_critic(chain, 1.0, 0.5)
    responses = ch.sample(chain, 64_000)
    each = ch.gradients(chain, responses, critic, estimator).view(2000, 32, -1).mean(1)
    found = torch.cosine_similarity(each, ch.policy_gradient(chain)[None], dim=1).mean()
    told = ch.quality(chain, [critic], estimator, responses).aim(32)
    assert told == pytest.approx(float(found), abs=0.02)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_sampling_agrees_on_a_long_chain(estimator):
    """20,000 responses of 40 tokens: every token's mean within 5 standard errors of the exact."""
    chain = ch.lesson_chain(40)
    critic = ch.make_critic(chain, 0.8, 0.3)
    each = ch.gradients(chain, ch.sample(chain, 20_000, seed=1), critic, estimator)
    error = each.mean(0) - ch.expected_gradient(chain, critic, estimator)
    assert (error.abs() < 5 * each.std(0) / math.sqrt(20_000)).all()


# What the lesson says


@pytest.mark.parametrize("weights", [*VALUE_WEIGHTS, "own"])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_share_of_credit_with_an_exact_critic(weights, lam):
    """Token i of a macro action gets sigma_0 + ... + sigma_i of its gradient, whatever lam: the
    values that enter the baseline after the token has been chosen take the rest away again."""
    chain = random_chain(4)
    share = ch.credit_shares(chain, ch.make_critic(chain), Estimator(5, lam, weights))
    decay = [1 / (5 - i) for i in range(5)]
    first = {
        "equal": [0.2, 0.4, 0.6, 0.8, 1.0],
        "unit": [0, 0, 0, 0, 1],
        "decay": [sum(decay[: i + 1]) / sum(decay) for i in range(5)],
        "first": [1] * 5,
        "own": [1] * 5,
    }[weights]
    second = {"equal": [0.5, 1.0], "unit": [0, 1], "decay": [1 / 3, 1.0]}.get(weights, [1, 1])
    assert share.tolist() == pytest.approx([*first, *second], abs=1e-9)


def test_share_of_credit_with_a_constant_critic():
    """lam^(steps left), whatever the weights: token GAE at lam^(1/n) is the same but for the steps
    within a macro action."""
    chain = ch.lesson_chain(40)
    critic = ch.make_critic(chain, informed=0.0)
    for weights in (*VALUE_WEIGHTS, "own"):
        share = ch.credit_shares(chain, critic, Estimator(5, 0.95, weights))
        assert_close(share, torch.tensor([0.95 ** (7 - t // 5) for t in range(40)]).double())
    matched = ch.credit_shares(chain, critic, Estimator(1, 0.95**0.2))
    ratio = share / matched  # the end of a macro action is where both have made the same steps
    assert_close(ratio[4::5], torch.ones(8).double())
    assert (ratio - 1).abs().max() < 0.05


def test_own_baseline_is_unbiased_and_quieter_than_first():
    chain, everything = random_chain(5), ch.every_response(random_chain(5))
    exact, constant = ch.make_critic(chain), ch.make_critic(chain, 0.0)
    own, first = Estimator(4, 0.95, "own"), Estimator(4, 0.95, "first")
    truth = ch.policy_gradient(chain)
    assert_close(ch.expected_gradient(chain, exact, own), truth)
    noise = [ch.quality(chain, [exact], e, everything).noise for e in (own, first)]
    assert noise[0] < noise[1]
    same = [ch.estimated_advantages(chain, everything, constant, e) for e in (own, first)]
    assert_close(*same)


def test_numbers_of_the_lesson():
    """The table that lesson 1 argues from, T = 40, lam = 0.95."""
    chain = ch.lesson_chain(40)
    truth = ch.policy_gradient(chain)

    def cosine(critic, *estimator):
        mean = ch.expected_gradient(chain, critic, Estimator(*estimator))
        return float(torch.cosine_similarity(mean, truth, dim=0))

    exact, constant = ch.make_critic(chain), ch.make_critic(chain, 0.0)
    assert cosine(exact, 1, 0.95) == pytest.approx(1.0)
    assert cosine(exact, 5, 0.95, "first") == pytest.approx(1.0)
    assert cosine(exact, 5, 0.95, "equal") == pytest.approx(0.917, abs=0.002)
    assert cosine(exact, 5, 0.95, "unit") == pytest.approx(0.425, abs=0.005)
    assert cosine(constant, 1, 0.95) == pytest.approx(0.866, abs=0.005)
    matched = cosine(constant, 1, 0.95**0.2)
    assert cosine(constant, 5, 0.95) == pytest.approx(matched, abs=0.002)


# Critics and errors


def test_critics():
    chain = random_chain(6)
    exact = ch.values(chain)[:-1]
    assert_close(ch.make_critic(chain), exact)
    assert_close(ch.make_critic(chain, 0.0), exact[0, 0].expand_as(exact))
    noisy = ch.make_critic(chain, 1.0, 0.5, seed=1, sure_every=3)
    assert_close(noisy[::3], exact[::3])
    assert (noisy[1::3] != exact[1::3]).all()
    assert (ch.make_critic(chain, 1.0, 0.5, 1) == ch.make_critic(chain, 1.0, 0.5, 1)).all()
    assert (ch.make_critic(chain, 1.0, 0.5, 1) != ch.make_critic(chain, 1.0, 0.5, 2)).all()
    long = ch.lesson_chain(40)  # 40 x 59 draws: their spread is known to 1.5%
    error = ch.make_critic(long, 1.0, 0.5) - ch.values(long)[:-1]
    assert float(error.std()) == pytest.approx(0.5, rel=0.06)


def test_samples_are_keyed_by_their_seed():
    chain = random_chain(7)
    one = ch.sample(chain, 10_000, seed=1)
    assert (one.actions == ch.sample(chain, 10_000, seed=1).actions).all()
    assert (one.actions != ch.sample(chain, 10_000, seed=2).actions).any()
    assert (one.actions.double().mean(0) - chain.p).abs().max() < 5 * 0.5 / math.sqrt(10_000)


def test_what_does_not_fit_is_refused():
    good = random_chain()
    with pytest.raises(ValueError, match=r"\[T, S, 2\] = \[7, 4, 2\]; got \[6, 4, 2\]"):
        Chain(good.logits, good.moves[1:], good.reward)
    with pytest.raises(ValueError, match="states 0 to 3"):
        Chain(good.logits, good.moves + 4, good.reward)
    with pytest.raises(ValueError, match="no 'sum'"):
        Estimator(5, 0.95, "sum")
    with pytest.raises(ValueError, match="whole numbers"):
        ch.weighted_chain([0, 0])
