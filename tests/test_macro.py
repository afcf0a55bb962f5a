"""Pooling, GAE over macro actions and spreading back: arrays worked out by hand, reductions to
known estimators, a plain-Python reference over ragged batches, and what must not matter."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from marlhf import macro
from marlhf.macro import VALUE_WEIGHTS, WEIGHTS, gae, macro_gae, macro_lengths, pool, spread
from marlhf.segment import FixedNgram, RandomNgram, Token, Whole

NAN = float("nan")


def tensor(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


SEGMENTS = tensor([-1, 0, 0, 0, 1, -1], [0, 1, 1, 2, -1, -1], dtype=torch.int64)
X = tensor([NAN, 6, 12, 24, 5, NAN], [1, 2, 4, 8, NAN, NAN])


@st.composite
def batches(draw, max_rows=4, max_columns=40):
    """rewards, values (NaN off the mask), segments with padding anywhere; rows may be empty."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    mask = torch.rand(rows, columns, generator=generator) < density
    segmenter = draw(
        st.sampled_from([Token(), FixedNgram(2), FixedNgram(5), RandomNgram((1, 2, 6)), Whole()])
    )
    segments = segmenter(torch.zeros(rows, columns), mask, generator=generator)
    rewards, values = (
        torch.randn(rows, columns, generator=generator).masked_fill(~mask, NAN) for _ in range(2)
    )
    return rewards, values, segments


def token_gae(rewards, values, gamma, lam):
    """The plain loop of token PPO over unpadded [B, T]."""
    advantages, last = [], torch.zeros(rewards.shape[0])
    following = torch.zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = delta + gamma * lam * last
        following = values[:, t]
        advantages.insert(0, last)
    return torch.stack(advantages, 1)


# pool and spread


@pytest.mark.parametrize(
    "weights, gamma, expected",
    [
        ("sum", 1.0, [[42, 5, 0], [1, 6, 8]]),
        ("equal", 1.0, [[14, 5, 0], [1, 3, 8]]),
        ("unit", 1.0, [[24, 5, 0], [1, 4, 8]]),
        ("first", 1.0, [[6, 5, 0], [1, 2, 8]]),
        # (1/3, 1/2, 1) / (11/6) and (1/2, 1) / (3/2)
        ("decay", 1.0, [[(2 + 6 + 24) * 6 / 11, 5, 0], [1, 10 / 3, 8]]),
        ("discounted", 0.5, [[6 + 6 + 6, 5, 0], [1, 4, 8]]),
        ("discounted", 1.0, [[42, 5, 0], [1, 6, 8]]),
        ("discounted", 0.0, [[6, 5, 0], [1, 2, 8]]),
    ],
)
def test_pool_by_hand(weights, gamma, expected):
    assert_close(pool(X, SEGMENTS, weights, gamma), tensor(*expected))


def test_pool_defaults_to_equal_and_knows_its_weights():
    assert_close(pool(X, SEGMENTS), pool(X, SEGMENTS, "equal"))
    with pytest.raises(ValueError, match="there is no 'mean'; choose from equal, unit"):
        pool(X, SEGMENTS, "mean")


def test_lengths_and_spread_by_hand():
    assert macro_lengths(SEGMENTS).tolist() == [[3, 1, 0], [1, 2, 1]]
    y = tensor([1, 2, NAN], [3, 4, 5])
    assert spread(y, SEGMENTS).tolist() == [[0, 1, 1, 1, 2, 0], [3, 4, 4, 5, 0, 0]]


@pytest.mark.parametrize("weights", VALUE_WEIGHTS)
def test_value_weights_average(weights):
    """They sum to one, so a constant is its own pool; spread then gives it back on the mask."""
    back = spread(pool(torch.full_like(X, 3.7), SEGMENTS, weights), SEGMENTS)
    assert_close(back, torch.where(SEGMENTS >= 0, 3.7, 0.0))


@given(batches(), st.sampled_from(WEIGHTS), st.sampled_from([0.0, 0.9, 1.0]))
@settings(max_examples=120, deadline=None)
def test_pool_matches_reference(batch, weights, gamma):
    x, _, segments = batch
    pooled = pool(x, segments, weights, gamma)
    for row in range(len(x)):
        expected = reference.pool(x[row].tolist(), segments[row].tolist(), weights, gamma)
        expected += [0.0] * (pooled.shape[1] - len(expected))
        assert_close(pooled[row], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_pool_gradients(weights):
    """Against finite differences."""
    x = X.nan_to_num(0.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, SEGMENTS, weights, 0.9), x)


@given(batches(), st.sampled_from(WEIGHTS), st.sampled_from([0.0, 0.9]))
@settings(max_examples=60, deadline=None)
def test_pool_gradients_stop_at_the_mask(batch, weights, gamma):
    x, _, segments = batch
    x.requires_grad_()
    pool(x, segments, weights, gamma).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[segments < 0] == 0).all()


def test_spread_refuses_too_few_columns():
    with pytest.raises(ValueError, match="2 columns for segments of 3 macro actions"):
        spread(torch.ones(2, 2), SEGMENTS)


# gae


def test_gae_by_hand():
    """gamma = 1/2, lam = 1/2, lengths 2, 1: discounts 1/4, 1/2.
    delta_1 = 4 - 2 = 2;  delta_0 = 1 + 2/4 - 3 = -1.5;  A_0 = -1.5 + 2 (1/4)(1/2) = -1.25."""
    advantages = gae(tensor([1, 4]), tensor([3, 2]), tensor([2, 1], dtype=torch.int64), 0.5, 0.5)
    assert_close(advantages, tensor([-1.25, 2]))


def test_gae_defaults_to_gamma_one_lambda_95():
    rewards, values = tensor([0, 0, 1]), tensor([0.1, 0.2, 0.3])
    expected = [0.1 + 0.95 * (0.1 + 0.95 * 0.7), 0.1 + 0.95 * 0.7, 0.7]
    assert_close(gae(rewards, values, torch.ones(1, 3)), tensor(expected))


@given(
    st.integers(1, 3),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.8, 0.95, 1.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_gae_matches_reference(rows, steps, gamma, lam, seed):
    """Any lengths, 0 among them."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, steps, generator=generator)
    lengths = torch.randint(0, 6, (rows, steps), generator=generator)
    advantages = gae(rewards, values, lengths, gamma, lam)
    for row in range(rows):
        arguments = (each[row].tolist() for each in (rewards, values, lengths))
        expected = torch.tensor(reference.gae(*arguments, gamma, lam))
        assert_close(advantages[row], expected, rtol=1e-5, atol=1e-5)


def test_empty_macro_action_costs_one_factor_of_lambda():
    """The official code puts an empty step (V = R = 0, no tokens) before the last token. The step
    before it then bootstraps on 0 and the last advantage arrives with lam^2."""
    lam, rewards, values = 0.9, tensor([1, 2, 0, 5]), tensor([0.5, 1, 0, 3])
    a3 = 5 - 3
    a2 = 3 + lam * a3  # the empty step: delta = 0 + 1 V_3 - 0
    a1 = (2 + 0 - 1) + lam * a2
    a0 = (1 + 1 - 0.5) + lam * a1
    lengths = tensor([5, 5, 0, 1], dtype=torch.int64)
    assert_close(gae(rewards, values, lengths, 1.0, lam), tensor([a0, a1, a2, a3]))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_padding_columns_change_nothing(gamma):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=generator)
    lengths = torch.randint(1, 6, (3, 7), generator=generator)
    wider = [torch.nn.functional.pad(each, (0, 12)) for each in (rewards, values, lengths)]
    expected = torch.nn.functional.pad(gae(rewards, values, lengths, gamma), (0, 12))
    assert_close(gae(*wider, gamma), expected)


def test_gae_leaves_its_arguments_alone():
    for steps in (1, 2, 9):
        arguments = [torch.ones(1, steps), torch.ones(1, steps), torch.ones(1, steps)]
        gae(*arguments, 0.9, 0.9)
        assert all((each == 1).all() for each in arguments)


def test_gae_does_not_underflow():
    """gamma^k over 2,000 tokens is far below the smallest float32; dividing by it would be NaN."""
    rewards, values = torch.zeros(1, 2000), torch.zeros(1, 2000)
    rewards[0, [0, 1999]] = 1.0
    advantages = gae(rewards, values, torch.full((1, 2000), 3), gamma=0.9, lam=1.0)
    assert_close(advantages[0, [0, 1998, 1999]], torch.tensor([1.0, 0.9**3, 1.0]))
    assert advantages.isfinite().all()


# macro_gae


def test_macro_gae_by_hand():
    """Six tokens, macro actions of 3, 2, 1; score 2 at the end, KL penalty 0.1 a token; lam = 1/2.
    V = (1 + 2 + 3)/3 = 2, (1 + 0)/2 = 0.5, 1;  R = -0.3, -0.2, 1.9.
    delta = -0.3 + 0.5 - 2 = -1.8;  -0.2 + 1 - 0.5 = 0.3;  1.9 - 1 = 0.9.
    A_2 = 0.9;  A_1 = 0.3 + 0.45 = 0.75;  A_0 = -1.8 + 0.375 = -1.425."""
    rewards = tensor([-0.1, -0.1, -0.1, -0.1, -0.1, 1.9, NAN])
    values = tensor([1, 2, 3, 1, 0, 1, NAN])
    segments = tensor([0, 0, 0, 1, 1, 2, -1], dtype=torch.int64)
    advantages, returns = macro_gae(rewards, values, segments, lam=0.5)
    assert_close(advantages, tensor([-1.425] * 3 + [0.75] * 2 + [0.9, 0]))
    assert_close(returns, tensor([0.575] * 3 + [1.25] * 2 + [1.9, 0]))


@given(
    batches(),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.sampled_from(VALUE_WEIGHTS),
    st.sampled_from(WEIGHTS),
)
@settings(max_examples=200, deadline=None)
def test_macro_gae_matches_reference(batch, gamma, lam, value_weights, reward_weights):
    advantages, returns = macro_gae(*batch, gamma, lam, value_weights, reward_weights)
    for row, arguments in enumerate(zip(*(each.tolist() for each in batch), strict=True)):
        expected = reference.macro_gae(*arguments, gamma, lam, value_weights, reward_weights)
        assert_close(advantages[row], torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
        assert_close(returns[row], torch.tensor(expected[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
@pytest.mark.parametrize("value_weights", VALUE_WEIGHTS)
@pytest.mark.parametrize("reward_weights", WEIGHTS)
def test_one_token_a_macro_action_is_token_gae(gamma, value_weights, reward_weights):
    rewards, values = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    segments = Token()(rewards, torch.ones(4, 30))
    advantages, returns = macro_gae(
        rewards, values, segments, gamma, 0.95, value_weights, reward_weights
    )
    expected = token_gae(rewards, values, gamma, 0.95)
    assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
    assert_close(returns, expected + values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma, reward_weights", [(1.0, "sum"), (0.9, "discounted")])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_one_macro_action_is_return_minus_value(gamma, reward_weights, lam):
    """REINFORCE with a baseline: with "first", token GAE at lambda = 1 of the first token."""
    rewards, values = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    segments = Whole()(rewards, torch.ones(4, 30))
    advantages, returns = macro_gae(rewards, values, segments, gamma, lam, "first", reward_weights)
    total = (gamma ** torch.arange(30) * rewards).sum(1, keepdim=True)
    assert_close(returns, total.expand(4, 30))
    assert_close(advantages, (total - values[:, :1]).expand(4, 30))
    monte_carlo = token_gae(rewards, values, gamma, 1.0)[:, :1]
    assert_close(advantages[:, :1], monte_carlo, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_semi_markov_form_telescopes_at_lambda_one(gamma):
    """ "first" and "discounted" with lambda = 1: the discounted return from where the macro action
    begins, minus the value there, whatever the segments. No other weights do that for gamma < 1."""
    rewards, values = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    segments = RandomNgram()(rewards, torch.ones(4, 30), generator=torch.Generator().manual_seed(1))
    advantages, _ = macro_gae(rewards, values, segments, gamma, 1.0, "first", "discounted")
    begins = torch.nn.functional.pad(segments.diff(dim=1), (1, 0), value=1) == 1
    monte_carlo = token_gae(rewards, values, gamma, 1.0)
    assert_close(advantages[begins], monte_carlo[begins], rtol=1e-4, atol=1e-5)


def test_constant_critic_at_lambda_is_token_gae_at_its_nth_root():
    """The control arm: with a constant critic and a final reward alone, the last token of each
    macro action of n tokens has the advantage of token GAE at lambda^(1/n)."""
    rewards, values = torch.zeros(1, 20), torch.full((1, 20), 0.3)
    rewards[0, -1] = 1.0
    macro_advantages, _ = macro_gae(rewards, values, FixedNgram(5)(values, torch.ones(1, 20)))
    token_advantages = token_gae(rewards, values, 1.0, 0.95 ** (1 / 5))
    assert_close(macro_advantages[0, 4::5], token_advantages[0, 4::5])


@pytest.mark.parametrize("weights", ["sum", "discounted", "mean"])
def test_value_weights_must_average(weights):
    with pytest.raises(ValueError, match=f"value_weights: '{weights}' is no average"):
        macro_gae(X, X, SEGMENTS, value_weights=weights)


# What must not matter


@given(batches(), st.permutations(range(4)))
@settings(max_examples=40, deadline=None)
def test_rows_do_not_mix(batch, order):
    """Batch order, the other rows and extra padding change nothing, bit for bit."""
    order = [row for row in order if row < len(batch[0])]
    results = macro_gae(*batch, gamma=0.9)
    for result, shuffled in zip(
        results, macro_gae(*(each[order] for each in batch), gamma=0.9), strict=True
    ):
        assert_close(shuffled, result[order], rtol=1e-6, atol=1e-6)
    alone = macro_gae(*(each[:1] for each in batch), gamma=0.9)
    assert_close(alone[0], results[0][:1], rtol=1e-5, atol=1e-5)
    wider = (
        torch.nn.functional.pad(each, (2, 3), value=fill)
        for each, fill in zip(batch, (NAN, NAN, -1), strict=True)
    )
    assert_close(macro_gae(*wider, gamma=0.9)[1][:, 2:-3], results[1], rtol=1e-5, atol=1e-5)


@given(batches())
@settings(max_examples=40, deadline=None)
def test_accelerators_wider_columns_give_the_same(batch):
    """Off the CPU M is T, so that nothing waits for the device (module docstring)."""
    expected = macro_gae(*batch, gamma=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(macro, "_columns", lambda segments: segments.shape[1])
        results = macro_gae(*batch, gamma=0.9)
        pooled = pool(batch[0], batch[2])
    assert pooled.shape == batch[0].shape
    assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", VALUE_WEIGHTS)
def test_host_never_waits_for_the_device(weights):
    """A meta tensor has no contents: whatever needs them on the host raises."""
    x = torch.zeros(3, 20, device="meta")
    segments = torch.zeros(3, 20, dtype=torch.int64, device="meta")
    assert pool(x, segments, weights).shape == (3, 20)
    for result in macro_gae(x, x, segments, 0.9, 0.95, weights, "discounted"):
        assert (result.shape, result.device.type) == ((3, 20), "meta")


def test_bfloat16_in_float32_inside():
    """Bit for bit what the same numbers give in float32: nothing is rounded on the way. 64 rewards
    of 1 + 1/128 sum to 64.5, which bfloat16 cannot even hold."""
    x = torch.full((1, 64), 1 + 1 / 128).bfloat16()
    segments = FixedNgram(64)(x, torch.ones(1, 64))
    assert pool(x, segments, "sum").item() == 64.5
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 64, generator=generator).bfloat16()
    segments = FixedNgram(5)(rewards, torch.ones(4, 64))
    low = macro_gae(rewards, values, segments, gamma=0.99)
    assert low[0].dtype == torch.float32
    lengths = torch.ones(4, 64, dtype=torch.int64)
    steps = gae(rewards, values, lengths), gae(rewards.float(), values.float(), lengths)
    assert torch.equal(*steps)
    assert torch.equal(
        torch.stack(low), torch.stack(macro_gae(rewards.float(), values.float(), segments, 0.99))
    )


def test_no_gradient_flows_through_advantages():
    rewards = torch.ones(1, 4, requires_grad=True)
    segments = torch.zeros(1, 4, dtype=torch.int64)
    assert not any(each.requires_grad for each in macro_gae(rewards, rewards, segments))


def test_empty_batches():
    for shape in ((0, 5), (3, 0), (2, 4)):
        x, segments = torch.full(shape, NAN), torch.full(shape, -1)
        for result in macro_gae(x, x, segments):
            assert result.shape == shape
            assert (result == 0).all()
